// Noise and the denoising update, whole: how rows are cut over threads.
#include "ddmd.h"
#include "parallel.h"

namespace ddmd {

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

void pure_noise(void *x, DType type, int64_t step, int64_t seed, const int64_t *sample, const int64_t *slice,
                int64_t rows, int64_t row_size, int threads) {
  parallel_for(rows * ((row_size + 255) / 256), 16, threads, [&](int64_t begin, int64_t end) {
    kernels().pure_noise(x, type, static_cast<uint32_t>(step), static_cast<uint64_t>(seed), sample, slice, row_size,
                         begin, end);
  });
}

}  // namespace ddmd
