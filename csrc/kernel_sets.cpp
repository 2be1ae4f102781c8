// Which instruction sets were built, and which of them this CPU runs.
#include <vector>

#include "ddmd.h"

namespace ddmd {

extern const Kernels kernels_baseline;
#ifdef DDMD_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
#endif

namespace {

std::vector<const Kernels *> available_sets() {
  std::vector<const Kernels *> found;
#ifdef DDMD_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_avx512bf16);
    found.push_back(&kernels_avx512);
  }
  // every CPU with AVX2 has F16C, too, by which name older clangs do not know it
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_baseline);
  return found;
}

}  // namespace

const Kernels *kernel_set(int index) {
  static const std::vector<const Kernels *> found = available_sets();
  return index < static_cast<int>(found.size()) ? found[index] : nullptr;
}

const Kernels &kernels() {
  static const Kernels &best = *kernel_set(0);
  return best;
}

}  // namespace ddmd
