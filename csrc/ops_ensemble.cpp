// Mean and variance over samples, whole: strides, and how the columns are cut over threads.
#include <algorithm>
#include <vector>

#include "ddmd.h"
#include "parallel.h"

namespace ddmd {
namespace {

size_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }
const char *offset_by(const void *x, DType type, int64_t elements) {
  return static_cast<const char *>(x) + elements * static_cast<int64_t>(size_of(type));
}

// Axes of a strided array after merging those that run on into each other; the last is the columns'.
struct Axes {
  std::vector<int64_t> shape, strides;
  int64_t rows = 1;
};

Axes merge_axes(const int64_t *shape, const int64_t *strides, int dims) {
  Axes axes;
  for (int i = 0; i < dims; ++i) {
    if (shape[i] == 1) continue;
    if (!axes.shape.empty() && axes.strides.back() == strides[i] * shape[i]) {
      axes.shape.back() *= shape[i];
      axes.strides.back() = strides[i];
    } else {
      axes.shape.push_back(shape[i]);
      axes.strides.push_back(strides[i]);
    }
  }
  if (axes.shape.empty()) {
    axes.shape.push_back(1);
    axes.strides.push_back(1);
  }
  for (size_t i = 0; i + 1 < axes.shape.size(); ++i) axes.rows *= axes.shape[i];
  return axes;
}

// Calls each(base, step, first, last, out) for runs of columns: column i is at base + i step, its result is
// number out + i.
template <class Each>
void for_each_column_run(const void *x, DType type, int64_t samples, const int64_t *shape, const int64_t *strides, int dims,
                  int threads, Each each) {
  const Axes axes = merge_axes(shape, strides, dims);
  const int64_t columns = axes.shape.back(), step = axes.strides.back();
  if (axes.rows * columns == 0) return;
  constexpr int64_t part = 4096;  // columns of a run
  const int64_t pieces = (columns + part - 1) / part;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, std::min(columns, part) * samples));
  parallel_for(axes.rows * pieces, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t row = unit / pieces, at = 0;
      const int64_t first = unit % pieces * part, out = row * columns;
      for (int64_t i = static_cast<int64_t>(axes.shape.size()) - 2; i >= 0; --i) {
        at += row % axes.shape[i] * axes.strides[i];
        row /= axes.shape[i];
      }
      each(offset_by(x, type, at), step, first, std::min(columns, first + part), out);
    }
  });
}

// Mean and scale x M2 of columns [first, last).
void moments_of(const void *base, DType type, int64_t samples, int64_t sample_stride, int64_t step, int64_t first,
                int64_t last, float scale, bool non_temporal, float *mean, float *m2) {
  const void *x = offset_by(base, type, first * step);
  if (step == 1)
    kernels().moments(x, type, samples, sample_stride, last - first, scale, non_temporal, mean, m2);
  else
    kernels().moments_strided(x, type, samples, sample_stride, step, last - first, scale, mean, m2);
}

}  // namespace

void ensemble_variance(const void *x, DType type, int64_t samples, int64_t sample_stride, const int64_t *shape,
                       const int64_t *strides, int dims, int correction, float *mean, float *variance, int threads) {
  const float scale = 1.0f / static_cast<float>(samples - correction);
  int64_t size = 1;
  for (int i = 0; i < dims; ++i) size *= shape[i];
  for_each_column_run(x, type, samples, shape, strides, dims, threads,
               [&](const void *base, int64_t step, int64_t first, int64_t last, int64_t out) {
                 moments_of(base, type, samples, sample_stride, step, first, last, scale, size * 8 > kCacheBytes,
                            mean + out + first, variance + out + first);
               });
}

void ensemble_merge(float *mean, float *m2, int64_t count, const float *other_mean, const float *other_m2,
                    int64_t other_count, int64_t size, int threads) {
  parallel_for(size, 16384, threads, [&](int64_t begin, int64_t end) {
    kernels().merge(mean, m2, count, other_mean, other_m2, other_count, begin, end);
  });
}

void ensemble_update(float *mean, float *m2, int64_t count, const void *x, DType type, int64_t samples,
                     int64_t sample_stride, const int64_t *shape, const int64_t *strides, int dims, int threads) {
  for_each_column_run(x, type, samples, shape, strides, dims, threads,
               [&](const void *base, int64_t step, int64_t first, int64_t last, int64_t out) {
                 const int64_t n = last - first;
                 if (step == 1) {
                   kernels().update(mean + out + first, m2 + out + first, count, offset_by(base, type, first), type,
                                    samples, sample_stride, n);
                   return;
                 }
                 thread_local std::vector<float> fresh;
                 fresh.resize(2 * n);
                 moments_of(base, type, samples, sample_stride, step, first, last, 1.0f, false, fresh.data(),
                            fresh.data() + n);
                 kernels().merge(mean + out + first, m2 + out + first, count, fresh.data(), fresh.data() + n, samples,
                                 0, n);
               });
}

}  // namespace ddmd
