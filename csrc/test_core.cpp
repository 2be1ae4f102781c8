// A test of the core without Python or torch: values by hand, every instruction set, and, where there
// is a device, the CUDA half. Exit status 0 when all hold.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ddmd.h"

#ifdef DDMD_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

int failures = 0;

void expect(bool holds, const char *what, const char *set = "") {
  if (!holds) {
    std::printf("FAILED: %s %s\n", what, set);
    ++failures;
  }
}

bool close(double a, double b, double tolerance) { return std::fabs(a - b) <= tolerance * (1.0 + std::fabs(b)); }

void philox_has_the_published_answers(const ddmd::Kernels &k) {
  // Random123 kat_vectors, philox4x32, 10 rounds
  const uint32_t counters[3][4] = {{0, 0, 0, 0},
                                   {0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu},
                                   {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}};
  const uint64_t keys[3] = {0, 0xffffffffffffffffull, 0x299f31d0a4093822ull};
  const uint32_t answers[3][4] = {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u},
                                  {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu},
                                  {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}};
  for (int i = 0; i < 3; ++i) {
    uint32_t words[4];
    k.philox(counters[i], keys[i], words, 1);
    for (int j = 0; j < 4; ++j) expect(words[j] == answers[i][j], "philox known answer", k.name);
  }
}

void moments_survive_a_large_mean(const ddmd::Kernels &k) {
  const int64_t samples = 5, columns = 1500;
  std::vector<float> x(samples * columns), mean(columns), m2(columns);
  for (int64_t s = 0; s < samples; ++s)
    for (int64_t i = 0; i < columns; ++i) x[s * columns + i] = 10000.0f + static_cast<float>(s) + static_cast<float>(i % 7);
  k.moments(x.data(), ddmd::DType::f32, samples, columns, columns, 1.0f, false, mean.data(), m2.data());
  for (int64_t i = 0; i < columns; ++i) {
    expect(close(mean[i], 10002.0 + static_cast<double>(i % 7), 1e-6), "mean", k.name);
    expect(close(m2[i], 10.0, 1e-4), "sum of squared deviations", k.name);
  }
}

void a_merge_is_the_whole(const ddmd::Kernels &k) {
  float mean[1] = {1.0f}, m2[1] = {2.0f};  // 0, 1, 2
  const float other_mean[1] = {5.0f}, other_m2[1] = {2.0f};  // 4, 6 have mean 5, M2 2
  k.merge(mean, m2, 3, other_mean, other_m2, 2, 0, 1);
  expect(close(mean[0], 2.6, 1e-6) && close(m2[0], 23.2, 1e-6), "merge of 0,1,2 and 4,6", k.name);
}

void losses_by_hand(const ddmd::Kernels &k) {
  const int64_t size = 70;  // more than a strip
  std::vector<float> mu_q(size, 1.0f), logvar_q(size, 0.0f), mu_p(size, 3.0f), logvar_p(size, std::log(2.0f)), out(size);
  ddmd::Gaussians g = {};
  g.type = ddmd::DType::f32;
  g.mu_q = mu_q.data(), g.logvar_q = logvar_q.data(), g.mu_p = mu_p.data(), g.logvar_p = logvar_p.data();
  const double each = 0.5 * (std::log(2.0) + 0.5 + 4.0 / 2.0 - 1.0);  // KL(N(1, 1) || N(3, 2))
  k.gaussian_kl(g, out.data(), 0, size);
  for (const float value : out) expect(close(value, each, 1e-6), "KL of one element", k.name);
  expect(close(k.gaussian_kl_sum(g, 0, size), each * size, 1e-6), "sum of KL", k.name);
  std::vector<float> z(3 * size, 10000.0f);  // rows at 10000, 10001 and 10005: deviations of the first and last
  for (int64_t i = 0; i < size; ++i) z[size + i] += 1.0f, z[2 * size + i] += 5.0f;
  const int64_t rows[2] = {0, 2};
  expect(close(k.row_deviations(z.data(), ddmd::DType::f32, size, rows, 2, 0, size), 12.5 * size, 1e-6),
         "squared deviations of rows", k.name);
}

