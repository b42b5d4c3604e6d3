// Device code of the (width, width) part of a fold. It includes no CUDA header, so that the tests
// can compile the same text with a host compiler (tests/emulator).
//
// One block per layer does all steps, in the order of eva_kernels/streaming/nystrom.py: as separate
// kernels they would be some seventy launches, each finished before the host has issued the next.
// The block itself makes the decisions for which a host would have to read numbers: it whitens by a
// Cholesky factor, which takes about a thirtieth of the time of eigenvectors, unless the core is
// singular.
//
// Matrices are row-major. Below, the rows of R whiten: R C R^T = 1 with C = core. Operands of
// products are in global memory, cached in L1; the Cholesky factorisation works in the shared
// memory of the triangle of the eigen-decomposition.
#pragma once

#include "eigh.cuh"
#include "nystrom.h"

namespace eva_kernels {

constexpr int kStripRows = 8;  // rows of a product that a thread computes, in one column

struct NystromBlock {
  EighBlock eigh;
  double* scale;   // (width,), shared
  double* values;  // (width,), shared: eigenvalues, or 1 for kept rows of a factor and 0 otherwise
  int width;
};

// out = left right, and optionally its transpose. Consecutive threads take consecutive columns, so
// that a warp reads `left` as a broadcast and `right` coalesced.
__device__ __forceinline__ void multiply(const double* left, const double* right, int width,
                                         double* out, double* transposed = nullptr) {
  const int strips = (width + kStripRows - 1) / kStripRows;
  for (int task = threadIdx.x; task < strips * width; task += blockDim.x) {
    const int column = task % width;
    const int first = task / width * kStripRows;
    int row[kStripRows];
#pragma unroll
    for (int i = 0; i < kStripRows; ++i) {
      row[i] = (first + i < width ? first + i : width - 1) * width;
    }
    double sum[kStripRows] = {};
    for (int k = 0; k < width; ++k) {
      const double x = right[k * width + column];
#pragma unroll
      for (int i = 0; i < kStripRows; ++i) sum[i] += left[row[i] + k] * x;
    }
#pragma unroll
    for (int i = 0; i < kStripRows; ++i) {
      if (first + i >= width) break;
      out[(first + i) * width + column] = sum[i];
      if (transposed != nullptr) transposed[column * width + first + i] = sum[i];
    }
  }
  __syncthreads();
}

// Factor the matrix in the triangle, M = L L^T, and write L^-1 to the vectors, zeros above its
// diagonal. Rows and columns whose pivot is not above `cut` are skipped: their rows of L^-1 are
// invalid, and their `values` are 0, all others 1. Every thread sets `rank` to the number of rows
// kept, and returns |L^-1|_F^2, which is valid if all are.
__device__ __forceinline__ double invert_factor(const NystromBlock& of, double cut, int& rank) {
  const EighBlock& block = of.eigh;
  const int width = block.width;
  for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
    block.vectors[i] = i / width == i % width ? 1.0 : 0.0;
  }
  // M = U D U^T with a unit lower triangular U: a step needs no square root, hence a single
  // barrier.
  rank = 0;
  for (int k = 0; k < width; ++k) {
    __syncthreads();
    const double pivot = block.at(k, k);
    if (threadIdx.x == 0) of.values[k] = pivot > cut;
    if (!(pivot > cut)) continue;
    ++rank;
    const double inverse = 1.0 / pivot;
    const double* of_pivot = block.vectors + k * width;
    for (int i = threadIdx.x; i < (width - 1 - k) * width; i += blockDim.x) {
      const int row = k + 1 + i / width, column = i % width;
      if (column > row) continue;
      const double factor = block.at(row, k) * inverse;
      if (column > k) {
        block.at(row, column) -= factor * block.at(column, k);
      } else {
        block.vectors[row * width + column] -= factor * of_pivot[column];
      }
    }
  }
  __syncthreads();
  double squares = 0.0;
  for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
    const int row = i / width;
    const double entry = block.vectors[i] / sqrt(block.at(row, row));
    block.vectors[i] = entry;
    squares += entry * entry;
  }
  return over_block(squares, Sum());  // its barriers publish the vectors
}

// Writes the eigenvalues, ascending, to block.values and the eigenvectors, as rows, to `vectors`,
// which must not be block.eigh.vectors. Every thread returns false if the matrix is not finite.
__device__ __forceinline__ bool eigenpairs(const NystromBlock& block, const double* matrix,
                                           double* vectors) {
  bool finite = false;
  const int exponent = load(block.eigh, matrix, finite);
  if (!finite) return false;
  for (int i = 0; i < kEighMaxSweeps && sweep(block.eigh); ++i) {
  }
  store(block.eigh, exponent, block.values, vectors);
  return true;
}

