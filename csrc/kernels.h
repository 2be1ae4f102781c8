// The kernels of one instruction set, which DDMD_ISA names; kernels.cpp makes their table.
#pragma once
#include "ddmd.h"

namespace ddmd::DDMD_ISA {

void moments(const void *x, DType type, int64_t samples, int64_t sample_stride, int64_t columns, float scale,
             bool non_temporal, float *mean, float *m2);
void moments_strided(const void *x, DType type, int64_t samples, int64_t sample_stride, int64_t step,
                     int64_t columns, float scale, float *mean, float *m2);
void update(float *mean, float *m2, int64_t count, const void *x, DType type, int64_t samples, int64_t sample_stride,
            int64_t columns);
void merge(float *mean, float *m2, int64_t count, const float *other_mean, const float *other_m2,
           int64_t other_count, int64_t begin, int64_t end);
void denoise(void *x, DType type, const void *output, DType output_type, void *x0, const float *row, uint32_t step,
             uint64_t seed, const int64_t *sample, const int64_t *slice, int64_t row_size, int64_t begin, int64_t end);
void noise(const void *x0, void *x, DType type, const int64_t *t, const float *table, uint32_t step, uint64_t seed,
           const int64_t *sample, const int64_t *slice, int64_t row_size, int64_t begin, int64_t end);
void pure_noise(void *x, DType type, uint32_t step, uint64_t seed, const int64_t *sample, const int64_t *slice,
                int64_t row_size, int64_t begin, int64_t end);
void philox(const uint32_t *counters, uint64_t seed, uint32_t *words, int64_t count);
void discrepancy_maps(const void *a, const void *b, DType type, int64_t members_a, int64_t members_b, int64_t slices,
                      int64_t channels, int64_t pixels, bool non_temporal, float *inter, float *intra, int64_t begin,
                      int64_t end);
void gaussian_kl(const Gaussians &g, float *out, int64_t begin, int64_t end);
double gaussian_kl_sum(const Gaussians &g, int64_t begin, int64_t end);
void gaussian_kl_grads(const Gaussians &g, int64_t begin, int64_t end);
double row_deviations(const void *z, DType type, int64_t row_size, const int64_t *rows, int64_t count, int64_t first,
                      int64_t columns);
void row_deviation_grads(const void *z, void *d_z, DType type, int64_t row_size, const int64_t *rows, int64_t count,
                         int64_t first, int64_t columns, float factor);
void norm_moments(const Norm &n, int64_t begin, int64_t end);
void norm_apply(const Norm &n, int64_t begin, int64_t end);
void norm_grad_sums(const Norm &n, int64_t begin, int64_t end);
void norm_grad_apply(const Norm &n, int64_t begin, int64_t end);

}  // namespace ddmd::DDMD_ISA
