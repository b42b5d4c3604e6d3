// The (width, width) part of a fold for a batch of layers, on raw pointers: no framework header.
// csrc/README.md states the contract; eva_kernels/ops/nystrom.py is the caller.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace eva_kernels {

struct NystromArgs {
  const double* core;  // Y V^T, (n_layers, width, width), contiguous; only lower triangles are read
  const double* metric;   // Y Y^T, the same shape, symmetric
  const double* ceiling;  // upper bound of the rank of each layer, (n_layers,), contiguous
  const double* trace;  // upper bound of the sum of eigenvalues of each layer, (n_layers,); or null
  int64_t n_layers;
  int width;
  double tolerance;  // rows off orthonormal by more than this are reported as uneven
  int goal;          // see below
  double* scratch;   // kNystromScratch (width, width) matrices a layer; unused on the CPU
  double* mixing;    // (n_layers, width, width): mixing^T Y are the new rows
  double* summary;   // (n_layers, nystrom_summary_size(width)): see NystromSummary
};

// The full solution; or only rows that whiten the core, without the noise floor on its diagonal; or
// the orthonormalisation, keeping the span of the first j rows for every j, of rows whose Gram
// matrix is the core.
constexpr int kNystromSolve = 0;
constexpr int kNystromWhiten = 1;
constexpr int kNystromOrthogonal = 2;

constexpr int kNystromScratch = 3;

// The numbers that the host reads for each layer, in this order.
struct NystromSummary {
  double* rank;      // number of new rows; those beyond are 0
  double* uneven;    // 1 if the rows have to be orthonormalised again or completed, else 0
  double* squares;   // eigenvalues (width,), descending, 0 beyond the rank
  double* captured;  // diagonal of core (width,), clamped to at least 0
};

EVA_HOST_DEVICE inline int nystrom_summary_size(int width) { return 2 + 2 * width; }

EVA_HOST_DEVICE inline NystromSummary summary_of(const NystromArgs& args, int64_t layer) {
  double* first = args.summary + layer * nystrom_summary_size(args.width);
  return {first, first + 1, first + 2, first + 2 + args.width};
}

// As in eva_kernels/streaming/nystrom.py: eigenvalues, and diagonal entries of the core, below this
// fraction of the largest are rounding noise.
constexpr double kNystromNoise = 1e-12;
// If the eigenvalues sum to more than the trace, by this fraction of it, diagonal entries above
// that were noise as well, and higher fractions are tried: so many in all.
constexpr double kNystromExcess = 5e-4;
constexpr int kNystromTries = 3;

// After the last try it is the first again: fractions that do not end the excess only cost small
// eigenvalues.
EVA_HOST_DEVICE inline double nystrom_noise(int retry) {
  double noise = kNystromNoise;
  for (int i = 0; i < retry % kNystromTries; ++i) noise *= 100.0;
  return noise;
}

// Directions of the scaled core below this eigenvalue carry no information.
constexpr double kNystromCut = 1e-6;
// A Cholesky factor L is used for whitening if |L^-1|_F^2, a bound of its amplification, is below
// this: then no eigenvalue of the scaled core is below kNystromCut, and nothing would be cut off.
constexpr double kNystromRegular = 1.0 / kNystromCut;

inline NystromArgs nystrom_args(uintptr_t core, uintptr_t metric, uintptr_t ceiling,
                                uintptr_t trace, int64_t n_layers, int width, double tolerance,
                                int goal, uintptr_t scratch, uintptr_t mixing, uintptr_t summary) {
  return {reinterpret_cast<const double*>(core),
          reinterpret_cast<const double*>(metric),
          reinterpret_cast<const double*>(ceiling),
          reinterpret_cast<const double*>(trace),
          n_layers,
          width,
          tolerance,
          goal,
          reinterpret_cast<double*>(scratch),
          reinterpret_cast<double*>(mixing),
          reinterpret_cast<double*>(summary)};
}

void nystrom_cpu(const NystromArgs& args);

// Asynchronous on `stream` of `device`; throws std::runtime_error with CUDA's own message, or where
// the matrices are wider than eigh_cuda_max_width.
void nystrom_cuda(const NystromArgs& args, int device, uintptr_t stream);

}  // namespace eva_kernels
