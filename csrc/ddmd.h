// The C++ and CUDA core of ddmd: plain pointers, int64 sizes and strides (in elements), no torch.
#pragma once
#include <cstdint>

namespace ddmd {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Work of one kind, compiled once an instruction set; each call does one part of the whole.
// Ranges [begin, end) are of columns, rows or chunks, so that the caller decides on threads.
struct Kernels {
  const char *name;
  // mean, and sum of squared deviations times `scale`, over S samples, of contiguous columns; non_temporal
  // where the results are too many to be found there later
  void (*moments)(const void *x, DType type, int64_t samples, int64_t sample_stride, int64_t columns,
                  float scale, bool non_temporal, float *mean, float *m2);
  // the same for columns `step` elements apart, one row
  void (*moments_strided)(const void *x, DType type, int64_t samples, int64_t sample_stride, int64_t step,
                          int64_t columns, float scale, float *mean, float *m2);
  // merges the samples' contiguous columns into a running mean and M2 of `count` samples, in place
  void (*update)(float *mean, float *m2, int64_t count, const void *x, DType type, int64_t samples,
                 int64_t sample_stride, int64_t columns);
  void (*merge)(float *mean, float *m2, int64_t count, const float *other_mean, const float *other_m2,
                int64_t other_count, int64_t begin, int64_t end);
  void (*denoise)(void *x, DType type, const void *output, DType output_type, void *x0, const float *row,
                  uint32_t step, uint64_t seed, const int64_t *sample, const int64_t *slice, int64_t row_size,
                  int64_t begin, int64_t end);
  void (*noise)(const void *x0, void *x, DType type, const int64_t *t, const float *table, uint32_t step,
                uint64_t seed, const int64_t *sample, const int64_t *slice, int64_t row_size, int64_t begin,
                int64_t end);
  // the same without x_0: the normal draws alone
  void (*pure_noise)(void *x, DType type, uint32_t step, uint64_t seed, const int64_t *sample, const int64_t *slice,
                     int64_t row_size, int64_t begin, int64_t end);
  void (*philox)(const uint32_t *counters, uint64_t seed, uint32_t *words, int64_t count);
  void (*discrepancy_maps)(const void *a, const void *b, DType type, int64_t members_a, int64_t members_b, int64_t slices,
               int64_t channels, int64_t pixels, bool non_temporal, float *inter, float *intra, int64_t begin,
               int64_t end);
  // KL of elements [begin, end): each one's to `out`, or their sum
  void (*gaussian_kl)(const struct Gaussians &g, float *out, int64_t begin, int64_t end);
  double (*gaussian_kl_sum)(const struct Gaussians &g, int64_t begin, int64_t end);
  void (*gaussian_kl_grads)(const struct Gaussians &g, int64_t begin, int64_t end);
  // sum of squared deviations of `count` rows from their mean, over columns [first, first + columns); and the
  // gradient, which is factor (z - mean)
  double (*row_deviations)(const void *z, DType type, int64_t row_size, const int64_t *rows, int64_t count,
                           int64_t first, int64_t columns);
  void (*row_deviation_grads)(const void *z, void *d_z, DType type, int64_t row_size, const int64_t *rows,
                              int64_t count, int64_t first, int64_t columns, float factor);
  // GroupNorm + SiLU; layout: channels last (N, pixels, C) or first (N, C, pixels)
  void (*norm_moments)(const struct Norm &n, int64_t begin, int64_t end);
  void (*norm_apply)(const struct Norm &n, int64_t begin, int64_t end);
  void (*norm_grad_sums)(const struct Norm &n, int64_t begin, int64_t end);
  void (*norm_grad_apply)(const struct Norm &n, int64_t begin, int64_t end);
};

// Two diagonal Gaussians, q and p, and what their gradients need.
struct Gaussians {
  DType type;
  const void *mu_q, *logvar_q, *mu_p, *logvar_p;
  const float *grad;  // of each element, or one number where `each` is false
  bool each;
  float scale;  // of the gradient
  void *d_mu_q, *d_logvar_q, *d_mu_p, *d_logvar_p;
};

// Results of more bytes than this are not in a core's cache any more when somebody reads them.
constexpr int64_t kCacheBytes = 4 << 20;

constexpr int64_t kRowColumns = 1024;  // most columns of a call of row_deviations

// One GroupNorm + SiLU. Work is cut into chunks of `chunk` pixels, whatever the number of threads.
struct Norm {
  DType type;
  bool channels_last;
  int64_t batch, channels, pixels, groups, chunk, chunks;  // chunks an image
  const void *x, *residual, *grad;
  void *y;                      // forward: the result; backward: d x, which also holds g between the passes of float32
  const float *gain, *offset;   // (N, C): y = silu(gain x + offset)
  const float *centre;          // (N, C): mean of the channel's group, backward
  const float *base, *tilt;     // (N, C): d x = gain g + base + tilt (x - centre), backward, second pass
  float *part_one, *part_two;   // (N, chunks, C): forward mean and M2; backward sums of g and g (x - centre)
};

const Kernels &kernels();      // the best set this CPU runs
const Kernels *kernel_set(int index);  // the sets that were built, best first; null after the last

// ---- whole operations, on `threads` threads
void ensemble_variance(const void *x, DType type, int64_t samples, int64_t sample_stride, const int64_t *shape,
                       const int64_t *strides, int dims, int correction, float *mean, float *variance, int threads);
void ensemble_merge(float *mean, float *m2, int64_t count, const float *other_mean, const float *other_m2,
                    int64_t other_count, int64_t size, int threads);
void ensemble_update(float *mean, float *m2, int64_t count, const void *x, DType type, int64_t samples,
                     int64_t sample_stride, const int64_t *shape, const int64_t *strides, int dims, int threads);
void denoise_step(void *x, DType type, const void *output, DType output_type, void *x0, const float *table,
                  int64_t step, int64_t seed, const int64_t *sample, const int64_t *slice, int64_t rows,
                  int64_t row_size, int threads);
void noise(const void *x0, void *x, DType type, const int64_t *t, const float *table, int64_t step, int64_t seed,
           const int64_t *sample, const int64_t *slice, int64_t rows, int64_t row_size, int threads);
void pure_noise(void *x, DType type, int64_t step, int64_t seed, const int64_t *sample, const int64_t *slice,
                int64_t rows, int64_t row_size, int threads);
void discrepancy_maps(const void *a, const void *b, DType type, int64_t members_a, int64_t members_b, int64_t slices,
                      int64_t channels, int64_t pixels, float *inter, float *intra, int threads);
// the sum over `size` elements times `scale`, or each element's where `each` is true
void gaussian_kl(const Gaussians &g, int64_t size, double scale, bool each, float *out, int threads);
void gaussian_kl_backward(const Gaussians &g, int64_t size, int threads);
// group holds numbers from 0 to groups - 1: whoever calls has looked
void pairwise_sqdist(const void *z, DType type, int64_t rows, int64_t row_size, const int64_t *group, int64_t groups,
                     float *out, int threads);
void pairwise_sqdist_backward(float grad, const void *z, DType type, int64_t rows, int64_t row_size,
                              const int64_t *group, int64_t groups, void *d_z, int threads);
// mean and rstd, (N, groups), may be null
void group_norm_silu(const void *x, DType type, bool channels_last, int64_t batch, int64_t channels, int64_t pixels,
                     int64_t groups, const float *weight, const float *bias, const float *scale, const float *shift,
                     const void *residual, double eps, void *y, float *mean, float *rstd, int threads);
// d_weight and d_bias (C), d_scale and d_shift (N, C)
void group_norm_silu_backward(const void *grad, const void *x, DType type, bool channels_last, int64_t batch,
                              int64_t channels, int64_t pixels, int64_t groups, const float *weight,
                              const float *bias, const float *scale, const float *shift, const float *mean,
                              const float *rstd, void *d_x, float *d_weight, float *d_bias, float *d_scale,
                              float *d_shift, int threads);

#ifdef DDMD_CUDA
// Status is a CUDA error's text, or null. Nothing here synchronises.
const char *cuda_ensemble(const void *x, DType type, int64_t samples, int64_t sample_stride, const int64_t *shape,
                          const int64_t *strides, int dims, int64_t size, int correction, float *mean,
                          float *variance, int64_t running_count, bool running, void *stream);
const char *cuda_merge(float *mean, float *m2, int64_t count, const float *other_mean, const float *other_m2,
                       int64_t other_count, int64_t size, void *stream);
#endif

}  // namespace ddmd
