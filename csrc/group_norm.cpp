// GroupNorm + SiLU, channels last or first.
#include "group_norm.h"

namespace ddmd {
namespace {

// Mean and M2 of kLane channels over pixels `channels` elements apart; the sums stay in registers.
constexpr int64_t kLane = 32;

template <class T>
inline void lane_moments(const T *x, int64_t channels, int64_t pixels, float share, float *mean, float *m2) {
  float pivot[kLane], sum[kLane] = {}, square[kLane] = {};
  for (int64_t j = 0; j < kLane; ++j) pivot[j] = upcast(x[j]);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t j = 0; j < kLane; ++j) {
      const float d = upcast(x[p * channels + j]) - pivot[j];
      sum[j] += d;
      square[j] += d * d;
    }
  for (int64_t j = 0; j < kLane; ++j) {
    mean[j] = pivot[j] + sum[j] * share;
    m2[j] = square[j] - sum[j] * sum[j] * share;
  }
}

}  // namespace

namespace DDMD_ISA {
// Mean and M2 of each channel in a chunk, by sums about the chunk's first pixel.
void norm_moments(const Norm &n, int64_t begin, int64_t end) {
  const int64_t channels = n.channels;
  with_type(n.type, [&](auto zero) {
    using T = decltype(zero);
    for_each_chunk(n, begin, end, [&](int64_t image, int64_t unit, int64_t first, int64_t count) {
      float *mean = n.part_one + unit * channels, *m2 = n.part_two + unit * channels;
      const float share = 1.0f / count;
      if (n.channels_last) {
        const T *x = static_cast<const T *>(n.x) + (image * n.pixels + first) * channels;
        const int64_t step = pixels_per_row(n), row = step * channels;
        if (channels % kLane == 0) {
          for (int64_t c = 0; c < channels; c += kLane) lane_moments(x + c, channels, count, share, mean + c, m2 + c);
          return;
        }
        alignas(64) float pivot[kChannels], sum[kChannels], square[kChannels];
        for (int64_t i = 0; i < row; i += channels)
          for (int64_t c = 0; c < channels; ++c) pivot[i + c] = upcast(x[c]);
        for (int64_t i = 0; i < row; ++i) sum[i] = 0.0f, square[i] = 0.0f;
        for (int64_t p = 0; p < count; p += step) {
          const T *pixels = x + p * channels;
          const int64_t length = channels * (count - p < step ? count - p : step);
DDMD_IVDEP
          for (int64_t i = 0; i < length; ++i) {
            const float d = upcast(pixels[i]) - pivot[i];
            sum[i] += d;
            square[i] += d * d;
          }
        }
        for (int64_t c = 0; c < channels; ++c) {
          float total = 0.0f, squares = 0.0f;
          for (int64_t i = c; i < row; i += channels) total += sum[i], squares += square[i];
          mean[c] = pivot[c] + total * share;
          m2[c] = squares - total * total * share;
        }
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          const T *x = static_cast<const T *>(n.x) + (image * channels + c) * n.pixels + first;
          const float pivot = upcast(x[0]);
          float lanes[16] = {}, squares[16] = {};
          const int64_t whole = count / 16 * 16;
          for (int64_t p = 0; p < whole; p += 16)
            for (int j = 0; j < 16; ++j) {
              const float d = upcast(x[p + j]) - pivot;
              lanes[j] += d;
              squares[j] += d * d;
            }
          for (int64_t p = whole; p < count; ++p) {
            const float d = upcast(x[p]) - pivot;
            lanes[p - whole] += d;
            squares[p - whole] += d * d;
          }
          float sum = 0.0f, square = 0.0f;
          for (int j = 0; j < 16; ++j) sum += lanes[j], square += squares[j];
          mean[c] = pivot + sum * share;
          m2[c] = square - sum * sum * share;
        }
      }
    });
  });
}
}  // namespace DDMD_ISA

