// X and Y, whole: how pixels are cut over threads.
#include "ddmd.h"
#include "parallel.h"

namespace ddmd {

void discrepancy_maps(const void *a, const void *b, DType type, int64_t members_a, int64_t members_b, int64_t slices,
                      int64_t channels, int64_t pixels, float *inter, float *intra, int threads) {
  parallel_for(slices * ((pixels + 2047) / 2048), 16, threads, [&](int64_t begin, int64_t end) {
    kernels().discrepancy_maps(a, b, type, members_a, members_b, slices, channels, pixels, slices * pixels * 8 > kCacheBytes, inter,
                   intra, begin, end);
  });
}

}  // namespace ddmd