void noise_has_unit_moments() {
  const int64_t n = 1 << 20;
  std::vector<float> zero(n, 0.0f), x(n);
  const int64_t t = 0, sample = 3, slice = 5;
  const float table[2] = {0.0f, 1.0f};
  ddmd::noise(zero.data(), x.data(), ddmd::DType::f32, &t, table, -1, 42, &sample, &slice, 1, n, 2);
  double sum = 0, square = 0;
  for (float v : x) sum += v, square += static_cast<double>(v) * v;
  expect(std::fabs(sum / n) < 5e-3 && std::fabs(square / n - 1.0) < 1e-2, "noise is standard normal");
}

void norm_is_what_it_says() {
  const int64_t channels = 4, pixels = 9;
  std::vector<float> x(channels * pixels), y(x.size()), weight(channels, 1.0f), bias(channels, 0.0f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>((i * 37) % 11);
  float mean[2], rstd[2];
  ddmd::group_norm_silu(x.data(), ddmd::DType::f32, true, 1, channels, pixels, 2, weight.data(), bias.data(), nullptr,
                        nullptr, nullptr, 1e-5, y.data(), mean, rstd, 1);
  for (int g = 0; g < 2; ++g) {
    double sum = 0, square = 0;
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 2 * g; c < 2 * g + 2; ++c) sum += x[p * channels + c];
    sum /= 2 * pixels;
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 2 * g; c < 2 * g + 2; ++c) square += (x[p * channels + c] - sum) * (x[p * channels + c] - sum);
    const double r = 1.0 / std::sqrt(square / (2 * pixels) + 1e-5);
    expect(close(mean[g], sum, 1e-6) && close(rstd[g], r, 1e-5), "group statistics");
    const double v = (x[2 * g] - sum) * r;
    expect(close(y[2 * g], v / (1.0 + std::exp(-v)), 1e-5), "silu of the normalised value");
  }
}

#ifdef DDMD_CUDA
void cuda_agrees_with_the_cpu() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device: the CUDA half was not run\n");
    return;
  }
  const int64_t samples = 5, columns = 12345;
  std::vector<float> x(samples * columns), mean(columns), variance(columns), gpu(columns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>((i * 7919) % 1000) * 0.01f;
  ddmd::ensemble_variance(x.data(), ddmd::DType::f32, samples, columns, &columns, std::vector<int64_t>{1}.data(), 1, 1,
                          mean.data(), variance.data(), 2);
  float *d_x, *d_mean, *d_variance;
  cudaMalloc(&d_x, x.size() * 4);
  cudaMalloc(&d_mean, columns * 4);
  cudaMalloc(&d_variance, columns * 4);
  cudaMemcpy(d_x, x.data(), x.size() * 4, cudaMemcpyHostToDevice);
  const int64_t one = 1;
  const char *error = ddmd::cuda_ensemble(d_x, ddmd::DType::f32, samples, columns, &columns, &one, 1, columns, 1,
                                          d_mean, d_variance, 0, false, nullptr);
  expect(error == nullptr, "launch", error ? error : "");
  cudaMemcpy(gpu.data(), d_variance, columns * 4, cudaMemcpyDeviceToHost);
  for (int64_t i = 0; i < columns; ++i) expect(close(gpu[i], variance[i], 1e-5), "variance on the device");
  cudaFree(d_x);
  cudaFree(d_mean);
  cudaFree(d_variance);
}
#endif

}  // namespace

int main() {
  for (int i = 0; ddmd::kernel_set(i) != nullptr; ++i) {
    const ddmd::Kernels &k = *ddmd::kernel_set(i);
    std::printf("%s\n", k.name);
    philox_has_the_published_answers(k);
    moments_survive_a_large_mean(k);
    a_merge_is_the_whole(k);
    losses_by_hand(k);
  }
  noise_has_unit_moments();
  norm_is_what_it_says();
#ifdef DDMD_CUDA
  cuda_agrees_with_the_cpu();
#endif
  std::printf(failures ? "%d checks failed\n" : "all hold\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
