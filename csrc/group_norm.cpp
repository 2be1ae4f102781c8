// GroupNorm + SiLU, forward and backward, channels last or first.
#include "kernels.h"
#include "simd.h"

namespace ddmd {
namespace {

// ---- GroupNorm + SiLU

constexpr int64_t kChannels = 4096;  // most channels, so that scratch needs no allocation

// Calls one(n, chunk, first pixel, pixels) for chunks [begin, end) of all images.
template <class One>
inline void for_each_chunk(const Norm &n, int64_t begin, int64_t end, One one) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / n.chunks, first = unit % n.chunks * n.chunk;
    one(image, unit, first, n.pixels - first < n.chunk ? n.pixels - first : n.chunk);
  }
}

// Channels last: a row is several pixels, so that the innermost loop is long however few the channels;
// what belongs to a channel is repeated for each of them.
constexpr int64_t kRow = 512;  // elements of a row, about

inline int64_t pixels_per_row(const Norm &n) { return n.channels_last && n.channels < kRow ? kRow / n.channels : 1; }

struct Repeated {
  alignas(64) float value[kChannels];
  Repeated(const float *of_channel, const Norm &n) {
    const int64_t pixels = pixels_per_row(n);
    for (int64_t p = 0; p < pixels; ++p) std::memcpy(value + p * n.channels, of_channel, n.channels * sizeof(float));
  }
};

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

// Mean and M2 of each channel in a chunk, by sums about the chunk's first pixel.
}  // namespace