// Set `captured`, the diagonal of the core clamped to at least 0, and the scale that makes it 1.
// The scale of entries that are not above `noise` times the largest is 0.
__device__ __forceinline__ void grade(const NystromBlock& block, const double* core, double noise,
                                      double* captured) {
  double largest = 0.0;
  for (int i = threadIdx.x; i < block.width; i += blockDim.x) {
    const double entry = core[i * (block.width + 1)];
    const double positive = entry < 0.0 ? 0.0 : entry;  // NaN stays NaN
    block.scale[i] = captured[i] = positive;
    largest = fmax(largest, positive);
  }
  const double floor = over_block(largest, Largest()) * noise;
  for (int i = threadIdx.x; i < block.width; i += blockDim.x) {
    const double entry = block.scale[i];
    block.scale[i] = entry > floor ? 1.0 / sqrt(entry) : 0.0;
  }
  __syncthreads();
}

// An entry of the scaled core, which is in its lower triangle.
__device__ __forceinline__ double scaled_core(const NystromBlock& block, const double* core,
                                              int entry) {
  const int row = entry / block.width, column = entry % block.width;
  return core[entry] * block.scale[row] * block.scale[column];
}

__device__ __forceinline__ void fill_triangle(const NystromBlock& block, const double* core) {
  for (int i = threadIdx.x; i < block.width * block.width; i += blockDim.x) {
    const int row = i / block.width, column = i % block.width;
    if (column <= row) block.eigh.at(row, column) = scaled_core(block, core, i);
  }
}

// Computes rows R that whiten the core, the last ones 0 if it is singular, and their transpose.
// `vectors` is overwritten. Every thread returns the number of nonzero rows, or -1 if the core is
// not finite. `regular` allows a triangular whitener.
__device__ __forceinline__ int whiten(const NystromBlock& block, const double* core, bool regular,
                                      double* rows, double* transposed, double* vectors) {
  const int width = block.width;
  fill_triangle(block, core);
  const double* whitener = block.eigh.vectors;
  int rank = 0;
  const double norm = invert_factor(block, 0.0, rank);
  regular = regular && rank == width && norm < kNystromRegular;
  if (!regular) {
    for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
      vectors[i] = i % width <= i / width ? scaled_core(block, core, i) : 0.0;
    }
    __syncthreads();
    if (!eigenpairs(block, vectors, vectors)) return -1;
    whitener = vectors;
    rank = 0;
    for (int i = 0; i < width; ++i) rank += block.values[i] > kNystromCut;
  }
  for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
    // Eigenvalues are ascending: take them from the end.
    const int row = regular ? i / width : width - 1 - i / width;
    const double value = regular ? 1.0 : block.values[row];
    const double factor = value > kNystromCut ? 1.0 / sqrt(value) : 0.0;
    const double entry = factor * whitener[row * width + i % width] * block.scale[i % width];
    rows[i] = entry;
    transposed[i % width * width + i / width] = entry;
  }
  __syncthreads();
  return rank;
}

// Computes R, its transpose, and in block.values and `vectors` the eigenpairs of
// G = R (Y Y^T) R^T. `product` is overwritten. Every thread returns false if one is not finite.
__device__ __forceinline__ bool white_eigenpairs(const NystromBlock& block, const double* core,
                                                 const double* metric, double* rows,
                                                 double* transposed, double* vectors,
                                                 double* product) {
  if (whiten(block, core, true, rows, transposed, vectors) < 0) return false;
  multiply(rows, metric, block.width, product);
  multiply(product, transposed, block.width, vectors);
  return eigenpairs(block, vectors, vectors);
}

// Computes the transpose of the matrix that orthonormalises rows whose Gram matrix is `core`.
// Linearly dependent rows are dropped. Every thread returns the number of rows left.
__device__ __forceinline__ int orthogonalise(const NystromBlock& block, const double* core,
                                             double* transposed) {
  const int width = block.width;
  fill_triangle(block, core);
  int rank = 0;
  invert_factor(block, kNystromNoise, rank);
  for (int i = threadIdx.x; i < width * width; i += blockDim.x) transposed[i] = 0.0;
  __syncthreads();
  for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
    const int row = i / width;
    if (block.values[row] == 0.0) continue;
    int place = 0;  // the rows left come first, in order
    for (int j = 0; j < row; ++j) place += block.values[j] != 0.0;
    transposed[i % width * width + place] = block.eigh.vectors[i] * block.scale[i % width];
  }
  return rank;
}

// Whether the positive eigenvalues in block.values sum to more than the trace allows.
__device__ __forceinline__ bool exceeds_trace(const NystromBlock& block, const NystromArgs& args,
                                              int64_t layer) {
  if (args.trace == nullptr) return false;
  double sum = 0.0;
  for (int i = threadIdx.x; i < block.width; i += blockDim.x) sum += fmax(block.values[i], 0.0);
  sum = over_block(sum, Sum());
  return sum > (1.0 + kNystromExcess) * args.trace[layer];
}

