// Whole operations: which instruction set, how the work is cut over threads, and the small sums between passes.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ddmd.h"
#include "parallel.h"

namespace ddmd {

extern const Kernels kernels_baseline;
#ifdef DDMD_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

size_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }
const char *offset_by(const void *x, DType type, int64_t elements) {
  return static_cast<const char *>(x) + elements * static_cast<int64_t>(size_of(type));
}

std::vector<const Kernels *> sets() {
  std::vector<const Kernels *> found;
#ifdef DDMD_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    found.push_back(&kernels_avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("f16c"))
    found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_baseline);
  return found;
}

// Axes of a strided array after merging those that run on into each other; the last is the columns'.
struct Axes {
  std::vector<int64_t> shape, strides;
  int64_t rows = 1;
};

Axes merged(const int64_t *shape, const int64_t *strides, int dims) {
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

}  // namespace

const Kernels *kernel_set(int index) {
  static const std::vector<const Kernels *> found = sets();
  return index < static_cast<int>(found.size()) ? found[index] : nullptr;
}

const Kernels &kernels() {
  static const Kernels &best = *kernel_set(0);
  return best;
}

namespace {

// Columns that come out as mean and M2, then `finish`ed while still in the cache.
template <class Finish>
void moments_then(const void *x, DType type, int64_t samples, int64_t sample_stride, const int64_t *shape,
                  const int64_t *strides, int dims, float *mean, float *m2, int threads, Finish finish) {
  const Axes axes = merged(shape, strides, dims);
  const int64_t columns = axes.shape.back(), step = axes.strides.back();
  const int64_t size = axes.rows * columns;
  if (size == 0) return;
  constexpr int64_t part = 4096;  // columns whose results are finished at a time
  const int64_t pieces = step == 1 ? (columns + part - 1) / part : 1;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, std::min(columns, part) * samples));
  parallel_for(axes.rows * pieces, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t row = unit / pieces, at = 0;
      const int64_t first = unit % pieces * part, last = pieces == 1 ? columns : std::min(columns, first + part);
      const int64_t out = row * columns;
      for (int64_t i = static_cast<int64_t>(axes.shape.size()) - 2; i >= 0; --i) {
        at += row % axes.shape[i] * axes.strides[i];
        row /= axes.shape[i];
      }
      const void *base = offset_by(x, type, at);
      if (step == 1)
        kernels().moments(base, type, samples, sample_stride, first, last, mean + out, m2 + out);
      else
        kernels().moments_strided(base, type, samples, sample_stride, step, columns, mean + out, m2 + out);
      finish(out + first, out + last);
    }
  });
}

}  // namespace

void ensemble_moments(const void *x, DType type, int64_t samples, int64_t sample_stride, const int64_t *shape,
                      const int64_t *strides, int dims, float *mean, float *m2, int threads) {
  moments_then(x, type, samples, sample_stride, shape, strides, dims, mean, m2, threads, [](int64_t, int64_t) {});
}

void ensemble_variance(const void *x, DType type, int64_t samples, int64_t sample_stride, const int64_t *shape,
                       const int64_t *strides, int dims, int correction, float *mean, float *variance, int threads) {
  const float share = 1.0f / static_cast<float>(samples - correction);
  moments_then(x, type, samples, sample_stride, shape, strides, dims, mean, variance, threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) variance[i] *= share;
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
  int64_t size = 1;
  for (int i = 0; i < dims; ++i) size *= shape[i];
  std::vector<float> scratch(2 * size);
  float *fresh = scratch.data(), *fresh_m2 = fresh + size;
  moments_then(x, type, samples, sample_stride, shape, strides, dims, fresh, fresh_m2, threads,
               [&](int64_t begin, int64_t end) {
                 kernels().merge(mean, m2, count, fresh, fresh_m2, samples, begin, end);
               });
}

void denoise_step(void *x, DType type, const void *output, DType output_type, void *x0, const float *table,
                  int64_t step, int64_t seed, const int64_t *sample, const int64_t *slice, int64_t rows,
                  int64_t row_size, int threads) {
  const int64_t units = rows * ((row_size + 255) / 256);
  parallel_for(units, 16, threads, [&](int64_t begin, int64_t end) {
    kernels().denoise(x, type, output, output_type, x0, table + 8 * step, static_cast<uint32_t>(step),
                      static_cast<uint64_t>(seed), sample, slice, row_size, begin, end);
  });
}

void noise(const void *x0, void *x, DType type, const int64_t *t, const float *table, int64_t step, int64_t seed,
           const int64_t *sample, const int64_t *slice, int64_t rows, int64_t row_size, int threads) {
  const int64_t units = rows * ((row_size + 255) / 256);
  parallel_for(units, 16, threads, [&](int64_t begin, int64_t end) {
    kernels().noise(x0, x, type, t, table, static_cast<uint32_t>(step), static_cast<uint64_t>(seed), sample, slice,
                    row_size, begin, end);
  });
}

void discrepancy_maps(const void *a, const void *b, DType type, int64_t members_a, int64_t members_b, int64_t slices,
                      int64_t channels, int64_t pixels, float *inter, float *intra, int threads) {
  parallel_for(slices * ((pixels + 511) / 512), 16, threads, [&](int64_t begin, int64_t end) {
    kernels().maps(a, b, type, members_a, members_b, slices, channels, pixels, inter, intra, begin, end);
  });
}

