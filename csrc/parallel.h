// A small persistent pool of threads: the same parts on any number of threads, none of them torch's.
#pragma once
#include <cstdint>
#include <functional>

namespace ddmd {

// Calls work(begin, end) on disjoint ranges of about one length that cover [0, size), one for every `grain`
// begun at most. Runs in the calling thread where that is enough, or while another thread uses the pool.
void parallel_for(int64_t size, int64_t grain, int threads, const std::function<void(int64_t, int64_t)> &work);

// Use another OpenMP runtime's threads, by the address of its GOMP_parallel (0 goes back to the pool).
// Two runtimes on one machine spin against each other: torch's threads wait busily for milliseconds
// after each of its ops, so work interleaved with torch's runs twice as fast on torch's own threads.
void use_openmp(uintptr_t gomp_parallel);

}  // namespace ddmd
