// The loops themselves. This file is compiled once for each instruction set (DDMD_ISA names it); the
// loops are written so that the compiler vectorises them, and call nothing outside this file.
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ddmd.h"

#define DDMD_STRING_(x) #x
#define DDMD_STRING(x) DDMD_STRING_(x)
#define DDMD_CONCAT_(a, b) a##b
#define DDMD_CONCAT(a, b) DDMD_CONCAT_(a, b)

namespace ddmd {
namespace {

template <class To, class From>
inline To bits(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  uint16_t value;
};
inline float wide(float x) { return x; }
inline float wide(BFloat16 x) { return bits<float>(uint32_t{x.value} << 16); }
inline float wide(_Float16 x) { return static_cast<float>(x); }
template <class T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline _Float16 narrow<_Float16>(float x) {
  return static_cast<_Float16>(x);
}
// To nearest, ties to even, of anything but a NaN with bits in its lower half. Of those that arithmetic
// makes from 16-bit values and the usual NaN there is none.
template <class T>
inline T narrow_computed(float x) {
  return narrow<T>(x);
}
template <>
inline BFloat16 narrow_computed<BFloat16>(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40u;
  return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

template <class Call>
inline void with_type(DType type, Call call) {
  switch (type) {
    case DType::f32: return call(float{});
    case DType::bf16: return call(BFloat16{});
    case DType::f16: return call(_Float16{});
  }
}

// ---- elementary functions, float32, branch-free (Cephes coefficients)

// In this form one maximum and one minimum; NaN stays NaN.
inline float clamp(float x, float low, float high) {
  x = low > x ? low : x;
  return high < x ? high : x;
}

// 1 / (1 + exp(-x)), without a division: it takes longer than all the rest. `exact` to a few units in
// the last place of float32, or else to 3e-4, which is less than bfloat16 tells apart. Of a NaN it
// may be any number: the product with the NaN is one all the same.
template <bool exact>
inline float sigmoid(float x) {
  float t = -1.44269504f * x;
  t = clamp(t, -115.0f, 115.0f);
  const float shifted = t + 12582912.0f;  // 1.5 * 2^23: the integer nearest to t stands in the low bits
  const float r = t - (shifted - 12582912.0f);
  float p;  // 2^r, r in [-1/2, 1/2]
  if (exact) {
    p = 1.535336188e-4f;
    p = p * r + 1.339887440e-3f;
    p = p * r + 9.618437357e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472028e-1f;
  } else {
    p = 9.59024e-3f;
    p = p * r + 5.587024e-2f;
    p = p * r + 2.4023677e-1f;
    p = p * r + 6.9312805e-1f;
  }
  p = p * r + 1.0f;
  const float d = 1.0f + bits<float>(bits<uint32_t>(p) + (bits<uint32_t>(shifted) << 23));
  float y = bits<float>(0x7ef311c7u - bits<uint32_t>(d));  // 1 / d to an eighth, then Newton
  y = y * (2.0f - d * y);
  y = y * (2.0f - d * y);
  if (exact) y = y * (2.0f - d * y);
  return y;
}

template <class T>
constexpr bool kExact = !__is_same(T, BFloat16);

// natural logarithm of a normal positive number
inline float log_(float x) {
  const uint32_t u = bits<uint32_t>(x);
  int32_t e = static_cast<int32_t>(u >> 23) - 126;
  float m = bits<float>((u & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  const bool low = m < 0.707106781f;
  e = low ? e - 1 : e;
  m = low ? m + m - 1.0f : m - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z;
  const float k = static_cast<float>(e);
  return m + (p - 2.12194440e-4f * k - 0.5f * z) + 0.693359375f * k;
}

// cosine and sine of 2 pi v, v in [0, 1)
inline void turn(float v, float *cosine, float *sine) {
  const int32_t q = static_cast<int32_t>(4.0f * v + 0.5f);
  const float a = (v - 0.25f * static_cast<float>(q)) * 6.28318530717958647f;  // [-pi/4, pi/4]
  const float z = a * a;
  float s = -1.9515295891e-4f;
  s = s * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * a + a;
  float c = 2.443315711809948e-5f;
  c = c * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  const bool swap = q & 1;
  const float x = swap ? s : c, y = swap ? c : s;
  *cosine = (q + 1) & 2 ? -x : x;
  *sine = q & 2 ? -y : y;
}

// ---- results that nobody reads soon: written past the caches, which saves reading what they replace

#if defined(__AVX512F__)
constexpr int64_t kVector = 16;
inline void stream(float *to, const float *from) { _mm512_stream_ps(to, _mm512_loadu_ps(from)); }
#elif defined(__AVX__)
constexpr int64_t kVector = 8;
inline void stream(float *to, const float *from) { _mm256_stream_ps(to, _mm256_loadu_ps(from)); }
#elif defined(__x86_64__)
constexpr int64_t kVector = 4;
inline void stream(float *to, const float *from) { _mm_stream_ps(to, _mm_loadu_ps(from)); }
#else
constexpr int64_t kVector = 1;
inline void stream(float *to, const float *from) { *to = *from; }
#endif

inline void put(float *to, const float *from, int64_t n, bool past_caches) {
  int64_t i = 0;
  if (past_caches) {
    for (; i < n && reinterpret_cast<uintptr_t>(to + i) % (kVector * sizeof(float)); ++i) to[i] = from[i];
    for (; i + kVector <= n; i += kVector) stream(to + i, from + i);
  }
  std::memcpy(to + i, from + i, (n - i) * sizeof(float));
}

// Streamed results become visible to other threads.
inline void settle(bool past_caches) {
#if defined(__x86_64__)
  if (past_caches) _mm_sfence();
#endif
}

// ---- moments over samples: two sweeps over a strip that stays in the nearest cache

constexpr int64_t kStrip = 64;  // elements whose sums stay in registers

// `whole` strips have a length that the compiler knows.
template <bool whole, class T>
inline void strip_moments(const T *x, int64_t samples, int64_t sample_stride, int64_t length, float scale,
                          bool past_caches, float *mean, float *m2) {
  const int64_t n = whole ? kStrip : length;
  const float share = 1.0f / static_cast<float>(samples);
  float sum[kStrip] = {}, square[kStrip] = {};
  for (int64_t s = 0; s < samples; ++s)
    for (int64_t i = 0; i < n; ++i) sum[i] += wide(x[s * sample_stride + i]);
  for (int64_t i = 0; i < n; ++i) sum[i] *= share;
  for (int64_t s = 0; s < samples; ++s)
    for (int64_t i = 0; i < n; ++i) {
      const float d = wide(x[s * sample_stride + i]) - sum[i];
      square[i] += d * d;
    }
  for (int64_t i = 0; i < n; ++i) square[i] *= scale;
  put(mean, sum, n, past_caches);
  put(m2, square, n, past_caches);
}

void moments(const void *x, DType type, int64_t samples, int64_t sample_stride, int64_t columns, float scale,
             bool past_caches, float *mean, float *m2) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < columns; i += kStrip) {
      const T *from = static_cast<const T *>(x) + i;
      if (columns - i >= kStrip)
        strip_moments<true>(from, samples, sample_stride, kStrip, scale, past_caches, mean + i, m2 + i);
      else
        strip_moments<false>(from, samples, sample_stride, columns - i, scale, past_caches, mean + i, m2 + i);
    }
  });
  settle(past_caches);
}

void moments_strided(const void *x, DType type, int64_t samples, int64_t sample_stride, int64_t step,
                     int64_t columns, float scale, float *mean, float *m2) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T *base = static_cast<const T *>(x);
    for (int64_t i = 0; i < columns; ++i) {
      float sum = 0.0f, square = 0.0f;
      const T *column = base + i * step;
      for (int64_t s = 0; s < samples; ++s) sum += wide(column[s * sample_stride]);
      sum /= static_cast<float>(samples);
      for (int64_t s = 0; s < samples; ++s) {
        const float d = wide(column[s * sample_stride]) - sum;
        square += d * d;
      }
      mean[i] = sum;
      m2[i] = square * scale;
    }
  });
}

