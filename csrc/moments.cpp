// Mean and sum of squared deviations over samples, and the merge of two states.
#include "kernels.h"
#include "simd.h"

namespace ddmd {
namespace {

// ---- moments over samples: two sweeps over a strip that stays in the nearest cache

// Mean and sum of squared deviations of each column of a strip, over the samples.
struct Strip {
  float mean[kStrip] = {}, square[kStrip] = {};
};

// `whole` strips have a length that the compiler knows.
template <bool whole, class T>
__attribute__((always_inline)) inline Strip strip_of(const T *x, int64_t samples, int64_t sample_stride,
                                                     int64_t length) {
  const int64_t n = whole ? kStrip : length;
  const float share = 1.0f / static_cast<float>(samples);
  Strip strip;
  for (int64_t s = 0; s < samples; ++s)
    for (int64_t i = 0; i < n; ++i) strip.mean[i] += upcast(x[s * sample_stride + i]);
  for (int64_t i = 0; i < n; ++i) strip.mean[i] *= share;
  for (int64_t s = 0; s < samples; ++s)
    for (int64_t i = 0; i < n; ++i) {
      const float d = upcast(x[s * sample_stride + i]) - strip.mean[i];
      strip.square[i] += d * d;
    }
  return strip;
}

template <bool whole, class T>
inline void strip_moments(const T *x, int64_t samples, int64_t sample_stride, int64_t length, float scale,
                          bool non_temporal, float *mean, float *m2) {
  const int64_t n = whole ? kStrip : length;
  Strip strip = strip_of<whole>(x, samples, sample_stride, length);
  for (int64_t i = 0; i < n; ++i) strip.square[i] *= scale;
  store(mean, strip.mean, n, non_temporal);
  store(m2, strip.square, n, non_temporal);
}

// Mean and M2 of `count` samples before, and the weights with which others are merged in (Chan et al.).
struct Weights {
  float share, cross;
  Weights(int64_t count, int64_t other_count) {
    const double total = static_cast<double>(count + other_count);
    share = static_cast<float>(other_count / total);
    cross = static_cast<float>(count * (other_count / total));
  }
};

// The strip's samples are merged into a running state; it is read and written once.
template <bool whole, class T>
inline void strip_update(const T *x, int64_t samples, int64_t sample_stride, int64_t length, const Weights &w,
                         float *mean, float *m2) {
  const int64_t n = whole ? kStrip : length;
  if (samples == 1) {
DDMD_IVDEP
    for (int64_t i = 0; i < n; ++i) {
      const float delta = upcast(x[i]) - mean[i];
      mean[i] += delta * w.share;
      m2[i] += delta * delta * w.cross;
    }
    return;
  }
  const Strip strip = strip_of<whole>(x, samples, sample_stride, length);
DDMD_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const float delta = strip.mean[i] - mean[i];
    mean[i] += delta * w.share;
    m2[i] += strip.square[i] + delta * delta * w.cross;
  }
}

}  // namespace

namespace DDMD_ISA {
void update(float *mean, float *m2, int64_t count, const void *x, DType type, int64_t samples, int64_t sample_stride,
            int64_t columns) {
  const Weights w(count, samples);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T *from = static_cast<const T *>(x);
    if (samples == 1) return strip_update<false>(from, 1, 0, columns, w, mean, m2);  // one loop over all of them
    for (int64_t i = 0; i < columns; i += kStrip) {
      if (columns - i >= kStrip)
        strip_update<true>(from + i, samples, sample_stride, kStrip, w, mean + i, m2 + i);
      else
        strip_update<false>(from + i, samples, sample_stride, columns - i, w, mean + i, m2 + i);
    }
  });
}

void moments(const void *x, DType type, int64_t samples, int64_t sample_stride, int64_t columns, float scale,
             bool non_temporal, float *mean, float *m2) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < columns; i += kStrip) {
      const T *from = static_cast<const T *>(x) + i;
      if (columns - i >= kStrip)
        strip_moments<true>(from, samples, sample_stride, kStrip, scale, non_temporal, mean + i, m2 + i);
      else
        strip_moments<false>(from, samples, sample_stride, columns - i, scale, non_temporal, mean + i, m2 + i);
    }
  });
  store_fence(non_temporal);
}

void moments_strided(const void *x, DType type, int64_t samples, int64_t sample_stride, int64_t step,
                     int64_t columns, float scale, float *mean, float *m2) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T *base = static_cast<const T *>(x);
    for (int64_t i = 0; i < columns; ++i) {
      float sum = 0.0f, square = 0.0f;
      const T *column = base + i * step;
      for (int64_t s = 0; s < samples; ++s) sum += upcast(column[s * sample_stride]);
      sum /= static_cast<float>(samples);
      for (int64_t s = 0; s < samples; ++s) {
        const float d = upcast(column[s * sample_stride]) - sum;
        square += d * d;
      }
      mean[i] = sum;
      m2[i] = square * scale;
    }
  });
}

void merge(float *mean, float *m2, int64_t count, const float *other_mean, const float *other_m2,
           int64_t other_count, int64_t begin, int64_t end) {
  const Weights w(count, other_count);
  for (int64_t i = begin; i < end; ++i) {
    const float delta = other_mean[i] - mean[i];
    mean[i] += delta * w.share;
    m2[i] += other_m2[i] + delta * delta * w.cross;
  }
}
}  // namespace DDMD_ISA

}  // namespace ddmd