// Divide the eigenvectors by the square roots of their eigenvalues, in descending order, 0 beyond
// the rank. Write the eigenvalues to `squares`. Every thread returns the rank.
__device__ __forceinline__ int normalise(const NystromBlock& block, const double* vectors,
                                         double ceiling, double* out, double* squares) {
  const int width = block.width;
  const double largest = fmax(block.values[width - 1], 0.0);
  int rank = 0;
  while (rank < width && block.values[width - 1 - rank] > kNystromNoise * largest) ++rank;
  if (rank > ceiling) rank = static_cast<int>(fmax(ceiling, 0.0));
  for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
    const int row = i / width, from = width - 1 - row;
    const double factor = row < rank ? 1.0 / sqrt(block.values[from]) : 0.0;
    out[i] = factor * vectors[from * width + i % width];
  }
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    squares[i] = i < rank ? block.values[width - 1 - i] : 0.0;
  }
  __syncthreads();
  return rank;
}

// The largest deviation of the Gram matrix of `rank` rows from orthonormality.
__device__ __forceinline__ double largest_deviation(const double* overlaps, int rank, int width) {
  double deviation = 0.0;
  for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
    const int row = i / width;
    const double target = row == i % width && row < rank ? 1.0 : 0.0;
    deviation = fmax(deviation, fabs(overlaps[i] - target));
  }
  return over_block(deviation, Largest());
}

__device__ __forceinline__ void write_summary(const NystromSummary& summary, int width, int rank,
                                              bool uneven) {
  for (int i = threadIdx.x; i < width; i += blockDim.x) summary.squares[i] = 0.0;
  if (threadIdx.x == 0) *summary.rank = rank, *summary.uneven = uneven;
}

// The result for a layer whose numbers are not finite: rank 0, uneven, a mixing of zeros.
__device__ __forceinline__ void write_failure(int width, const NystromSummary& summary,
                                              double* mixing) {
  write_summary(summary, width, 0, true);
  for (int i = threadIdx.x; i < width * width; i += blockDim.x) mixing[i] = 0.0;
}

// Grid: layers; threads: eigh_threads(width); dynamic shared memory: eigh_shared_size doubles.
template <bool kVectorsInShared>
__global__ void __launch_bounds__(kEighMaxThreads) nystrom_kernel(NystromArgs args) {
  EVA_DYNAMIC_SHARED(double, shared);
  __shared__ double scale[kEighMaxWidth], values[kEighMaxWidth];
  const int width = args.width;
  const int64_t size = int64_t(width) * width, layer = blockIdx.x;
  double* a = args.scratch + layer * kNystromScratch * size;
  double *b = a + size, *c = b + size;
  double* mixing = args.mixing + layer * size;
  const double* metric = args.metric + layer * size;
  const NystromSummary summary = summary_of(args, layer);

  NystromBlock block{{}, scale, values, width};
  block.eigh.width = width;
  block.eigh.players = even_width(width);
  block.eigh.triangle = shared;
  block.eigh.rotations = reinterpret_cast<Rotation*>(shared + triangle(block.eigh.players));
  // In global memory the vectors share `c`, which holds nothing else while they are in use.
  block.eigh.vectors = kVectorsInShared ? shared + eigh_shared_size(width, false) : c;

  const double* core = args.core + layer * size;
  if (args.goal == kNystromOrthogonal) {
    grade(block, core, 0.0, summary.captured);  // rows may have any length
    const int left = orthogonalise(block, core, mixing);
    write_summary(summary, width, left, left < width);
    return;
  }
  const double ceiling = args.ceiling[layer];
  if (args.goal == kNystromWhiten) {
    // With a random basis all diagonal entries are of similar size. With too few tokens, directions
    // beyond the ceiling are rounding noise, however large.
    grade(block, core, 0.0, summary.captured);
    const int left = whiten(block, core, ceiling >= width, a, mixing, b);
    if (left < 0) {
      write_failure(width, summary, mixing);
      return;
    }
    const int rank = ceiling < left ? static_cast<int>(fmax(ceiling, 0.0)) : left;
    write_summary(summary, width, rank, rank < width);
    return;
  }
  for (int retry = 0;; ++retry) {
    grade(block, core, nystrom_noise(retry), summary.captured);
    if (!white_eigenpairs(block, core, metric, a, mixing, b, c)) {
      write_failure(width, summary, mixing);
      return;
    }
    if (retry == kNystromTries || !exceeds_trace(block, args, layer)) break;
  }
  const int rank = normalise(block, b, ceiling, c, summary.squares);
  multiply(c, a, width, b, mixing);  // the new rows as linear combinations of those of Y
  multiply(b, metric, width, a);
  multiply(a, mixing, width, c);
  const double deviation = largest_deviation(c, rank, width);
  if (threadIdx.x == 0)
    *summary.rank = rank, *summary.uneven = rank < width || !(deviation <= args.tolerance);
}

}  // namespace eva_kernels
