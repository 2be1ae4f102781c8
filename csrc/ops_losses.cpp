// The discrepancy losses, whole: how elements and groups are cut over threads, and the sums of the parts.
#include <algorithm>
#include <vector>

#include "ddmd.h"
#include "parallel.h"

namespace ddmd {

namespace {

constexpr int64_t kKlChunk = 16384;  // elements of one partial sum

}  // namespace

void gaussian_kl(const Gaussians &g, int64_t size, double scale, bool each, float *out, int threads) {
  const int64_t chunks = (size + kKlChunk - 1) / kKlChunk;
  std::vector<double> partial(each ? 0 : chunks);
  parallel_for(chunks, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kKlChunk, last = std::min(size, first + kKlChunk);
      if (each)
        kernels().gaussian_kl(g, out, first, last);
      else
        partial[chunk] = kernels().gaussian_kl_sum(g, first, last);
    }
  });
  if (each) return;
  double total = 0.0;
  for (const double part : partial) total += part;
  *out = static_cast<float>(total * scale);
}

void gaussian_kl_backward(const Gaussians &g, int64_t size, int threads) {
  parallel_for(size, kKlChunk, threads, [&](int64_t begin, int64_t end) { kernels().gaussian_kl_grads(g, begin, end); });
}

namespace {

// Row numbers with those of one group beside each other, in their order.
struct Groups {
  struct Run {
    int64_t first, count;
  };
  std::vector<int64_t> rows;
  std::vector<Run> runs;

  Groups(const int64_t *group, int64_t size, int64_t groups) : rows(size) {
    if (groups <= 4 * size + 64) {  // by counting, which takes an array of that many numbers
      std::vector<int64_t> next(groups + 1, 0);
      for (int64_t i = 0; i < size; ++i) ++next[group[i] + 1];
      for (int64_t g = 0; g < groups; ++g) next[g + 1] += next[g];
      for (int64_t i = 0; i < size; ++i) rows[next[group[i]]++] = i;
    } else {
      for (int64_t i = 0; i < size; ++i) rows[i] = i;
      std::stable_sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) { return group[a] < group[b]; });
    }
    for (int64_t i = 0; i < size; ++i) {
      if (i == 0 || group[rows[i]] != group[rows[i - 1]]) runs.push_back({i, 0});
      ++runs.back().count;
    }
  }
};

// Calls each(unit, run, first column, columns) for every group and block of columns. The blocks depend on the
// shape alone, so that the same sums are made on any number of threads.
template <class Each>
void for_each_block(const Groups &groups, int64_t row_size, int threads, Each each) {
  const int64_t wanted = (row_size / 8 + 63) / 64 * 64;
  const int64_t block = std::min(kRowColumns, std::max<int64_t>(wanted, 256));
  const int64_t blocks = (row_size + block - 1) / block, units = blocks * static_cast<int64_t>(groups.runs.size());
  const int64_t work = static_cast<int64_t>(groups.rows.size()) * std::min(block, row_size);
  const int64_t grain = std::max<int64_t>(1, 16384 * static_cast<int64_t>(groups.runs.size()) / std::max<int64_t>(work, 1));
  parallel_for(units, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % blocks * block;
      each(unit, groups.runs[unit / blocks], first, std::min(block, row_size - first));
    }
  });
}

}  // namespace

void pairwise_sqdist(const void *z, DType type, int64_t rows, int64_t row_size, const int64_t *group, int64_t groups,
                     float *out, int threads) {
  const Groups sorted(group, rows, groups);
  std::vector<double> partial(sorted.runs.size() * ((row_size + 255) / 256), 0.0);  // of 256 columns, at least
  for_each_block(sorted, row_size, threads, [&](int64_t unit, const Groups::Run &run, int64_t first, int64_t columns) {
    if (run.count > 1)
      partial[unit] = static_cast<double>(run.count) * kernels().row_deviations(z, type, row_size, &sorted.rows[run.first],
                                                                                run.count, first, columns);
  });
  double total = 0.0;
  for (const double part : partial) total += part;
  *out = static_cast<float>(total);
}

void pairwise_sqdist_backward(float grad, const void *z, DType type, int64_t rows, int64_t row_size,
                              const int64_t *group, int64_t groups, void *d_z, int threads) {
  const Groups sorted(group, rows, groups);
  for_each_block(sorted, row_size, threads, [&](int64_t, const Groups::Run &run, int64_t first, int64_t columns) {
    kernels().row_deviation_grads(z, d_z, type, row_size, &sorted.rows[run.first], run.count, first, columns,
                                  2.0f * grad * static_cast<float>(run.count));
  });
}

}  // namespace ddmd
