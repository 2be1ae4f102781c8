// How both directions of GroupNorm + SiLU go through an image: chunks of pixels, and runs of them.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace ddmd {
namespace {

constexpr int64_t kChannels = 4096;  // most channels, so that scratch needs no allocation

// Calls one(n, chunk, first pixel, pixels) for chunks [begin, end) of all images.
template <class One>
inline void for_each_chunk(const Norm &n, int64_t begin, int64_t end, One one) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / n.chunks, first = unit % n.chunks * n.chunk;
    one(image, unit, first, n.pixels - first < n.chunk ? n.pixels - first : n.chunk);
  }
}

// Channels last: a row is several pixels, so that the innermost loop is long however few the channels;
// what belongs to a channel is repeated for each of them.
constexpr int64_t kRow = 512;  // elements of a row, about

inline int64_t pixels_per_row(const Norm &n) {
  if (!n.channels_last || n.channels >= kRow) return 1;
  const int64_t most = kRow / n.channels;
  return n.pixels < most ? n.pixels : most;
}

struct Repeated {
  alignas(64) float value[kChannels];
  Repeated(const float *of_channel, const Norm &n) {
    const int64_t pixels = pixels_per_row(n);
    for (int64_t p = 0; p < pixels; ++p) std::memcpy(value + p * n.channels, of_channel, n.channels * sizeof(float));
  }
};

// Calls row(x index, count, channel or -1): a run of pixels of one channel, or of channels of some pixels.
template <class Row>
inline void for_each_run(const Norm &n, int64_t image, int64_t first, int64_t count, Row row) {
  const int64_t step = pixels_per_row(n);
  if (n.channels_last)
    for (int64_t p = 0; p < count; p += step)
      row((image * n.pixels + first + p) * n.channels, n.channels * (count - p < step ? count - p : step), int64_t{-1});
  else
    for (int64_t c = 0; c < n.channels; ++c) row((image * n.channels + c) * n.pixels + first, count, c);
}

}  // namespace
}  // namespace ddmd
