// GroupNorm + SiLU, whole: how pixels are cut over threads, and the statistics between its two passes.
#include <algorithm>
#include <cmath>
#include <memory>

#include "ddmd.h"
#include "parallel.h"

namespace ddmd {

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

// gain and offset of y = silu(gain x + offset), each (N, C), of one image
void coefficients(const Norm &n, int64_t image, const float *weight, const float *bias, const float *scale,
                  const float *shift, const float *mean, const float *rstd, float *gain, float *offset) {
  const int64_t per_group = n.channels / n.groups;
  for (int64_t c = 0, i = image * n.channels; c < n.channels; ++c, ++i) {
    const int64_t g = image * n.groups + c / per_group;
    const float factor = scale ? 1.0f + scale[i] : 1.0f;
    gain[i] = rstd[g] * (weight[c] * factor);
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
  const std::unique_ptr<float[]> scratch(new float[2 * units * channels + 2 * table + 2 * batch * groups]);
  n.part_one = scratch.get();
  n.part_two = n.part_one + units * channels;
  float *gain = n.part_two + units * channels, *offset = gain + table;
  if (mean == nullptr) mean = offset + table;
  if (rstd == nullptr) rstd = offset + table + batch * groups;
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
    coefficients(n, image, weight, bias, scale, shift, mean, rstd, gain, offset);
  };
  in_two_passes(
      n, threads, [&](int64_t b, int64_t e) { kernels().norm_moments(n, b, e); }, statistics,
      [&](int64_t b, int64_t e) { kernels().norm_apply(n, b, e); });
}

// With h = (x - mean) rstd, g = grad silu'(y) and d h = g weight (1 + scale), as `reference.group_norm_silu_backward`
// has it: d x = rstd (d h - mean(d h) - h mean(d h h)) over each group = gain g + base + tilt (x - mean).
void group_norm_silu_backward(const void *grad, const void *x, DType type, bool channels_last, int64_t batch,
                              int64_t channels, int64_t pixels, int64_t groups, const float *weight,
                              const float *bias, const float *scale, const float *shift, const float *mean,
                              const float *rstd, void *d_x, float *d_weight, float *d_bias, float *d_scale,
                              float *d_shift, int threads) {
  Norm n = norm_of(x, type, channels_last, batch, channels, pixels, groups);
  const int64_t units = batch * n.chunks, table = batch * channels;
  const std::unique_ptr<float[]> scratch(new float[2 * units * channels + 5 * table]);
  n.part_one = scratch.get();
  n.part_two = n.part_one + units * channels;
  float *gain = n.part_two + units * channels, *offset = gain + table, *centre = offset + table;
  float *base = centre + table, *tilt = base + table;
  const int64_t per_group = channels / groups;
  for (int64_t image = 0; image < batch; ++image) {
    coefficients(n, image, weight, bias, scale, shift, mean, rstd, gain, offset);
    for (int64_t c = 0; c < channels; ++c) centre[image * channels + c] = mean[image * groups + c / per_group];
  }
  n.gain = gain;
  n.offset = offset;
  n.centre = centre;
  n.base = base;
  n.tilt = tilt;
  n.grad = grad;
  n.y = d_x;
  const std::unique_ptr<double[]> sums(new double[2 * table]);
  double *sums_g = sums.get(), *sums_gh = sums_g + table;  // of g and g h over the pixels, (N, C)
  const auto between = [&](int64_t image) {
    for (int64_t g = 0; g < groups; ++g) {
      const double r = rstd[image * groups + g];
      double all = 0.0, all_h = 0.0;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        double sum = 0.0, sum_x = 0.0;
        for (int64_t k = 0; k < n.chunks; ++k) {
          const int64_t at = (image * n.chunks + k) * channels + c;
          sum += n.part_one[at];
          sum_x += n.part_two[at];
        }
        const int64_t at = image * channels + c;
        const double inner = static_cast<double>(weight[c]) * (scale ? 1.0 + scale[at] : 1.0);
        sums_g[at] = sum;
        sums_gh[at] = sum_x * r;
        all += sum * inner;
        all_h += sums_gh[at] * inner;
      }
      const double count = static_cast<double>(per_group * pixels);
      for (int64_t at = image * channels + g * per_group; at < image * channels + (g + 1) * per_group; ++at) {
        base[at] = static_cast<float>(-r * (all / count));
        tilt[at] = static_cast<float>(-r * r * (all_h / count));
      }
    }
  };
  in_two_passes(
      n, threads, [&](int64_t b, int64_t e) { kernels().norm_grad_sums(n, b, e); }, between,
      [&](int64_t b, int64_t e) { kernels().norm_grad_apply(n, b, e); });
  for (int64_t c = 0; c < channels; ++c) {
    double of_weight = 0.0, of_bias = 0.0;
    for (int64_t at = c; at < table; at += channels) {
      const double factor = scale ? 1.0 + scale[at] : 1.0;
      of_weight += sums_gh[at] * factor;
      of_bias += sums_g[at] * factor;
      d_scale[at] = static_cast<float>(sums_gh[at] * weight[c] + sums_g[at] * bias[c]);
      d_shift[at] = static_cast<float>(sums_g[at]);
    }
    d_weight[c] = static_cast<float>(of_weight);
    d_bias[c] = static_cast<float>(of_bias);
  }
}

}  // namespace ddmd
