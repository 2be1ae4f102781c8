// Gradient of GroupNorm + SiLU for x, channels last or first; and the sums that the other gradients are made of.
#include "group_norm.h"

namespace ddmd {
namespace {

// What one channel needs: g = grad silu'(gain x + offset), and the centre that x is measured from.
struct Channel {
  float gain, offset, centre;
};

template <class T>
__attribute__((always_inline)) inline float silu_gradient(float grad, float x, float gain, float offset) {
  const float v = gain * x + offset, s = sigmoid<kExact<T>>(v);
  return grad * (s * (1.0f + v * (1.0f - s)));
}

// float32 keeps g where d x will be, so that the second pass has it: the sigmoid takes longer than that.
template <class T>
constexpr bool kKeeps = std::is_same_v<T, float>;

template <class T>
__attribute__((always_inline)) inline void add(const T *x, const T *grad, T *kept, int64_t i, float gain, float offset,
                                               float centre, float &sum, float &sum_x) {
  const float v = upcast(x[i]);
  const float g = silu_gradient<T>(upcast(grad[i]), v, gain, offset);
  if constexpr (kKeeps<T>) kept[i] = g;
  sum += g;
  sum_x += g * (v - centre);
}

#if defined(__AVX512F__)
constexpr int64_t kLane = 32;  // channels, or pixels of one, whose sums stay in registers
#else
constexpr int64_t kLane = 16;
#endif

// kLane channels over pixels `channels` elements apart.
template <class T>
inline void lane_sums(const T *x, const T *grad, T *kept, int64_t channels, int64_t pixels, const float *gain,
                      const float *offset, const float *centre, float *sum, float *sum_x) {
  float a[kLane], b[kLane], m[kLane], s[kLane] = {}, t[kLane] = {};
  for (int64_t j = 0; j < kLane; ++j) a[j] = gain[j], b[j] = offset[j], m[j] = centre[j];
  for (int64_t p = 0; p < pixels; ++p) {
    const T *x_p = x + p * channels, *grad_p = grad + p * channels;
    T *kept_p = kept + p * channels;
DDMD_IVDEP
    for (int64_t j = 0; j < kLane; ++j) add(x_p, grad_p, kept_p, j, a[j], b[j], m[j], s[j], t[j]);
  }
  for (int64_t j = 0; j < kLane; ++j) sum[j] = s[j], sum_x[j] = t[j];
}

// Pixels of one channel beside each other.
template <class T>
inline void run_sums(const T *x, const T *grad, T *kept, int64_t pixels, const Channel &c, float *sum, float *sum_x) {
  float s[kLane] = {}, t[kLane] = {};
  const int64_t whole = pixels / kLane * kLane;
  for (int64_t p = 0; p < whole; p += kLane) {
DDMD_IVDEP
    for (int64_t j = 0; j < kLane; ++j) add(x + p, grad + p, kept + p, j, c.gain, c.offset, c.centre, s[j], t[j]);
  }
  for (int64_t p = whole; p < pixels; ++p)
    add(x, grad, kept, p, c.gain, c.offset, c.centre, s[p - whole], t[p - whole]);
  *sum = 0.0f, *sum_x = 0.0f;
  for (int64_t j = 0; j < kLane; ++j) *sum += s[j], *sum_x += t[j];
}

}  // namespace

namespace DDMD_ISA {
void norm_grad_sums(const Norm &n, int64_t begin, int64_t end) {
  const int64_t channels = n.channels;
  with_type(n.type, [&](auto zero) {
    using T = decltype(zero);
    for_each_chunk(n, begin, end, [&](int64_t image, int64_t unit, int64_t first, int64_t count) {
      const float *gain = n.gain + image * channels, *offset = n.offset + image * channels;
      const float *centre = n.centre + image * channels;
      float *sum = n.part_one + unit * channels, *sum_x = n.part_two + unit * channels;
      const T *x = static_cast<const T *>(n.x), *grad = static_cast<const T *>(n.grad);
      T *kept = static_cast<T *>(n.y);
      if (!n.channels_last) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t at = (image * channels + c) * n.pixels + first;
          run_sums(x + at, grad + at, kept + at, count, Channel{gain[c], offset[c], centre[c]}, sum + c, sum_x + c);
        }
        return;
      }
      if (channels % kLane == 0) {
        const int64_t at = (image * n.pixels + first) * channels;
        for (int64_t c = 0; c < channels; c += kLane)
          lane_sums(x + at + c, grad + at + c, kept + at + c, channels, count, gain + c, offset + c, centre + c,
                    sum + c, sum_x + c);
        return;
      }
      const Repeated gains(gain, n), offsets(offset, n), centres(centre, n);
      const int64_t row = channels * pixels_per_row(n);
      alignas(64) float sums[kChannels], sums_x[kChannels];
      for (int64_t i = 0; i < row; ++i) sums[i] = 0.0f, sums_x[i] = 0.0f;
      for_each_run(n, image, first, count, [&](int64_t at, int64_t length, int64_t) {
DDMD_IVDEP
        for (int64_t i = 0; i < length; ++i)
          add(x + at, grad + at, kept + at, i, gains.value[i], offsets.value[i], centres.value[i], sums[i], sums_x[i]);
      });
      for (int64_t c = 0; c < channels; ++c) {
        float total = 0.0f, total_x = 0.0f;
        for (int64_t i = c; i < row; i += channels) total += sums[i], total_x += sums_x[i];
        sum[c] = total;
        sum_x[c] = total_x;
      }
    });
  });
}

void norm_grad_apply(const Norm &n, int64_t begin, int64_t end) {
  const int64_t channels = n.channels;
  with_type(n.type, [&](auto zero) {
    using T = decltype(zero);
    for_each_chunk(n, begin, end, [&](int64_t image, int64_t, int64_t first, int64_t count) {
      const float *of[5] = {n.gain, n.offset, n.centre, n.base, n.tilt};
      for (const float *&table : of) table += image * channels;
      const Repeated gains(of[0], n), offsets(of[1], n), centres(of[2], n), bases(of[3], n), tilts(of[4], n);
      for_each_run(n, image, first, count, [&](int64_t at, int64_t length, int64_t c) {
        const T *x = static_cast<const T *>(n.x) + at, *grad = static_cast<const T *>(n.grad) + at;
        T *d_x = static_cast<T *>(n.y) + at;
        const auto apply = [&](int64_t i, float gain, float offset, float centre, float base, float tilt) {
          const float v = upcast(x[i]);
          float g;
          if constexpr (kKeeps<T>)
            g = d_x[i];
          else
            g = silu_gradient<T>(upcast(grad[i]), v, gain, offset);
          d_x[i] = downcast<T>(gain * g + (base + tilt * (v - centre)));
        };
        if (c < 0) {
DDMD_IVDEP
          for (int64_t i = 0; i < length; ++i)
            apply(i, gains.value[i], offsets.value[i], centres.value[i], bases.value[i], tilts.value[i]);
        } else {
          const float gain = of[0][c], offset = of[1][c], centre = of[2][c], base = of[3][c], tilt = of[4][c];
DDMD_IVDEP
          for (int64_t i = 0; i < length; ++i) apply(i, gain, offset, centre, base, tilt);
        }
      });
    });
  });
}
}  // namespace DDMD_ISA

}  // namespace ddmd
