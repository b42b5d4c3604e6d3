#include "convergence.h"

namespace eva_kernels {
namespace {

// Independent partial sums per row: a single one would be bound by the latency of an addition, and
// the compiler may not reorder floating-point additions.
constexpr int kChains = 8;

RowSums row_sums(const float* previous, const float* current, int64_t columns) {
  RowSums chains[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= columns; i += kChains) {
    for (int c = 0; c < kChains; ++c) chains[c].add(previous[i + c], current[i + c]);
  }
  for (; i < columns; ++i) chains[0].add(previous[i], current[i]);
  for (int c = 1; c < kChains; ++c) {
    chains[0].dot += chains[c].dot;
    chains[0].previous += chains[c].previous;
    chains[0].current += chains[c].current;
  }
  return chains[0];
}

}  // namespace

void convergence_cpu(const ConvergenceArgs& args) {
  for (int64_t m = 0; m < args.n_matrices; ++m) {
    const ConvergenceMatrix& matrix = args.matrices[m];
    int32_t unconverged = 0;
    for (int64_t row = 0; row < matrix.rows; ++row) {
      const float similarity =
          similarity_of(row_sums(matrix.previous + row * matrix.previous_row_stride,
                                 matrix.current + row * matrix.current_row_stride, matrix.columns));
      args.similarity[matrix.first_row + row] = similarity;
      if (row < matrix.rank && is_unconverged(similarity, args.tau)) ++unconverged;
    }
    args.unconverged[m] = unconverged;
  }
}

}  // namespace eva_kernels
