// Eigen-decomposition of a batch of small symmetric matrices on raw pointers: no framework header.
// csrc/README.md states the contract; eva_kernels/ops/eigh.py is the caller.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"

namespace eva_kernels {

struct EighArgs {
  const double* matrices;  // (n_matrices, width, width), contiguous; the lower triangle is read
  int64_t n_matrices;
  int width;
  double* values;   // (n_matrices, width), ascending
  double* vectors;  // (n_matrices, width, width): row j belongs to value j
};

// Bindings take plain integers, so that neither side needs the other's tensor type.
inline EighArgs eigh_args(uintptr_t matrices, int64_t n_matrices, int width, uintptr_t values,
                          uintptr_t vectors) {
  return {reinterpret_cast<const double*>(matrices), n_matrices, width,
          reinterpret_cast<double*>(values), reinterpret_cast<double*>(vectors)};
}

// Convergence is quadratic: 4 sweeps on nearly diagonal matrices (graded or not), 7 to 10 on random
// ones of width 16 to 128. The cap only guarantees termination.
constexpr int kEighMaxSweeps = 40;
constexpr double kEighTolerance = std::numeric_limits<double>::epsilon();
constexpr double kEighLargest = std::numeric_limits<double>::max();
constexpr double kEighNan = std::numeric_limits<double>::quiet_NaN();

EVA_HOST_DEVICE inline bool eigh_is_finite(double x) {
  return fabs(x) <= kEighLargest;  // false for NaN
}

// Power of two that brings the largest entry to [1, 2). Scaling by it is exact and keeps squares
// and quotients away from overflow and underflow.
EVA_HOST_DEVICE inline int eigh_exponent(double largest) {
  return largest > 0.0 ? ilogb(largest) : 0;
}

// A plane rotation by an angle of at most 45 degrees, as its sine and tan(angle / 2).
struct Rotation {
  double sine;
  double half;

  // (x, y) -> (cos x - sin y, sin x + cos y). In this form a small angle adds a small correction to
  // each value, so that the rounding error is small relative to that value.
  EVA_HOST_DEVICE void apply(double& x, double& y) const {
    const double old_x = x;
    x -= sine * (y + half * x);
    y += sine * (old_x - half * y);
  }
};

// On a GPU one instruction sequence in place of two, accurate to rounding.
EVA_HOST_DEVICE inline double inverse_sqrt(double x) {
#if defined(__CUDA_ARCH__)
  return rsqrt(x);
#else
  return 1.0 / sqrt(x);
#endif
}

// Annihilates off = a_pq: updates the two diagonal entries, sets `off` to zero and `rotation`.
// If `off` is negligible, returns false, sets `rotation` to the identity and changes nothing else.
//
// Negligible means relative to the two diagonal entries, not to the norm of the matrix: on a
// graded positive definite matrix, diag(d) H diag(d) with a well conditioned H, this gives small
// eigenvalues high relative accuracy (Demmel and Veselic 1992). The loop still terminates on
// singular matrices: a rotation computes off-diagonal entries from off-diagonal entries only, so
// these keep decreasing quadratically, unaffected by the rounding of large diagonal entries.
EVA_HOST_DEVICE inline bool jacobi_rotation(double& a_pp, double& a_qq, double& off,
                                            Rotation& rotation) {
  rotation = {0.0, 0.0};
  if (off * off <= kEighTolerance * kEighTolerance * fabs(a_pp * a_qq)) return false;
  // The smaller root of t^2 + 2 theta t = 1 with theta = gap / twice. A rotation's time is mostly
  // the chain of dependent roots and divisions: hence this form, which has four.
  const double gap = a_qq - a_pp, twice = 2.0 * off;
  const double size = twice / (fabs(gap) + sqrt(gap * gap + twice * twice));
  const double tangent = gap < 0.0 ? -size : size;
  const double cosine = inverse_sqrt(tangent * tangent + 1.0);
  rotation.sine = tangent * cosine;
  rotation.half = rotation.sine / (1.0 + cosine);
  a_pp -= tangent * off;
  a_qq += tangent * off;
  off = 0.0;
  return true;
}

void eigh_cpu(const EighArgs& args);

// Asynchronous on `stream` of `device`; throws std::runtime_error with CUDA's own message, or where
// the matrices are wider than eigh_cuda_max_width.
void eigh_cuda(const EighArgs& args, int device, uintptr_t stream);

// The widest matrix that a block of `device` holds in shared memory; throws without a driver.
int eigh_cuda_max_width(int device);

}  // namespace eva_kernels