void merge(float *mean, float *m2, int64_t count, const float *other_mean, const float *other_m2,
           int64_t other_count, int64_t begin, int64_t end) {
  const double total = static_cast<double>(count + other_count);
  const float share = static_cast<float>(other_count / total);
  const float cross = static_cast<float>(count * (other_count / total));
  for (int64_t i = begin; i < end; ++i) {
    const float delta = other_mean[i] - mean[i];
    mean[i] += delta * share;
    m2[i] += other_m2[i] + delta * delta * cross;
  }
}

// ---- Philox4x32-10 (Salmon et al., 2011) and Box-Muller

constexpr int kLanes = 64;         // counters at a time
constexpr int kBlock = 4 * kLanes;  // elements at a time

struct Words {
  alignas(64) uint32_t w[4][kLanes];
};

inline void philox_rounds(Words &c, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t p0 = uint64_t{c.w[0][i]} * 0xD2511F53u, p1 = uint64_t{c.w[2][i]} * 0xCD9E8D57u;
      c.w[0][i] = static_cast<uint32_t>(p1 >> 32) ^ c.w[1][i] ^ k0;
      c.w[2][i] = static_cast<uint32_t>(p0 >> 32) ^ c.w[3][i] ^ k1;
      c.w[1][i] = static_cast<uint32_t>(p1);
      c.w[3][i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// kBlock normal draws, of elements 4 position and on
inline void normal_block(uint32_t position, uint32_t step, uint32_t sample, uint32_t slice, uint64_t seed,
                         float *z) {
  Words c;
  for (int i = 0; i < kLanes; ++i) {
    c.w[0][i] = position + static_cast<uint32_t>(i);
    c.w[1][i] = step;
    c.w[2][i] = sample;
    c.w[3][i] = slice;
  }
  philox_rounds(c, seed);
  alignas(64) float out[4][kLanes];
  for (int pair = 0; pair < 2; ++pair) {
    for (int i = 0; i < kLanes; ++i) {
      const float u = static_cast<float>(static_cast<int32_t>((c.w[2 * pair][i] >> 8) + 1)) * 0x1p-24f;
      const float v = static_cast<float>(static_cast<int32_t>(c.w[2 * pair + 1][i] >> 8)) * 0x1p-24f;
      const float radius = __builtin_sqrtf(-2.0f * log_(u));
      float cosine, sine;
      turn(v, &cosine, &sine);
      out[2 * pair][i] = radius * cosine;
      out[2 * pair + 1][i] = radius * sine;
    }
  }
  for (int i = 0; i < kLanes; ++i)
    for (int lane = 0; lane < 4; ++lane) z[4 * i + lane] = out[lane][i];
}

void philox(const uint32_t *counters, uint64_t seed, uint32_t *words, int64_t count) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t n = count - first < kLanes ? count - first : kLanes;
    Words c = {};
    for (int64_t i = 0; i < n; ++i)
      for (int j = 0; j < 4; ++j) c.w[j][i] = counters[4 * (first + i) + j];
    philox_rounds(c, seed);
    for (int64_t i = 0; i < n; ++i)
      for (int j = 0; j < 4; ++j) words[4 * (first + i) + j] = c.w[j][i];
  }
}

