// The convergence check on raw pointers: no framework header, usable from any host language.
// csrc/README.md states the contract; eva_kernels/ops/convergence.py is the caller.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace eva_kernels {

// One matrix of the ragged batch, previous and current. The caller fills a table of these as int64
// rows.
struct ConvergenceMatrix {
  const float* previous;
  const float* current;
  int64_t previous_row_stride;  // in elements; the last dimension is contiguous
  int64_t current_row_stride;
  int64_t rows;
  int64_t columns;
  int64_t first_row;  // total rows of the preceding matrices
  int64_t rank;       // how many leading rows count for `unconverged`
};
static_assert(sizeof(ConvergenceMatrix) == 8 * sizeof(int64_t), "the table is int64 (n, 8)");

struct ConvergenceArgs {
  const ConvergenceMatrix* matrices;
  int64_t n_matrices;
  int64_t n_rows;  // total rows of all matrices
  float tau;
  float* similarity;     // (n_rows,)
  int32_t* unconverged;  // (n_matrices,)
};

// Bindings take plain integers, so that neither side needs the other's tensor type.
inline ConvergenceArgs convergence_args(uintptr_t matrices, int64_t n_matrices, int64_t n_rows,
                                        float tau, uintptr_t similarity, uintptr_t unconverged) {
  return {reinterpret_cast<const ConvergenceMatrix*>(matrices),
          n_matrices,
          n_rows,
          tau,
          reinterpret_cast<float*>(similarity),
          reinterpret_cast<int32_t*>(unconverged)};
}

// Sums over one pair of rows. Products of two floats are exact in double, so only the additions
// round, and the CPU and the GPU differ only by their order.
struct RowSums {
  double dot;
  double previous;  // squared norms
  double current;

  EVA_HOST_DEVICE void add(double x, double y) {
    dot += x * y;
    previous += x * x;
    current += y * y;
  }
};

// |cos| of the two rows: 0 if one of them is zero, NaN if one of them holds a NaN or an infinity.
EVA_HOST_DEVICE inline float similarity_of(const RowSums& sums) {
  const double scale = sqrt(sums.previous) * sqrt(sums.current);
  return scale == 0.0 ? 0.0f : static_cast<float>(fabs(sums.dot / scale));
}

// Negated on purpose: a NaN has not converged.
EVA_HOST_DEVICE inline bool is_unconverged(float similarity, float tau) {
  return !(similarity >= tau);
}

void convergence_cpu(const ConvergenceArgs& args);

// Asynchronous on `stream` of `device`; throws std::runtime_error with CUDA's own message.
void convergence_cuda(const ConvergenceArgs& args, int device, uintptr_t stream);

}  // namespace eva_kernels
