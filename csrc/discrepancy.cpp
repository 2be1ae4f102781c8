// X and Y of two ensembles of reconstructions.
#include "kernels.h"
#include "simd.h"

namespace ddmd {
namespace {

// ---- X and Y: every reconstruction comes from memory once, the second sweep from the nearest cache

constexpr int64_t kPixels = 2048;  // of a unit of work
struct Members {
  int64_t a, b, channels, member_stride, channel_stride;
};

template <bool whole, class T>
inline void discrepancy_strip(const T *a, const T *b, const Members &m, int64_t length, float *x, float *y) {
  const int64_t n = whole ? kStrip : length;
  const float share_a = 1.0f / m.a, share_b = 1.0f / m.b, share_c = 1.0f / m.channels;
  float sum_x[kStrip] = {}, sum_y[kStrip] = {};
  for (int64_t c = 0; c < m.channels; ++c, a += m.channel_stride, b += m.channel_stride) {
    float mu[kStrip] = {}, other[kStrip] = {};
    for (int64_t k = 0; k < m.a; ++k)
      for (int64_t i = 0; i < n; ++i) mu[i] += upcast(a[k * m.member_stride + i]);
    for (int64_t k = 0; k < m.b; ++k)
      for (int64_t i = 0; i < n; ++i) other[i] += upcast(b[k * m.member_stride + i]);
    for (int64_t i = 0; i < n; ++i) {
      mu[i] *= share_a;
      sum_x[i] += __builtin_fabsf(other[i] * share_b - mu[i]);
    }
    for (int64_t k = 0; k < m.a; ++k)
      for (int64_t i = 0; i < n; ++i) {
        const float d = upcast(a[k * m.member_stride + i]) - mu[i];
        sum_y[i] += d * d;
      }
  }
  for (int64_t i = 0; i < n; ++i) {
    x[i] = sum_x[i] * share_c;
    y[i] = __builtin_sqrtf(sum_y[i] * share_a * share_c);
  }
}

}  // namespace

namespace DDMD_ISA {
void discrepancy_maps(const void *a, const void *b, DType type, int64_t members_a, int64_t members_b, int64_t slices,
          int64_t channels, int64_t pixels, bool non_temporal, float *inter, float *intra, int64_t begin,
          int64_t end) {
  const int64_t tiles = (pixels + kPixels - 1) / kPixels;
  const Members m = {members_a, members_b, channels, slices * channels * pixels, pixels};
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    alignas(64) float x[kStrip], y[kStrip];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t z = unit / tiles, first = unit % tiles * kPixels;
      const int64_t last = pixels - first < kPixels ? pixels : first + kPixels;
      for (int64_t i = first; i < last; i += kStrip) {
        const int64_t n = last - i < kStrip ? last - i : kStrip;
        const T *pa = static_cast<const T *>(a) + z * channels * pixels + i;
        const T *pb = static_cast<const T *>(b) + z * channels * pixels + i;
        if (n == kStrip)
          discrepancy_strip<true>(pa, pb, m, n, x, y);
        else
          discrepancy_strip<false>(pa, pb, m, n, x, y);
        store(inter + z * pixels + i, x, n, non_temporal);
        store(intra + z * pixels + i, y, n, non_temporal);
      }
    }
  });
  store_fence(non_temporal);
}
}  // namespace DDMD_ISA

}  // namespace ddmd
