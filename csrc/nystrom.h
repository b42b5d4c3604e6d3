// The (width, width) part of a fold for a batch of layers, on raw pointers: no framework header.
// csrc/README.md states the contract; eva_kernels/ops/nystrom.py is the caller.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace eva_kernels {

struct NystromArgs {
  const double* core;     // Y V^T, (n_layers, width, width), contiguous; the lower triangle counts
  const double* metric;   // Y Y^T, the same, symmetric
  const double* ceiling;  // of the rank of each layer, (n_layers,), contiguous
  int64_t n_layers;
  int width;
  double loose;     // rows off orthonormal by more than this are told
  int goal;         // see below
  double* scratch;  // kNystromScratch (width, width) matrices a layer; the CPU has no use for it
  double* mixing;   // (n_layers, width, width): mixing^T Y are the new rows
  double* told;     // (n_layers, nystrom_told(width)): see NystromTold
};

// Everything; or only rows that whiten the core, which is read as it is; or an orthogonalisation
// that keeps the span of the first j rows for every j, of rows whose overlaps are the core.
constexpr int kNystromSolve = 0;
constexpr int kNystromWhiten = 1;
constexpr int kNystromOrthogonal = 2;

constexpr int kNystromScratch = 3;

// The order of the numbers that the host reads of a layer.
struct NystromTold {
  double* rank;      // of the new rows; those beyond are 0
  double* uneven;    // 1 if the rows have to be orthonormalised again or completed
  double* squares;   // eigenvalues (width,), descending, 0 beyond the rank
  double* captured;  // diagonal of core (width,), none below 0
};

EVA_HOST_DEVICE inline int nystrom_told(int width) { return 2 + 2 * width; }

EVA_HOST_DEVICE inline NystromTold told_of(const NystromArgs& args, int64_t layer) {
  double* first = args.told + layer * nystrom_told(args.width);
  return {first, first + 1, first + 2, first + 2 + args.width};
}

// As in eva_kernels/streaming/nystrom.py: eigenvalues below this share of the largest are rounding
// noise, and so are entries of the diagonal of core.
constexpr double kNystromNoise = 1e-12;
// Directions of the scaled core below this eigenvalue carry no information.
constexpr double kNystromCut = 1e-6;
// A Cholesky factor L whitens if |L^-1|_F^2, which bounds what it amplifies, is below this: then
// the eigenvectors would cut nothing off.
constexpr double kNystromRegular = 1.0 / kNystromCut;

inline NystromArgs nystrom_args(uintptr_t core, uintptr_t metric, uintptr_t ceiling,
                                int64_t n_layers, int width, double loose, int goal,
                                uintptr_t scratch, uintptr_t mixing, uintptr_t told) {
  return {reinterpret_cast<const double*>(core),
          reinterpret_cast<const double*>(metric),
          reinterpret_cast<const double*>(ceiling),
          n_layers,
          width,
          loose,
          goal,
          reinterpret_cast<double*>(scratch),
          reinterpret_cast<double*>(mixing),
          reinterpret_cast<double*>(told)};
}

void nystrom_cpu(const NystromArgs& args);

// Asynchronous on `stream` of `device`; throws std::runtime_error with CUDA's own message, or where
// the matrices are wider than eigh_cuda_max_width.
void nystrom_cuda(const NystromArgs& args, int device, uintptr_t stream);

}  // namespace eva_kernels
