#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace ddmd {
namespace {

constexpr int kSpins = 2000;  // of a waiting worker before it sleeps: wake-ups cost tens of microseconds

class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 0; i < workers; ++i) std::thread([this] { serve(); }).detach();
    workers_ = workers;
  }
  int workers() const { return workers_; }

  void run(int parts, const std::function<void(int)> &part) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      part_ = &part;
      parts_ = parts;
      next_.store(0);
      left_.store(parts);
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    take();
    for (;;) {
      while (left_.load(std::memory_order_acquire) > 0 || inside_.load(std::memory_order_acquire) > 0)
        std::this_thread::yield();
      std::lock_guard<std::mutex> lock(mutex_);
      if (inside_.load(std::memory_order_acquire) > 0) continue;  // one that woke late came in meanwhile
      part_ = nullptr;
      return;
    }
  }

 private:
  void take() {
    const std::function<void(int)> *part = part_;
    for (int i; (i = next_.fetch_add(1)) < parts_;) {
      (*part)(i);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && generation_.load() == seen; ++spin) std::this_thread::yield();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        seen = generation_.load();
        if (part_ == nullptr) continue;
        inside_.fetch_add(1);
      }
      take();
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> next_{0}, left_{0}, inside_{0};
  const std::function<void(int)> *part_ = nullptr;
  int parts_ = 0;
  int workers_ = 0;
};

std::mutex owner;
Pool *pool = nullptr;  // never freed: its threads may outlive static destructors

using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
std::atomic<GompParallel> gomp{nullptr};

// In a forked child the threads of the pool and of OpenMP are gone, and libgomp would wait for them.
void forget_after_fork() {
  pool = nullptr;
  gomp.store(nullptr);
  new (&owner) std::mutex();
}

void watch_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_after_fork);
  (void)registered;
}

struct Team {
  std::atomic<int> next{0};
  int parts;
  int64_t size;
  const std::function<void(int64_t, int64_t)> *work;
};

// Every thread of the team takes parts until none is left: right for a team of any size.
void team_member(void *data) {
  Team &team = *static_cast<Team *>(data);
  for (int i; (i = team.next.fetch_add(1)) < team.parts;)
    (*team.work)(team.size * i / team.parts, team.size * (i + 1) / team.parts);
}

}  // namespace

void use_openmp(uintptr_t gomp_parallel) {
  watch_forks();
  gomp.store(reinterpret_cast<GompParallel>(gomp_parallel));
}

void parallel_for(int64_t size, int64_t grain, int threads, const std::function<void(int64_t, int64_t)> &work) {
  if (size <= 0) return;
  const int64_t most = (size + grain - 1) / grain;
  const int parts = static_cast<int>(std::min<int64_t>({most, threads < 1 ? 1 : threads, int64_t{256}}));
  if (parts <= 1) {
    work(0, size);
    return;
  }
  if (const GompParallel parallel = gomp.load(); parallel != nullptr) {
    Team team;
    team.parts = parts;
    team.size = size;
    team.work = &work;
    parallel(team_member, &team, static_cast<unsigned>(parts), 0);
    return;
  }
  std::unique_lock<std::mutex> lock(owner, std::try_to_lock);
  if (!lock.owns_lock()) {
    work(0, size);
    return;
  }
  if (pool == nullptr || pool->workers() < parts - 1) {
    watch_forks();
    pool = new Pool(parts - 1);
  }
  pool->run(parts, [&](int i) { work(size * i / parts, size * (i + 1) / parts); });
}

}  // namespace ddmd