// Calls update(element offset, count, z) for every block of rows [begin, end).
template <class Update>
inline void over_blocks(bool random, uint32_t step, uint64_t seed, const int64_t *sample, const int64_t *slice,
                        int64_t row_size, int64_t begin, int64_t end, Update update) {
  const int64_t blocks = (row_size + kBlock - 1) / kBlock;
  alignas(64) float z[kBlock] = {};
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / blocks, block = unit % blocks, first = block * kBlock;
    const int64_t n = row_size - first < kBlock ? row_size - first : kBlock;
    if (random)
      normal_block(static_cast<uint32_t>(block * kLanes), step, static_cast<uint32_t>(sample[row]),
                   static_cast<uint32_t>(slice[row]), seed, z);
    update(row, row * row_size + first, n, z);
  }
}

void denoise(void *x, DType type, const void *output, DType output_type, void *x0, const float *c, uint32_t step,
             uint64_t seed, const int64_t *sample, const int64_t *slice, int64_t row_size, int64_t begin,
             int64_t end) {
  const float from_x = c[0], from_output = c[1], to_x0 = c[2], to_x = c[3], to_output = c[4], to_previous = c[5],
              sigma = c[6], clip = c[7];
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    with_type(output_type, [&](auto output_zero) {
      using O = decltype(output_zero);
      over_blocks(sigma != 0.0f, step, seed, sample, slice, row_size, begin, end,
                  [&](int64_t, int64_t at, int64_t n, const float *z) {
                    T *state = static_cast<T *>(x) + at;
                    const O *out = static_cast<const O *>(output) + at;
                    if (x0 == nullptr) {
                      for (int64_t i = 0; i < n; ++i) {
                        const float s = wide(state[i]), o = wide(out[i]);
                        float p = from_x * s + from_output * o;
                        p = clamp(p, -clip, clip);
                        state[i] = narrow<T>(to_x0 * p + to_x * s + to_output * o + sigma * z[i]);
                      }
                    } else {
                      T *previous = static_cast<T *>(x0) + at;
                      for (int64_t i = 0; i < n; ++i) {
                        const float s = wide(state[i]), o = wide(out[i]);
                        float p = from_x * s + from_output * o;
                        p = clamp(p, -clip, clip);
                        state[i] = narrow<T>(to_x0 * p + to_x * s + to_output * o +
                                             to_previous * wide(previous[i]) + sigma * z[i]);
                        previous[i] = narrow<T>(p);
                      }
                    }
                  });
    });
  });
}

