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
extern const Kernels kernels_avx512bf16;
#endif

namespace {

size_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }
const char *offset_by(const void *x, DType type, int64_t elements) {
  return static_cast<const char *>(x) + elements * static_cast<int64_t>(size_of(type));
}

std::vector<const Kernels *> available_sets() {
  std::vector<const Kernels *> found;
#ifdef DDMD_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_avx512bf16);
    found.push_back(&kernels_avx512);
  }
  // every CPU with AVX2 has F16C, too, by which name older clangs do not know it
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
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

}  // namespace

const Kernels *kernel_set(int index) {
  static const std::vector<const Kernels *> found = available_sets();
  return index < static_cast<int>(found.size()) ? found[index] : nullptr;
}

const Kernels &kernels() {
  static const Kernels &best = *kernel_set(0);
  return best;
}

namespace {

// Results of more bytes than this are not in a core's cache any more when somebody reads them.
constexpr int64_t kCacheBytes = 4 << 20;

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
  parallel_for(slices * ((pixels + 2047) / 2048), 16, threads, [&](int64_t begin, int64_t end) {
    kernels().discrepancy_maps(a, b, type, members_a, members_b, slices, channels, pixels, slices * pixels * 8 > kCacheBytes, inter,
                   intra, begin, end);
  });
}

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

// gain and offset of y = silu(gain x + offset), and inner = weight (1 + scale), each (N, C), of one image
void coefficients(const Norm &n, int64_t image, const float *weight, const float *bias, const float *scale,
                  const float *shift, const float *mean, const float *rstd, float *gain, float *offset,
                  float *inner) {
  const int64_t per_group = n.channels / n.groups;
  for (int64_t i = image * n.channels; i < (image + 1) * n.channels; ++i) {
    const int64_t c = i % n.channels, g = i / n.channels * n.groups + c / per_group;
    const float factor = scale ? 1.0f + scale[i] : 1.0f;
    inner[i] = weight[c] * factor;
    gain[i] = rstd[g] * inner[i];
    offset[i] = bias[c] * factor - mean[g] * gain[i] + (shift ? shift[i] : 0.0f);
  }
}

// first(begin, end) over all chunks, then between(image), then second(begin, end): image by image where there
// are enough of them, so that the second pass finds the image in the cache, or else pass by pass. What
// comes out is the same: a chunk's sums do not depend on which.
template <class First, class Between, class Second>
void in_two_passes(const Norm &n, int threads, First first, Between between, Second second) {
  if (n.batch >= threads) {
    parallel_for(n.batch, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        first(image * n.chunks, (image + 1) * n.chunks);
        between(image);
        second(image * n.chunks, (image + 1) * n.chunks);
      }
    });
    return;
  }
  parallel_for(n.batch * n.chunks, 2, threads, first);
  for (int64_t image = 0; image < n.batch; ++image) between(image);
  parallel_for(n.batch * n.chunks, 2, threads, second);
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
  float *gain = n.part_two + units * channels, *offset = gain + table;
  n.gain = gain;
  n.offset = offset;
  n.residual = residual;
  n.y = y;
  const int64_t per_group = channels / groups;
  const auto statistics = [&](int64_t image) {
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
    coefficients(n, image, weight, bias, scale, shift, mean, rstd, gain, offset, offset + table);
  };
  in_two_passes(
      n, threads, [&](int64_t b, int64_t e) { kernels().norm_moments(n, b, e); }, statistics,
      [&](int64_t b, int64_t e) { kernels().norm_apply(n, b, e); });
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
  for (int64_t image = 0; image < batch; ++image)
    coefficients(n, image, weight, bias, scale, shift, mean, rstd, gain, offset, inner);
  n.gain = gain;
  n.offset = offset;
  n.inner = inner;
  n.centre = mean;
  n.rstd = rstd;
  n.grad = grad;
  n.y = d_x;
  n.mean_g = mean_g;
  n.mean_gh = mean_gh;
  const int64_t per_group = channels / groups;
  const auto sums = [&](int64_t image) {
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
  };
  in_two_passes(
      n, threads, [&](int64_t b, int64_t e) { kernels().norm_grad_sums(n, b, e); }, sums,
      [&](int64_t b, int64_t e) { kernels().norm_grad_apply(n, b, e); });
}

}  // namespace ddmd