namespace {

// One row of silu(gain x + offset) + residual, channels last; residual may be null.
template <class T>
inline void apply_row(const T *x, const T *residual, T *y, const float *gain, const float *offset, int64_t length) {
  if (residual != nullptr) {
DDMD_IVDEP
    for (int64_t i = 0; i < length; ++i) {
      const float v = gain[i] * upcast(x[i]) + offset[i];
      y[i] = downcast_computed<T>(v * sigmoid<kExact<T>>(v) + upcast(residual[i]));
    }
  } else {
DDMD_IVDEP
    for (int64_t i = 0; i < length; ++i) {
      const float v = gain[i] * upcast(x[i]) + offset[i];
      y[i] = downcast_computed<T>(v * sigmoid<kExact<T>>(v));
    }
  }
}

#if defined(__AVX512F__)
// bfloat16 by the instructions made for it: 2^t = 2^floor(t) p(t - floor(t)) and a reciprocal to 14 bits,
// together off by at most 2e-4 of the result.
inline __m512 silu(__m512 v) {
  const __m512 t = v * _mm512_set1_ps(-1.44269504f);
  const __m512 r = _mm512_reduce_ps(t, 0x09);  // t - floor(t)
  __m512 p = _mm512_set1_ps(7.8023694e-2f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.26066759e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9583454e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.99925024e-1f));
  return v * _mm512_rcp14_ps(_mm512_set1_ps(1.0f) + _mm512_scalef_ps(p, t));
}

inline __m512 load_bf16(const BFloat16 *from, __mmask16 which) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, from)), 16));
}

inline void store_bf16(BFloat16 *to, __m512 x, __mmask16 which) {
#if defined(__AVX512BF16__)
  _mm256_mask_storeu_epi16(to, which, (__m256i)_mm512_cvtneps_pbh(x));
#else
  const __m512i u = _mm512_castps_si512(x);  // as downcast_computed
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  _mm256_mask_storeu_epi16(to, which, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}

template <>
inline void apply_row<BFloat16>(const BFloat16 *x, const BFloat16 *residual, BFloat16 *y, const float *gain,
                                const float *offset, int64_t length) {
  for (int64_t i = 0; i < length; i += 16) {
    const __mmask16 which = length - i < 16 ? static_cast<__mmask16>((1u << (length - i)) - 1) : 0xffff;
    const __m512 g = _mm512_maskz_loadu_ps(which, gain + i), o = _mm512_maskz_loadu_ps(which, offset + i);
    __m512 v = silu(_mm512_fmadd_ps(g, load_bf16(x + i, which), o));
    if (residual != nullptr) v = v + load_bf16(residual + i, which);
    store_bf16(y + i, v, which);
  }
}
#endif

}  // namespace

namespace DDMD_ISA {
void norm_apply(const Norm &n, int64_t begin, int64_t end) {
  with_type(n.type, [&](auto zero) {
    using T = decltype(zero);
    for_each_chunk(n, begin, end, [&](int64_t image, int64_t, int64_t first, int64_t count) {
      const Repeated gains(n.gain + image * n.channels, n), offsets(n.offset + image * n.channels, n);
      const float *gain = gains.value, *offset = offsets.value;
      for_each_run(n, image, first, count, [&](int64_t at, int64_t length, int64_t c) {
        const T *x = static_cast<const T *>(n.x) + at;
        const T *residual = static_cast<const T *>(n.residual) + (n.residual ? at : 0);
        T *y = static_cast<T *>(n.y) + at;
        if (c < 0) {
          apply_row(x, n.residual ? residual : nullptr, y, gain, offset, length);
        } else {
          const float a = gain[c], b = offset[c];
          const bool add = n.residual != nullptr;
DDMD_IVDEP
          for (int64_t i = 0; i < length; ++i) {
            const float v = a * upcast(x[i]) + b;
            y[i] = downcast_computed<T>(v * sigmoid<kExact<T>>(v) + (add ? upcast(residual[i]) : 0.0f));
          }
        }
      });
    });
  });
}
}  // namespace DDMD_ISA

}  // namespace ddmd