void noise(const void *x0, void *x, DType type, const int64_t *t, const float *table, uint32_t step, uint64_t seed,
           const int64_t *sample, const int64_t *slice, int64_t row_size, int64_t begin, int64_t end) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    over_blocks(true, step, seed, sample, slice, row_size, begin, end,
                [&](int64_t row, int64_t at, int64_t n, const float *z) {
                  const float signal = table[2 * t[row]], sigma = table[2 * t[row] + 1];
                  const T *from = static_cast<const T *>(x0) + at;
                  T *to = static_cast<T *>(x) + at;
                  for (int64_t i = 0; i < n; ++i) to[i] = narrow<T>(signal * wide(from[i]) + sigma * z[i]);
                });
  });
}

// ---- X and Y: every reconstruction comes from memory once, the second sweep from the nearest cache

constexpr int64_t kPixels = 2048;  // of a unit of work
struct Members {
  int64_t a, b, channels, member_stride, channel_stride;
};

template <bool whole, class T>
inline void map_strip(const T *a, const T *b, const Members &m, int64_t length, float *x, float *y) {
  const int64_t n = whole ? kStrip : length;
  const float share_a = 1.0f / m.a, share_b = 1.0f / m.b, share_c = 1.0f / m.channels;
  float sum_x[kStrip] = {}, sum_y[kStrip] = {};
  for (int64_t c = 0; c < m.channels; ++c, a += m.channel_stride, b += m.channel_stride) {
    float mu[kStrip] = {}, other[kStrip] = {};
    for (int64_t k = 0; k < m.a; ++k)
      for (int64_t i = 0; i < n; ++i) mu[i] += wide(a[k * m.member_stride + i]);
    for (int64_t k = 0; k < m.b; ++k)
      for (int64_t i = 0; i < n; ++i) other[i] += wide(b[k * m.member_stride + i]);
    for (int64_t i = 0; i < n; ++i) {
      mu[i] *= share_a;
      sum_x[i] += __builtin_fabsf(other[i] * share_b - mu[i]);
    }
    for (int64_t k = 0; k < m.a; ++k)
      for (int64_t i = 0; i < n; ++i) {
        const float d = wide(a[k * m.member_stride + i]) - mu[i];
        sum_y[i] += d * d;
      }
  }
  for (int64_t i = 0; i < n; ++i) {
    x[i] = sum_x[i] * share_c;
    y[i] = __builtin_sqrtf(sum_y[i] * share_a * share_c);
  }
}

