// Mean and variance over the sample axis on a GPU: one read of the samples, 16 bytes a load.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ddmd.h"

namespace ddmd {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxDims = 8;

struct Axes {
  int dims;
  int64_t shape[kMaxDims], strides[kMaxDims];
};

__device__ inline float upcast(float x) { return x; }
__device__ inline float upcast(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float upcast(__half x) { return __half2float(x); }

// Welford over the samples for `kVector` neighbouring columns; then the variance, or a merge into the
// running state (Chan et al.).
template <class T, int kVector>
__device__ inline void columns(const T *x, int64_t samples, int64_t sample_stride, float *mean, float *second,
                               float scale, float running_count, bool running) {
  float m[kVector], s[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) m[i] = 0.0f, s[i] = 0.0f;
#pragma unroll 4
  for (int64_t k = 0; k < samples; ++k) {
    alignas(16) T values[kVector];
    if constexpr (kVector > 1)
      *reinterpret_cast<uint4 *>(values) = __ldg(reinterpret_cast<const uint4 *>(x + k * sample_stride));
    else
      values[0] = x[k * sample_stride];
    const float share = 1.0f / static_cast<float>(k + 1);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float delta = upcast(values[i]) - m[i];
      m[i] += delta * share;
      s[i] += delta * (upcast(values[i]) - m[i]);
    }
  }
  if (running) {
    const float fresh = static_cast<float>(samples), total = running_count + fresh;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float delta = m[i] - mean[i];
      s[i] = second[i] + s[i] + delta * delta * (running_count * (fresh / total));
      m[i] = mean[i] + delta * (fresh / total);
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) s[i] *= scale;
  if constexpr (kVector > 1) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      *reinterpret_cast<float4 *>(mean + i) = make_float4(m[i], m[i + 1], m[i + 2], m[i + 3]);
      *reinterpret_cast<float4 *>(second + i) = make_float4(s[i], s[i + 1], s[i + 2], s[i + 3]);
    }
  } else {
    mean[0] = m[0];
    second[0] = s[0];
  }
}

// samples: columns contiguous, all strides and pointers multiples of 16 bytes
template <class T>
__global__ void __launch_bounds__(kThreads)
    ensemble_vector_kernel(const T *__restrict__ x, int64_t samples, int64_t sample_stride, int64_t size,
                           float *__restrict__ mean, float *__restrict__ second, float scale, float running_count,
                           bool running) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kVector;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector; i < size; i += step)
    columns<T, kVector>(x + i, samples, sample_stride, mean + i, second + i, scale, running_count, running);
}

// any strides, one column a thread
template <class T>
__global__ void __launch_bounds__(kThreads)
    ensemble_strided_kernel(const T *x, int64_t samples, int64_t sample_stride, Axes axes, int64_t size, float *mean,
                            float *second, float scale, float running_count, bool running) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size; i += step) {
    int64_t rest = i, at = 0;
    for (int d = axes.dims - 1; d >= 0; --d) {
      at += rest % axes.shape[d] * axes.strides[d];
      rest /= axes.shape[d];
    }
    columns<T, 1>(x + at, samples, sample_stride, mean + i, second + i, scale, running_count, running);
  }
}

__global__ void __launch_bounds__(kThreads)
    merge_kernel(float *mean, float *m2, const float *other_mean, const float *other_m2, float share, float cross,
                 int64_t size) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size; i += step) {
    const float delta = other_mean[i] - mean[i];
    mean[i] += delta * share;
    m2[i] += other_m2[i] + delta * delta * cross;
  }
}

// Enough blocks to fill the device four times over; the loops do the rest.
int blocks_for(int64_t threads) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t wanted = (threads + kThreads - 1) / kThreads, most = static_cast<int64_t>(processors) * 32;
  return static_cast<int>(wanted < most ? (wanted > 0 ? wanted : 1) : most);
}

const char *status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
void launch(const T *x, int64_t samples, int64_t sample_stride, const Axes &axes, int64_t size, float *mean,
            float *second, float scale, float running_count, bool running, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const auto aligned = [](const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vector = axes.dims <= 1 && (axes.dims == 0 || axes.strides[0] == 1) && size % kVector == 0 &&
                      sample_stride % kVector == 0 && aligned(x) && aligned(mean) && aligned(second);
  if (vector)
    ensemble_vector_kernel<T><<<blocks_for(size / kVector), kThreads, 0, stream>>>(
        x, samples, sample_stride, size, mean, second, scale, running_count, running);
  else
    ensemble_strided_kernel<T><<<blocks_for(size), kThreads, 0, stream>>>(x, samples, sample_stride, axes, size, mean,
                                                                          second, scale, running_count, running);
}

}  // namespace

const char *cuda_ensemble(const void *x, DType type, int64_t samples, int64_t sample_stride, const int64_t *shape,
                          const int64_t *strides, int dims, int64_t size, int correction, float *mean,
                          float *variance, int64_t running_count, bool running, void *stream) {
  if (size == 0 || samples == 0) return nullptr;
  Axes axes = {};
  for (int i = 0; i < dims; ++i) {
    if (shape[i] == 1) continue;
    const int last = axes.dims - 1;
    if (axes.dims > 0 && axes.strides[last] == strides[i] * shape[i]) {
      axes.shape[last] *= shape[i];
      axes.strides[last] = strides[i];
      continue;
    }
    if (axes.dims == kMaxDims) return "more than 8 axes that do not run on into each other";
    axes.shape[axes.dims] = shape[i];
    axes.strides[axes.dims++] = strides[i];
  }
  const float scale = running ? 1.0f : 1.0f / static_cast<float>(samples - correction);
  const float count = static_cast<float>(running_count);
  auto *on = static_cast<cudaStream_t>(stream);
  switch (type) {
    case DType::f32:
      launch(static_cast<const float *>(x), samples, sample_stride, axes, size, mean, variance, scale, count, running, on);
      break;
    case DType::bf16:
      launch(static_cast<const __nv_bfloat16 *>(x), samples, sample_stride, axes, size, mean, variance, scale, count,
             running, on);
      break;
    case DType::f16:
      launch(static_cast<const __half *>(x), samples, sample_stride, axes, size, mean, variance, scale, count, running, on);
      break;
  }
  return status();
}

const char *cuda_merge(float *mean, float *m2, int64_t count, const float *other_mean, const float *other_m2,
                       int64_t other_count, int64_t size, void *stream) {
  if (size == 0) return nullptr;
  const double total = static_cast<double>(count + other_count);
  merge_kernel<<<blocks_for(size), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      mean, m2, other_mean, other_m2, static_cast<float>(other_count / total),
      static_cast<float>(count * (other_count / total)), size);
  return status();
}

}  // namespace ddmd