namespace {

Norm norm_of(const void *x, DType type, bool channels_last, int64_t batch, int64_t channels, int64_t pixels,
             int64_t groups) {
  Norm n = {};
  n.type = type;
  n.channels_last = channels_last;
  n.batch = batch;
  n.channels = channels;
  n.pixels = pixels;
  n.groups = groups;
  n.chunk = std::max<int64_t>(16, 16384 / std::max<int64_t>(channels, 1));
  n.chunks = (pixels + n.chunk - 1) / n.chunk;
  n.x = x;
  return n;
}

// gain and offset of y = silu(gain x + offset), and inner = weight (1 + scale), each (N, C)
void coefficients(const Norm &n, const float *weight, const float *bias, const float *scale, const float *shift,
                  const float *mean, const float *rstd, float *gain, float *offset, float *inner) {
  const int64_t per_group = n.channels / n.groups;
  for (int64_t i = 0; i < n.batch * n.channels; ++i) {
    const int64_t c = i % n.channels, g = i / n.channels * n.groups + c / per_group;
    const float up = scale ? 1.0f + scale[i] : 1.0f;
    inner[i] = weight[c] * up;
    gain[i] = rstd[g] * inner[i];
    offset[i] = bias[c] * up - mean[g] * gain[i] + (shift ? shift[i] : 0.0f);
  }
}

}  // namespace

void group_norm_silu(const void *x, DType type, bool channels_last, int64_t batch, int64_t channels, int64_t pixels,
                     int64_t groups, const float *weight, const float *bias, const float *scale, const float *shift,
                     const void *residual, double eps, void *y, float *mean, float *rstd, int threads) {
  Norm n = norm_of(x, type, channels_last, batch, channels, pixels, groups);
  const int64_t units = batch * n.chunks, table = batch * channels;
  std::vector<float> scratch(2 * units * channels + 3 * table);
  n.part_one = scratch.data();
  n.part_two = n.part_one + units * channels;
  parallel_for(units, 2, threads, [&](int64_t b, int64_t e) { kernels().norm_moments(n, b, e); });
  const int64_t per_group = channels / groups;
  for (int64_t image = 0; image < batch; ++image)
    for (int64_t g = 0; g < groups; ++g) {
      double count = 0.0, centre = 0.0, m2 = 0.0;  // merged in a fixed order (Chan et al.)
      for (int64_t k = 0; k < n.chunks; ++k) {
        const double more = static_cast<double>(std::min(n.chunk, pixels - k * n.chunk));
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
          const int64_t at = (image * n.chunks + k) * channels + c;
          const double delta = n.part_one[at] - centre;
          centre += delta * more / (count + more);
          m2 += n.part_two[at] + delta * delta * count * more / (count + more);
          count += more;
        }
      }
      mean[image * groups + g] = static_cast<float>(centre);
      rstd[image * groups + g] = static_cast<float>(1.0 / std::sqrt(m2 / count + eps));
    }
  float *gain = n.part_two + units * channels, *offset = gain + table;
  coefficients(n, weight, bias, scale, shift, mean, rstd, gain, offset, offset + table);
  n.gain = gain;
  n.offset = offset;
  n.residual = residual;
  n.y = y;
  parallel_for(units, 2, threads, [&](int64_t b, int64_t e) { kernels().norm_apply(n, b, e); });
}

void group_norm_silu_backward(const void *grad, const void *x, DType type, bool channels_last, int64_t batch,
                              int64_t channels, int64_t pixels, int64_t groups, const float *weight,
                              const float *bias, const float *scale, const float *shift, const float *mean,
                              const float *rstd, void *d_x, float *sums_g, float *sums_gh, int threads) {
  Norm n = norm_of(x, type, channels_last, batch, channels, pixels, groups);
  const int64_t units = batch * n.chunks, table = batch * channels;
  std::vector<float> scratch(2 * units * channels + 3 * table + 2 * batch * groups);
  n.part_one = scratch.data();
  n.part_two = n.part_one + units * channels;
  float *gain = n.part_two + units * channels, *offset = gain + table, *inner = offset + table;
  float *mean_g = inner + table, *mean_gh = mean_g + batch * groups;
  coefficients(n, weight, bias, scale, shift, mean, rstd, gain, offset, inner);
  n.gain = gain;
  n.offset = offset;
  n.inner = inner;
  n.centre = mean;
  n.rstd = rstd;
  n.grad = grad;
  n.y = d_x;
  parallel_for(units, 2, threads, [&](int64_t b, int64_t e) { kernels().norm_grad_sums(n, b, e); });
  const int64_t per_group = channels / groups;
  for (int64_t image = 0; image < batch; ++image)
    for (int64_t g = 0; g < groups; ++g) {
      double all = 0.0, all_h = 0.0;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        double sum = 0.0, sum_h = 0.0;
        for (int64_t k = 0; k < n.chunks; ++k) {
          const int64_t at = (image * n.chunks + k) * channels + c;
          sum += n.part_one[at];
          sum_h += n.part_two[at];
        }
        const int64_t at = image * channels + c;
        sums_g[at] = static_cast<float>(sum);
        sums_gh[at] = static_cast<float>(sum_h);
        all += sum * inner[at];
        all_h += sum_h * inner[at];
      }
      const double count = static_cast<double>(per_group * pixels);
      mean_g[image * groups + g] = static_cast<float>(all / count);
      mean_gh[image * groups + g] = static_cast<float>(all_h / count);
    }
  n.mean_g = mean_g;
  n.mean_gh = mean_gh;
  parallel_for(units, 2, threads, [&](int64_t b, int64_t e) { kernels().norm_grad_apply(n, b, e); });
}

}  // namespace ddmd