void maps(const void *a, const void *b, DType type, int64_t members_a, int64_t members_b, int64_t slices,
          int64_t channels, int64_t pixels, bool past_caches, float *inter, float *intra, int64_t begin,
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
          map_strip<true>(pa, pb, m, n, x, y);
        else
          map_strip<false>(pa, pb, m, n, x, y);
        put(inter + z * pixels + i, x, n, past_caches);
        put(intra + z * pixels + i, y, n, past_caches);
      }
    }
  });
  settle(past_caches);
}

// ---- GroupNorm + SiLU

constexpr int64_t kChannels = 4096;  // most channels, so that scratch needs no allocation

// Calls one(n, chunk, first pixel, pixels) for chunks [begin, end) of all images.
template <class One>
inline void over_chunks(const Norm &n, int64_t begin, int64_t end, One one) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / n.chunks, first = unit % n.chunks * n.chunk;
    one(image, unit, first, n.pixels - first < n.chunk ? n.pixels - first : n.chunk);
  }
}

// Channels last: a row is several pixels, so that the innermost loop is long however few the channels;
// what belongs to a channel is repeated for each of them.
constexpr int64_t kRow = 512;  // elements of a row, about

inline int64_t pixels_of_row(const Norm &n) { return n.channels_last && n.channels < kRow ? kRow / n.channels : 1; }

struct Repeated {
  alignas(64) float value[kChannels];
  Repeated(const float *of_channel, const Norm &n) {
    const int64_t pixels = pixels_of_row(n);
    for (int64_t p = 0; p < pixels; ++p) std::memcpy(value + p * n.channels, of_channel, n.channels * sizeof(float));
  }
};

// Mean and M2 of kLane channels over pixels `channels` elements apart; the sums stay in registers.
constexpr int64_t kLane = 32;

template <class T>
inline void lane_moments(const T *x, int64_t channels, int64_t pixels, float share, float *mean, float *m2) {
  float pivot[kLane], sum[kLane] = {}, square[kLane] = {};
  for (int64_t j = 0; j < kLane; ++j) pivot[j] = wide(x[j]);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t j = 0; j < kLane; ++j) {
      const float d = wide(x[p * channels + j]) - pivot[j];
      sum[j] += d;
      square[j] += d * d;
    }
  for (int64_t j = 0; j < kLane; ++j) {
    mean[j] = pivot[j] + sum[j] * share;
    m2[j] = square[j] - sum[j] * sum[j] * share;
  }
}

