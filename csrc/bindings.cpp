// ddmd._C: pointers as integers, shapes as lists; the GIL is released around the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "ddmd.h"
#include "parallel.h"

namespace py = pybind11;
using Address = uintptr_t;
using Sizes = std::vector<int64_t>;

namespace {

template <class T>
T *at(Address address) {
  return reinterpret_cast<T *>(address);
}
ddmd::DType type_of(int code) { return static_cast<ddmd::DType>(code); }

void check(const char *error) {
  if (error != nullptr) throw std::runtime_error(error);
}

py::dict build_info() {
  py::dict info;
  py::list sets;
  for (int i = 0; ddmd::kernel_set(i) != nullptr; ++i) sets.append(ddmd::kernel_set(i)->name);
  info["compiler"] = DDMD_COMPILER;
  info["simd"] = sets;
#ifdef DDMD_CUDA
  info["cuda"] = DDMD_CUDA_VERSION;
  info["cuda_architectures"] = DDMD_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "The C++ and CUDA core of ddmd; called through ddmd.ops.native.";
  m.attr("interface") = 2;  // ddmd.ops.native asks for it: one more whenever a function's arguments change
  m.def("build_info", &build_info);
  m.def("use_openmp", &ddmd::use_openmp);
  m.def("philox", [](Address counters, int64_t seed, Address words, int64_t count) {
    ddmd::kernels().philox(at<uint32_t>(counters), static_cast<uint64_t>(seed), at<uint32_t>(words), count);
  }, Release());
  m.def("ensemble_variance", [](Address x, int type, int64_t samples, int64_t stride, const Sizes &shape,
                                const Sizes &strides, int correction, Address mean, Address variance, int threads) {
    ddmd::ensemble_variance(at<void>(x), type_of(type), samples, stride, shape.data(), strides.data(),
                            static_cast<int>(shape.size()), correction, at<float>(mean), at<float>(variance), threads);
  }, Release());
  m.def("ensemble_update", [](Address mean, Address m2, int64_t count, Address x, int type, int64_t samples,
                              int64_t stride, const Sizes &shape, const Sizes &strides, int threads) {
    ddmd::ensemble_update(at<float>(mean), at<float>(m2), count, at<void>(x), type_of(type), samples, stride,
                          shape.data(), strides.data(), static_cast<int>(shape.size()), threads);
  }, Release());
  m.def("ensemble_merge", [](Address mean, Address m2, int64_t count, Address other_mean, Address other_m2,
                             int64_t other_count, int64_t size, int threads) {
    ddmd::ensemble_merge(at<float>(mean), at<float>(m2), count, at<float>(other_mean), at<float>(other_m2),
                         other_count, size, threads);
  }, Release());
  m.def("denoise_step", [](Address x, int type, Address output, int output_type, Address x0, Address table,
                           int64_t step, int64_t seed, Address sample, Address slice, int64_t rows, int64_t row_size,
                           int threads) {
    ddmd::denoise_step(at<void>(x), type_of(type), at<void>(output), type_of(output_type), at<void>(x0),
                       at<float>(table), step, seed, at<int64_t>(sample), at<int64_t>(slice), rows, row_size, threads);
  }, Release());
  m.def("noise", [](Address x0, Address x, int type, Address t, Address table, int64_t step, int64_t seed,
                    Address sample, Address slice, int64_t rows, int64_t row_size, int threads) {
    ddmd::noise(at<void>(x0), at<void>(x), type_of(type), at<int64_t>(t), at<float>(table), step, seed,
                at<int64_t>(sample), at<int64_t>(slice), rows, row_size, threads);
  }, Release());
  m.def("pure_noise", [](Address x, int type, int64_t step, int64_t seed, Address sample, Address slice, int64_t rows,
                         int64_t row_size, int threads) {
    ddmd::pure_noise(at<void>(x), type_of(type), step, seed, at<int64_t>(sample), at<int64_t>(slice), rows, row_size,
                     threads);
  }, Release());
  m.def("discrepancy_maps", [](Address a, Address b, int type, int64_t members_a, int64_t members_b, int64_t slices,
                               int64_t channels, int64_t pixels, Address inter, Address intra, int threads) {
    ddmd::discrepancy_maps(at<void>(a), at<void>(b), type_of(type), members_a, members_b, slices, channels, pixels,
                           at<float>(inter), at<float>(intra), threads);
  }, Release());
  m.def("gaussian_kl", [](Address mu_q, Address logvar_q, Address mu_p, Address logvar_p, int type, int64_t size,
                          double scale, bool each, Address out, int threads) {
    ddmd::Gaussians g = {};
    g.type = type_of(type);
    g.mu_q = at<void>(mu_q), g.logvar_q = at<void>(logvar_q), g.mu_p = at<void>(mu_p), g.logvar_p = at<void>(logvar_p);
    ddmd::gaussian_kl(g, size, scale, each, at<float>(out), threads);
  }, Release());
  m.def("gaussian_kl_backward", [](Address grad, bool each, float scale, Address mu_q, Address logvar_q, Address mu_p,
                                   Address logvar_p, int type, int64_t size, Address d_mu_q, Address d_logvar_q,
                                   Address d_mu_p, Address d_logvar_p, int threads) {
    ddmd::Gaussians g = {};
    g.type = type_of(type);
    g.grad = at<float>(grad), g.each = each, g.scale = scale;
    g.mu_q = at<void>(mu_q), g.logvar_q = at<void>(logvar_q), g.mu_p = at<void>(mu_p), g.logvar_p = at<void>(logvar_p);
    g.d_mu_q = at<void>(d_mu_q), g.d_logvar_q = at<void>(d_logvar_q), g.d_mu_p = at<void>(d_mu_p);
    g.d_logvar_p = at<void>(d_logvar_p);
    ddmd::gaussian_kl_backward(g, size, threads);
  }, Release());
  m.def("pairwise_sqdist", [](Address z, int type, int64_t rows, int64_t row_size, Address group, int64_t groups,
                              Address out, int threads) {
    ddmd::pairwise_sqdist(at<void>(z), type_of(type), rows, row_size, at<int64_t>(group), groups, at<float>(out),
                          threads);
  }, Release());
  m.def("pairwise_sqdist_backward", [](float grad, Address z, int type, int64_t rows, int64_t row_size, Address group,
                                       int64_t groups, Address d_z, int threads) {
    ddmd::pairwise_sqdist_backward(grad, at<void>(z), type_of(type), rows, row_size, at<int64_t>(group), groups,
                                   at<void>(d_z), threads);
  }, Release());
  m.def("group_norm_silu", [](Address x, int type, bool channels_last, int64_t batch, int64_t channels,
                              int64_t pixels, int64_t groups, Address weight, Address bias, Address scale,
                              Address shift, Address residual, double eps, Address y, Address mean, Address rstd,
                              int threads) {
    ddmd::group_norm_silu(at<void>(x), type_of(type), channels_last, batch, channels, pixels, groups,
                          at<float>(weight), at<float>(bias), at<float>(scale), at<float>(shift), at<void>(residual),
                          eps, at<void>(y), at<float>(mean), at<float>(rstd), threads);
  }, Release());
  m.def("group_norm_silu_backward", [](Address grad, Address x, int type, bool channels_last, int64_t batch,
                                       int64_t channels, int64_t pixels, int64_t groups, Address weight, Address bias,
                                       Address scale, Address shift, Address mean, Address rstd, Address d_x,
                                       Address d_weight, Address d_bias, Address d_scale, Address d_shift,
                                       int threads) {
    ddmd::group_norm_silu_backward(at<void>(grad), at<void>(x), type_of(type), channels_last, batch, channels, pixels,
                                   groups, at<float>(weight), at<float>(bias), at<float>(scale), at<float>(shift),
                                   at<float>(mean), at<float>(rstd), at<void>(d_x), at<float>(d_weight),
                                   at<float>(d_bias), at<float>(d_scale), at<float>(d_shift), threads);
  }, Release());
#ifdef DDMD_CUDA
  m.def("cuda_ensemble", [](Address x, int type, int64_t samples, int64_t stride, const Sizes &shape,
                            const Sizes &strides, int64_t size, int correction, Address mean, Address variance,
                            int64_t count, bool running, Address stream) {
    check(ddmd::cuda_ensemble(at<void>(x), type_of(type), samples, stride, shape.data(), strides.data(),
                              static_cast<int>(shape.size()), size, correction, at<float>(mean), at<float>(variance),
                              count, running, at<void>(stream)));
  }, Release());
  m.def("cuda_merge", [](Address mean, Address m2, int64_t count, Address other_mean, Address other_m2,
                         int64_t other_count, int64_t size, Address stream) {
    check(ddmd::cuda_merge(at<float>(mean), at<float>(m2), count, at<float>(other_mean), at<float>(other_m2),
                           other_count, size, at<void>(stream)));
  }, Release());
#endif
}
