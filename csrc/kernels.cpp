// The table of one instruction set's kernels, which the whole operations (ops_*.cpp) call by.
#include "kernels.h"

#define DDMD_STRING_(x) #x
#define DDMD_STRING(x) DDMD_STRING_(x)
#define DDMD_CONCAT_(a, b) a##b
#define DDMD_CONCAT(a, b) DDMD_CONCAT_(a, b)

namespace ddmd {

extern const Kernels DDMD_CONCAT(kernels_, DDMD_ISA);
const Kernels DDMD_CONCAT(kernels_, DDMD_ISA) = {
    DDMD_STRING(DDMD_ISA),
    DDMD_ISA::moments,
    DDMD_ISA::moments_strided,
    DDMD_ISA::update,
    DDMD_ISA::merge,
    DDMD_ISA::denoise,
    DDMD_ISA::noise,
    DDMD_ISA::pure_noise,
    DDMD_ISA::philox,
    DDMD_ISA::discrepancy_maps,
    DDMD_ISA::gaussian_kl,
    DDMD_ISA::gaussian_kl_sum,
    DDMD_ISA::gaussian_kl_grads,
    DDMD_ISA::row_deviations,
    DDMD_ISA::row_deviation_grads,
    DDMD_ISA::norm_moments,
    DDMD_ISA::norm_apply,
    DDMD_ISA::norm_grad_sums,
    DDMD_ISA::norm_grad_apply,
};

}  // namespace ddmd
