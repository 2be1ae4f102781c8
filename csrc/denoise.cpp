// The random stream, the noising and the denoising update.
#include "kernels.h"
#include "simd.h"

namespace ddmd {
namespace {

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
inline void normal_draws(uint32_t position, uint32_t step, uint32_t sample, uint32_t slice, uint64_t seed,
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
      sincos_2pi(v, &cosine, &sine);
      out[2 * pair][i] = radius * cosine;
      out[2 * pair + 1][i] = radius * sine;
    }
  }
  for (int i = 0; i < kLanes; ++i)
    for (int lane = 0; lane < 4; ++lane) z[4 * i + lane] = out[lane][i];
}

}  // namespace

namespace DDMD_ISA {
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
}  // namespace DDMD_ISA

namespace {

// Calls update(element offset, count, z) for every block of rows [begin, end).
template <class Update>
inline void for_each_block(bool random, uint32_t step, uint64_t seed, const int64_t *sample, const int64_t *slice,
                        int64_t row_size, int64_t begin, int64_t end, Update update) {
  const int64_t blocks = (row_size + kBlock - 1) / kBlock;
  alignas(64) float z[kBlock] = {};
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / blocks, block = unit % blocks, first = block * kBlock;
    const int64_t n = row_size - first < kBlock ? row_size - first : kBlock;
    if (random)
      normal_draws(static_cast<uint32_t>(block * kLanes), step, static_cast<uint32_t>(sample[row]),
                   static_cast<uint32_t>(slice[row]), seed, z);
    update(row, row * row_size + first, n, z);
  }
}

}  // namespace

namespace DDMD_ISA {
void denoise(void *x, DType type, const void *output, DType output_type, void *x0, const float *c, uint32_t step,
             uint64_t seed, const int64_t *sample, const int64_t *slice, int64_t row_size, int64_t begin,
             int64_t end) {
  const float from_x = c[0], from_output = c[1], to_x0 = c[2], to_x = c[3], to_output = c[4], to_previous = c[5],
              sigma = c[6], clip = c[7];
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    with_type(output_type, [&](auto output_zero) {
      using O = decltype(output_zero);
      for_each_block(sigma != 0.0f, step, seed, sample, slice, row_size, begin, end,
                  [&](int64_t, int64_t at, int64_t n, const float *z) {
                    T *state = static_cast<T *>(x) + at;
                    const O *out = static_cast<const O *>(output) + at;
                    if (x0 == nullptr) {
                      for (int64_t i = 0; i < n; ++i) {
                        const float s = upcast(state[i]), o = upcast(out[i]);
                        float p = from_x * s + from_output * o;
                        p = clamp(p, -clip, clip);
                        state[i] = downcast<T>(to_x0 * p + to_x * s + to_output * o + sigma * z[i]);
                      }
                    } else {
                      T *previous = static_cast<T *>(x0) + at;
                      for (int64_t i = 0; i < n; ++i) {
                        const float s = upcast(state[i]), o = upcast(out[i]);
                        float p = from_x * s + from_output * o;
                        p = clamp(p, -clip, clip);
                        state[i] = downcast<T>(to_x0 * p + to_x * s + to_output * o +
                                             to_previous * upcast(previous[i]) + sigma * z[i]);
                        previous[i] = downcast<T>(p);
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
    for_each_block(true, step, seed, sample, slice, row_size, begin, end,
                [&](int64_t row, int64_t at, int64_t n, const float *z) {
                  const float signal = table[2 * t[row]], sigma = table[2 * t[row] + 1];
                  const T *from = static_cast<const T *>(x0) + at;
                  T *to = static_cast<T *>(x) + at;
                  for (int64_t i = 0; i < n; ++i) to[i] = downcast<T>(signal * upcast(from[i]) + sigma * z[i]);
                });
  });
}

void pure_noise(void *x, DType type, uint32_t step, uint64_t seed, const int64_t *sample, const int64_t *slice,
                int64_t row_size, int64_t begin, int64_t end) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    for_each_block(true, step, seed, sample, slice, row_size, begin, end,
                [&](int64_t, int64_t at, int64_t n, const float *z) {
                  T *to = static_cast<T *>(x) + at;
                  for (int64_t i = 0; i < n; ++i) to[i] = downcast<T>(z[i]);
                });
  });
}
}  // namespace DDMD_ISA

}  // namespace ddmd