// Mean and M2 of each channel in a chunk, by sums about the chunk's first pixel.
void norm_moments(const Norm &n, int64_t begin, int64_t end) {
  const int64_t channels = n.channels;
  with_type(n.type, [&](auto zero) {
    using T = decltype(zero);
    over_chunks(n, begin, end, [&](int64_t image, int64_t unit, int64_t first, int64_t count) {
      float *mean = n.part_one + unit * channels, *m2 = n.part_two + unit * channels;
      const float share = 1.0f / count;
      if (n.channels_last) {
        const T *x = static_cast<const T *>(n.x) + (image * n.pixels + first) * channels;
        const int64_t step = pixels_of_row(n), row = step * channels;
        if (channels % kLane == 0) {
          for (int64_t c = 0; c < channels; c += kLane) lane_moments(x + c, channels, count, share, mean + c, m2 + c);
          return;
        }
        alignas(64) float pivot[kChannels], sum[kChannels], square[kChannels];
        for (int64_t i = 0; i < row; ++i) pivot[i] = wide(x[i % channels]), sum[i] = 0.0f, square[i] = 0.0f;
        for (int64_t p = 0; p < count; p += step) {
          const T *pixels = x + p * channels;
          const int64_t length = channels * (count - p < step ? count - p : step);
#pragma GCC ivdep
          for (int64_t i = 0; i < length; ++i) {
            const float d = wide(pixels[i]) - pivot[i];
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
          const float pivot = wide(x[0]);
          float lanes[16] = {}, squares[16] = {};
          const int64_t whole = count / 16 * 16;
          for (int64_t p = 0; p < whole; p += 16)
            for (int j = 0; j < 16; ++j) {
              const float d = wide(x[p + j]) - pivot;
              lanes[j] += d;
              squares[j] += d * d;
            }
          for (int64_t p = whole; p < count; ++p) {
            const float d = wide(x[p]) - pivot;
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

// Calls row(x index, count, channel or -1): a run of pixels of one channel, or of channels of some pixels.
template <class Row>
inline void over_rows(const Norm &n, int64_t image, int64_t first, int64_t count, Row row) {
  const int64_t step = pixels_of_row(n);
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
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i) {
      const float v = gain[i] * wide(x[i]) + offset[i];
      y[i] = narrow_computed<T>(v * sigmoid<kExact<T>>(v) + wide(residual[i]));
    }
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i) {
      const float v = gain[i] * wide(x[i]) + offset[i];
      y[i] = narrow_computed<T>(v * sigmoid<kExact<T>>(v));
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

inline __m512 load(const BFloat16 *from, __mmask16 which) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, from)), 16));
}

inline void store(BFloat16 *to, __m512 x, __mmask16 which) {
#if defined(__AVX512BF16__)
  _mm256_mask_storeu_epi16(to, which, (__m256i)_mm512_cvtneps_pbh(x));
#else
  const __m512i u = _mm512_castps_si512(x);  // as narrow_computed
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
    __m512 v = silu(_mm512_fmadd_ps(g, load(x + i, which), o));
    if (residual != nullptr) v = v + load(residual + i, which);
    store(y + i, v, which);
  }
}
#endif

void norm_apply(const Norm &n, int64_t begin, int64_t end) {
  with_type(n.type, [&](auto zero) {
    using T = decltype(zero);
    over_chunks(n, begin, end, [&](int64_t image, int64_t, int64_t first, int64_t count) {
      const Repeated gains(n.gain + image * n.channels, n), offsets(n.offset + image * n.channels, n);
      const float *gain = gains.value, *offset = offsets.value;
      over_rows(n, image, first, count, [&](int64_t at, int64_t length, int64_t c) {
        const T *x = static_cast<const T *>(n.x) + at;
        const T *residual = static_cast<const T *>(n.residual) + (n.residual ? at : 0);
        T *y = static_cast<T *>(n.y) + at;
        if (c < 0) {
          apply_row(x, n.residual ? residual : nullptr, y, gain, offset, length);
        } else {
          const float a = gain[c], b = offset[c];
          const bool add = n.residual != nullptr;
#pragma GCC ivdep
          for (int64_t i = 0; i < length; ++i) {
            const float v = a * wide(x[i]) + b;
            y[i] = narrow_computed<T>(v * sigmoid<kExact<T>>(v) + (add ? wide(residual[i]) : 0.0f));
          }
        }
      });
    });
  });
}

template <class T>
inline float silu_slope(float v) {
  const float s = sigmoid<kExact<T>>(v);
  return s * (1.0f + v * (1.0f - s));
}

// The normalised x as a multiple and an offset of x, a channel at a time, of one image.
inline void normalising(const Norm &n, int64_t image, float *multiple, float *offset) {
  const int64_t per_group = n.channels / n.groups;
  for (int64_t c = 0; c < n.channels; ++c) {
    const int64_t g = image * n.groups + c / per_group;
    multiple[c] = n.rstd[g];
    offset[c] = -n.centre[g] * n.rstd[g];
  }
}

void norm_grad_sums(const Norm &n, int64_t begin, int64_t end) {
  with_type(n.type, [&](auto zero) {
    using T = decltype(zero);
    float multiple[kChannels], centre[kChannels];
    over_chunks(n, begin, end, [&](int64_t image, int64_t unit, int64_t first, int64_t count) {
      normalising(n, image, multiple, centre);
      const Repeated gains(n.gain + image * n.channels, n), offsets(n.offset + image * n.channels, n);
      const Repeated multiples(multiple, n), centres(centre, n);
      const float *gain = gains.value, *offset = offsets.value, *by = multiples.value, *to = centres.value;
      const int64_t row = n.channels * pixels_of_row(n);
      alignas(64) float sum[kChannels], sum_h[kChannels];
      for (int64_t i = 0; i < row; ++i) sum[i] = 0.0f, sum_h[i] = 0.0f;
      over_rows(n, image, first, count, [&](int64_t at, int64_t length, int64_t c) {
        const T *x = static_cast<const T *>(n.x) + at, *grad = static_cast<const T *>(n.grad) + at;
        if (c < 0) {
#pragma GCC ivdep
          for (int64_t i = 0; i < length; ++i) {
            const float v = wide(x[i]);
            const float g = wide(grad[i]) * silu_slope<T>(gain[i] * v + offset[i]);
            sum[i] += g;
            sum_h[i] += g * (v * by[i] + to[i]);
          }
        } else {
          float lanes[16] = {}, lanes_h[16] = {};
          for (int64_t p = 0; p < length; p += 16) {
            const int64_t wide_run = length - p < 16 ? length - p : 16;
            for (int64_t j = 0; j < wide_run; ++j) {
              const float v = wide(x[p + j]);
              const float g = wide(grad[p + j]) * silu_slope<T>(gain[c] * v + offset[c]);
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
    over_chunks(n, begin, end, [&](int64_t image, int64_t, int64_t first, int64_t count) {
      normalising(n, image, own_multiple, own_centre);
      for (int64_t c = 0; c < n.channels; ++c) {
        own_g[c] = n.mean_g[image * n.groups + c / per_group];
        own_gh[c] = n.mean_gh[image * n.groups + c / per_group];
      }
      const Repeated gains(n.gain + image * n.channels, n), offsets(n.offset + image * n.channels, n);
      const Repeated inners(n.inner + image * n.channels, n), multiples(own_multiple, n), centres(own_centre, n);
      const Repeated means(own_g, n), means_h(own_gh, n);
      const float *gain = gains.value, *offset = offsets.value, *inner = inners.value, *multiple = multiples.value;
      const float *centre = centres.value, *mean_g = means.value, *mean_gh = means_h.value;
      over_rows(n, image, first, count, [&](int64_t at, int64_t length, int64_t c) {
        const T *x = static_cast<const T *>(n.x) + at, *grad = static_cast<const T *>(n.grad) + at;
        T *d_x = static_cast<T *>(n.y) + at;
        if (c < 0) {
#pragma GCC ivdep
          for (int64_t i = 0; i < length; ++i) {
            const float v = wide(x[i]), h = v * multiple[i] + centre[i];
            const float g = wide(grad[i]) * silu_slope<T>(gain[i] * v + offset[i]);
            d_x[i] = narrow<T>(multiple[i] * (g * inner[i] - mean_g[i] - h * mean_gh[i]));
          }
        } else {
          const float a = gain[c], b = offset[c], r = multiple[c], o = centre[c], w = inner[c];
          const float m = mean_g[c], mh = mean_gh[c];
#pragma GCC ivdep
          for (int64_t i = 0; i < length; ++i) {
            const float v = wide(x[i]), h = v * r + o;
            const float g = wide(grad[i]) * silu_slope<T>(a * v + b);
            d_x[i] = narrow<T>(r * (g * w - m - h * mh));
          }
        }
      });
    });
  });
}

}  // namespace

extern const Kernels DDMD_CONCAT(kernels_, DDMD_ISA);
const Kernels DDMD_CONCAT(kernels_, DDMD_ISA) = {
    DDMD_STRING(DDMD_ISA), moments,      moments_strided, merge,          denoise,        noise,
    philox,                maps,         norm_moments,    norm_apply,     norm_grad_sums, norm_grad_apply,
};

}  // namespace ddmd
