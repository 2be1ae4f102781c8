// What the kernels of every op family share: types, elementary functions, stores. Compiled once for each
// instruction set (DDMD_ISA names it); the loops are written so that the compiler vectorises them.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ddmd.h"

// The next loop's iterations do not depend on each other.
#if defined(__clang__)
#define DDMD_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define DDMD_IVDEP _Pragma("GCC ivdep")
#endif

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
struct Float16 {  // not _Float16, which C++ has only in newer compilers
  uint16_t value;
};
inline float upcast(float x) { return x; }
inline float upcast(BFloat16 x) { return bits<float>(uint32_t{x.value} << 16); }
inline float upcast(Float16 x) {
  const uint32_t magnitude = (x.value & 0x7fffu) << 13, sign = (x.value & 0x8000u) << 16;
  const float subnormal = bits<float>(magnitude | 0x38800000u) - 0x1p-14f;  // exact: m 2^-24
  const uint32_t normal = magnitude + (magnitude >= 0x0f800000u ? 224u << 23 : 112u << 23);  // or infinity, NaN
  return bits<float>((magnitude < 0x00800000u ? bits<uint32_t>(subnormal) : normal) | sign);
}

template <class T>
inline T downcast(float x);
template <>
inline float downcast<float>(float x) {
  return x;
}
template <>
inline Float16 downcast<Float16>(float x) {  // to nearest, ties to even
  const uint32_t u = bits<uint32_t>(x), magnitude = u & 0x7fffffffu;
  const uint32_t normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;  // 0.5 has ulp 2^-24
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : half;
  return {static_cast<uint16_t>(half | ((u >> 16) & 0x8000u))};
}
// To nearest, ties to even, of anything but a NaN with bits in its lower half. Of those that arithmetic
// makes from 16-bit values and the usual NaN there is none.
template <class T>
inline T downcast_computed(float x) {
  return downcast<T>(x);
}
template <>
inline BFloat16 downcast_computed<BFloat16>(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
inline BFloat16 downcast<BFloat16>(float x) {
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
    case DType::f16: return call(Float16{});
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
constexpr bool kExact = !std::is_same_v<T, BFloat16>;

// exp(x) to a unit or two in the last place; infinity and NaN where they belong, and 0 for what float32 has
// as a subnormal number.
inline float exp_(float x) {
  const float y = clamp(x, -87.0f, 89.0f);
  const float shifted = 1.44269504f * y + 12582912.0f;  // 1.5 * 2^23: the integer nearest stands in the low bits
  const float k = shifted - 12582912.0f;
  const float r = (y - 0.693359375f * k) + 2.12194440e-4f * k;  // [-ln 2 / 2, ln 2 / 2]
  float p = 2.0f * 1.3981999507e-3f + 2.0f * 1.9875691500e-4f * r;  // 2 exp(r), as 2^k alone may overflow
  p = p * r + 2.0f * 8.3334519073e-3f;
  p = p * r + 2.0f * 4.1665795894e-2f;
  p = p * r + 2.0f * 1.6666665459e-1f;
  p = p * r + 2.0f * 5.0000001201e-1f;
  p = p * r + 2.0f;
  p = p * r + 2.0f;
  p *= bits<float>((bits<uint32_t>(shifted) << 23) + (126u << 23));  // 2^(k - 1)
  return x < -87.0f ? 0.0f : p;
}

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
inline void sincos_2pi(float v, float *cosine, float *sine) {
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

inline void store(float *to, const float *from, int64_t n, bool non_temporal) {
  int64_t i = 0;
  if (non_temporal) {
    for (; i < n && reinterpret_cast<uintptr_t>(to + i) % (kVector * sizeof(float)); ++i) to[i] = from[i];
    for (; i + kVector <= n; i += kVector) stream(to + i, from + i);
  }
  std::memcpy(to + i, from + i, (n - i) * sizeof(float));
}

// Streamed results become visible to other threads.
inline void store_fence(bool non_temporal) {
#if defined(__x86_64__)
  if (non_temporal) _mm_sfence();
#endif
}

constexpr int64_t kStrip = 64;  // elements whose sums stay in registers

// Asks for the strip that a loop over `x` comes to 2 KiB later. Several streams at a time are more than
// hardware prefetching follows; an address past the end is no access. Inlined always, because GCC drops calls
// of a function that does nothing else.
template <class T>
__attribute__((always_inline)) inline void prefetch_strip(const T *x) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < kStrip * static_cast<int64_t>(sizeof(T)); i += 64)
    __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(x) + 2048 + i));
}

}  // namespace
}  // namespace ddmd
