// KL of diagonal Gaussians, and the squared deviations of rows from their mean.
#include "kernels.h"
#include "simd.h"

namespace ddmd {
namespace {

constexpr int64_t kBlock = 2048;  // elements whose sum is float32

template <class T>
__attribute__((always_inline)) inline float kl_of(T mu_q, T logvar_q, T mu_p, T logvar_p) {
  const float lq = upcast(logvar_q), lp = upcast(logvar_p), difference = upcast(mu_q) - upcast(mu_p);
  return 0.5f * (lp - lq + exp_(lq - lp) + difference * difference * exp_(-lp) - 1.0f);
}

template <class T>
struct Pointers {
  const T *mu_q, *logvar_q, *mu_p, *logvar_p;
  explicit Pointers(const Gaussians &g)
      : mu_q(static_cast<const T *>(g.mu_q)), logvar_q(static_cast<const T *>(g.logvar_q)),
        mu_p(static_cast<const T *>(g.mu_p)), logvar_p(static_cast<const T *>(g.logvar_p)) {}
  __attribute__((always_inline)) inline void prefetch(int64_t i) const {
    prefetch_strip(mu_q + i);
    prefetch_strip(logvar_q + i);
    prefetch_strip(mu_p + i);
    prefetch_strip(logvar_p + i);
  }
};

}  // namespace

namespace DDMD_ISA {
void gaussian_kl(const Gaussians &g, float *out, int64_t begin, int64_t end) {
  with_type(g.type, [&](auto zero) {
    const Pointers<decltype(zero)> p(g);
DDMD_IVDEP
    for (int64_t i = begin; i < end; ++i) out[i] = kl_of(p.mu_q[i], p.logvar_q[i], p.mu_p[i], p.logvar_p[i]);
  });
}

double gaussian_kl_sum(const Gaussians &g, int64_t begin, int64_t end) {
  double total = 0.0;
  with_type(g.type, [&](auto zero) {
    const Pointers<decltype(zero)> p(g);
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t last = end - first < kBlock ? end : first + kBlock;
      float sum[kStrip] = {};
      int64_t i = first;
      for (; i + kStrip <= last; i += kStrip) {
        p.prefetch(i);
        for (int64_t j = 0; j < kStrip; ++j)
          sum[j] += kl_of(p.mu_q[i + j], p.logvar_q[i + j], p.mu_p[i + j], p.logvar_p[i + j]);
      }
      for (int64_t j = 0; j < last - i; ++j)
        sum[j] += kl_of(p.mu_q[i + j], p.logvar_q[i + j], p.mu_p[i + j], p.logvar_p[i + j]);
      for (int64_t j = 0; j < kStrip; ++j) total += sum[j];
    }
  });
  return total;
}

void gaussian_kl_grads(const Gaussians &g, int64_t begin, int64_t end) {
  with_type(g.type, [&](auto zero) {
    using T = decltype(zero);
    const Pointers<T> p(g);
    T *d_mu_q = static_cast<T *>(g.d_mu_q), *d_logvar_q = static_cast<T *>(g.d_logvar_q);
    T *d_mu_p = static_cast<T *>(g.d_mu_p), *d_logvar_p = static_cast<T *>(g.d_logvar_p);
    const float *of_each = g.grad, scale = g.scale, of_all = g.each ? 0.0f : g.grad[0] * g.scale;
    const bool each = g.each;
DDMD_IVDEP
    for (int64_t i = begin; i < end; ++i) {
      const float grad = each ? of_each[i] * scale : of_all;
      const float lq = upcast(p.logvar_q[i]), lp = upcast(p.logvar_p[i]);
      const float difference = upcast(p.mu_q[i]) - upcast(p.mu_p[i]);
      const float precision = exp_(-lp), ratio = exp_(lq - lp), d_mu = grad * difference * precision;
      d_mu_q[i] = downcast<T>(d_mu);
      d_mu_p[i] = downcast<T>(-d_mu);
      d_logvar_q[i] = downcast<T>(grad * 0.5f * (ratio - 1.0f));
      d_logvar_p[i] = downcast<T>(grad * 0.5f * (1.0f - ratio - difference * difference * precision));
    }
  });
}
}  // namespace DDMD_ISA