namespace DDMD_ISA {
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
        for (int64_t i = 0; i < row; ++i) pivot[i] = upcast(x[i % channels]), sum[i] = 0.0f, square[i] = 0.0f;
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

// Calls row(x index, count, channel or -1): a run of pixels of one channel, or of channels of some pixels.
template <class Row>
inline void for_each_run(const Norm &n, int64_t image, int64_t first, int64_t count, Row row) {
  const int64_t step = pixels_per_row(n);
  if (n.channels_last)
    for (int64_t p = 0; p < count; p += step)
      row((image * n.pixels + first + p) * n.channels, n.channels * (count - p < step ? count - p : step), int64_t{-1});
  else
    for (int64_t c = 0; c < n.channels; ++c) row((image * n.channels + c) * n.pixels + first, count, c);
}

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

namespace {

template <class T>
inline float silu_slope(float v) {
  const float s = sigmoid<kExact<T>>(v);
  return s * (1.0f + v * (1.0f - s));
}

// The normalised x as a multiple and an offset of x, a channel at a time, of one image.
inline void normalisation(const Norm &n, int64_t image, float *multiple, float *offset) {
  const int64_t per_group = n.channels / n.groups;
  for (int64_t c = 0; c < n.channels; ++c) {
    const int64_t g = image * n.groups + c / per_group;
    multiple[c] = n.rstd[g];
    offset[c] = -n.centre[g] * n.rstd[g];
  }
}

}  // namespace

namespace DDMD_ISA {
void norm_grad_sums(const Norm &n, int64_t begin, int64_t end) {
  with_type(n.type, [&](auto zero) {
    using T = decltype(zero);
    float multiple[kChannels], centre[kChannels];
    for_each_chunk(n, begin, end, [&](int64_t image, int64_t unit, int64_t first, int64_t count) {
      normalisation(n, image, multiple, centre);
      const Repeated gains(n.gain + image * n.channels, n), offsets(n.offset + image * n.channels, n);
      const Repeated multiples(multiple, n), centres(centre, n);
      const float *gain = gains.value, *offset = offsets.value, *by = multiples.value, *to = centres.value;
      const int64_t row = n.channels * pixels_per_row(n);
      alignas(64) float sum[kChannels], sum_h[kChannels];
      for (int64_t i = 0; i < row; ++i) sum[i] = 0.0f, sum_h[i] = 0.0f;
      for_each_run(n, image, first, count, [&](int64_t at, int64_t length, int64_t c) {
        const T *x = static_cast<const T *>(n.x) + at, *grad = static_cast<const T *>(n.grad) + at;
        if (c < 0) {
DDMD_IVDEP
          for (int64_t i = 0; i < length; ++i) {
            const float v = upcast(x[i]);
            const float g = upcast(grad[i]) * silu_slope<T>(gain[i] * v + offset[i]);
            sum[i] += g;
            sum_h[i] += g * (v * by[i] + to[i]);
          }
        } else {
          float lanes[16] = {}, lanes_h[16] = {};
          for (int64_t p = 0; p < length; p += 16) {
            const int64_t run = length - p < 16 ? length - p : 16;
            for (int64_t j = 0; j < run; ++j) {
              const float v = upcast(x[p + j]);
              const float g = upcast(grad[p + j]) * silu_slope<T>(gain[c] * v + offset[c]);
              lanes[j] += g;
              lanes_h[j] += g * (v * multiple[c] + centre[c]);
            }
          }
          for (int j = 0; j < 16; ++j) sum[c] += lanes[j], sum_h[c] += lanes_h[j];
        }
      });
      for (int64_t c = 0; c < n.channels; ++c) {
        float total = 0.0f, total_h = 0.0f;
        for (int64_t i = c; i < row; i += n.channels) total += sum[i], total_h += sum_h[i];
        n.part_one[unit * n.channels + c] = total;
        n.part_two[unit * n.channels + c] = total_h;
      }
    });
  });
}

void norm_grad_apply(const Norm &n, int64_t begin, int64_t end) {
  const int64_t per_group = n.channels / n.groups;
  with_type(n.type, [&](auto zero) {
    using T = decltype(zero);
    float own_multiple[kChannels], own_centre[kChannels], own_g[kChannels], own_gh[kChannels];
    for_each_chunk(n, begin, end, [&](int64_t image, int64_t, int64_t first, int64_t count) {
      normalisation(n, image, own_multiple, own_centre);
      for (int64_t c = 0; c < n.channels; ++c) {
        own_g[c] = n.mean_g[image * n.groups + c / per_group];
        own_gh[c] = n.mean_gh[image * n.groups + c / per_group];
      }
      const Repeated gains(n.gain + image * n.channels, n), offsets(n.offset + image * n.channels, n);
      const Repeated inners(n.inner + image * n.channels, n), multiples(own_multiple, n), centres(own_centre, n);
      const Repeated means(own_g, n), means_h(own_gh, n);
      const float *gain = gains.value, *offset = offsets.value, *inner = inners.value, *multiple = multiples.value;
      const float *centre = centres.value, *mean_g = means.value, *mean_gh = means_h.value;
      for_each_run(n, image, first, count, [&](int64_t at, int64_t length, int64_t c) {
        const T *x = static_cast<const T *>(n.x) + at, *grad = static_cast<const T *>(n.grad) + at;
        T *d_x = static_cast<T *>(n.y) + at;
        if (c < 0) {
DDMD_IVDEP
          for (int64_t i = 0; i < length; ++i) {
            const float v = upcast(x[i]), h = v * multiple[i] + centre[i];
            const float g = upcast(grad[i]) * silu_slope<T>(gain[i] * v + offset[i]);
            d_x[i] = downcast<T>(multiple[i] * (g * inner[i] - mean_g[i] - h * mean_gh[i]));
          }
        } else {
          const float a = gain[c], b = offset[c], r = multiple[c], o = centre[c], w = inner[c];
          const float m = mean_g[c], mh = mean_gh[c];
DDMD_IVDEP
          for (int64_t i = 0; i < length; ++i) {
            const float v = upcast(x[i]), h = v * r + o;
            const float g = upcast(grad[i]) * silu_slope<T>(a * v + b);
            d_x[i] = downcast<T>(r * (g * w - m - h * mh));
          }
        }
      });
    });
  });
}
}  // namespace DDMD_ISA

}  // namespace ddmd