namespace {

// ---- rows about their mean: sums about the mean of the first few, which no common mean or outlier disturbs

constexpr int64_t kTogether = 8;   // rows read side by side
constexpr int64_t kSegment = 512;  // rows whose sums are about one pivot

// Sums of (row - pivot) and of its square over the rows, of `n` columns from `first`; the pivot is the mean of the
// first rows.
template <class T>
inline void pivot_sums(const T *z, int64_t row_size, const int64_t *rows, int64_t count, int64_t first, int64_t n,
                       float *pivot, float *sum, float *square) {
  const int64_t few = count < kTogether ? count : kTogether;
  for (int64_t i = 0; i < n; ++i) pivot[i] = 0.0f, sum[i] = 0.0f, square[i] = 0.0f;
  for (int64_t k = 0; k < few; ++k) {
    const T *row = z + rows[k] * row_size + first;
    for (int64_t i = 0; i < n; ++i) pivot[i] += upcast(row[i]);
  }
  for (int64_t i = 0; i < n; ++i) pivot[i] *= 1.0f / static_cast<float>(few);
  int64_t r = 0;
  for (; r + kTogether <= count; r += kTogether) {
    const T *row[kTogether];
    for (int64_t k = 0; k < kTogether; ++k) row[k] = z + rows[r + k] * row_size + first;
DDMD_IVDEP
    for (int64_t i = 0; i < n; ++i) {
      const float origin = pivot[i];
      float s = sum[i], q = square[i];
      for (int64_t k = 0; k < kTogether; ++k) {
        const float d = upcast(row[k][i]) - origin;
        s += d;
        q += d * d;
      }
      sum[i] = s;
      square[i] = q;
    }
  }
  for (; r < count; ++r) {
    const T *row = z + rows[r] * row_size + first;
DDMD_IVDEP
    for (int64_t i = 0; i < n; ++i) {
      const float d = upcast(row[i]) - pivot[i];
      sum[i] += d;
      square[i] += d * d;
    }
  }
}

// Mean and M2 of the rows, segments merged as Chan et al. do.
template <class T>
inline void row_moments(const T *z, int64_t row_size, const int64_t *rows, int64_t count, int64_t first, int64_t n,
                        float *mean, float *m2) {
  alignas(64) float pivot[kRowColumns], sum[kRowColumns], square[kRowColumns];
  for (int64_t done = 0; done < count; done += kSegment) {
    const int64_t more = count - done < kSegment ? count - done : kSegment;
    pivot_sums(z, row_size, rows + done, more, first, n, pivot, sum, square);
    const float share = 1.0f / static_cast<float>(more), part = static_cast<float>(more) / (done + more);
    const float cross = static_cast<float>(done) * part;
    for (int64_t i = 0; i < n; ++i) {
      const float own = sum[i] * share, own_m2 = square[i] - sum[i] * own;
      const float centre = pivot[i] + own;
      if (done == 0) {
        mean[i] = centre;
        m2[i] = own_m2;
      } else {
        const float delta = centre - mean[i];
        mean[i] += delta * part;
        m2[i] += own_m2 + delta * delta * cross;
      }
    }
  }
}

}  // namespace

namespace DDMD_ISA {
double row_deviations(const void *z, DType type, int64_t row_size, const int64_t *rows, int64_t count, int64_t first,
                      int64_t columns) {
  double total = 0.0;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    alignas(64) float mean[kRowColumns], m2[kRowColumns];
    row_moments(static_cast<const T *>(z), row_size, rows, count, first, columns, mean, m2);
    for (int64_t i = 0; i < columns; ++i) total += m2[i];
  });
  return total;
}

void row_deviation_grads(const void *z, void *d_z, DType type, int64_t row_size, const int64_t *rows, int64_t count,
                         int64_t first, int64_t columns, float factor) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    alignas(64) float mean[kRowColumns], m2[kRowColumns];
    row_moments(static_cast<const T *>(z), row_size, rows, count, first, columns, mean, m2);
    for (int64_t r = 0; r < count; ++r) {
      const T *from = static_cast<const T *>(z) + rows[r] * row_size + first;
      T *to = static_cast<T *>(d_z) + rows[r] * row_size + first;
DDMD_IVDEP
      for (int64_t i = 0; i < columns; ++i) to[i] = downcast<T>(factor * (upcast(from[i]) - mean[i]));
    }
  });
}
}  // namespace DDMD_ISA

}  // namespace ddmd
