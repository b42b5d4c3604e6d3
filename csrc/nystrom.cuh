// Device code of the (width, width) part of a fold. It includes no CUDA header, so that the tests
// can compile the same text with a host compiler (tests/emulator).
//
// One block a layer does all of it, in the order of eva_kernels/streaming/nystrom.py: as single
// launches these are some seventy, and each is over before the host has the next one ready. The
// block decides for itself what a host would have to read numbers for: it whitens by a Cholesky
// factor, which takes about a thirtieth of the time of eigenvectors, unless the core is singular.
//
// Matrices are row-major. Below, rows of R whiten: R C R^T = 1 with C = core. What is multiplied
// stands in global memory, where the L1 cache holds it; the triangle of the eigen-decomposition is
// also where the Cholesky factorisation works.
#pragma once

#include "eigh.cuh"
#include "nystrom.h"

namespace eva_kernels {

constexpr int kStripRows = 8;  // of a product that a thread makes, in one column

struct NystromBlock {
  EighBlock eigh;
  double* scale;   // (width,), shared
  double* values;  // (width,), shared: eigenvalues, or which rows of a factor are kept
  int width;
};

// out = left right, and its transpose where one is wanted. Threads of a warp take neighbouring
// columns, so that they read one number of `left` and neighbours of `right`.
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

// Factor the matrix in the triangle, M = L L^T, and put L^-1 into the vectors, zeros above its
// diagonal. Rows and columns whose pivot is not above `cut` are left out: their rows are of no use,
// and their value is 0, otherwise 1. Every thread returns how many are kept in `rank`, and if that
// is all, |L^-1|_F^2.
__device__ __forceinline__ double invert_factor(const NystromBlock& of, double cut, int& rank) {
  const EighBlock& block = of.eigh;
  const int width = block.width;
  for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
    block.vectors[i] = i / width == i % width ? 1.0 : 0.0;
  }
  // M = U D U^T with a unit lower U: a step needs no square root, and so one barrier only.
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

// Eigenvalues, ascending, into values, and eigenvectors, as rows, into `vectors`, which is not the
// block's own. False for every thread where the matrix is not finite.
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

// Fill scale and what the layer's old rows capture. What is not above `noise` of the largest has
// scale 0.
__device__ __forceinline__ void grade(const NystromBlock& block, const double* core, double noise,
                                      double* captured) {
  double largest = 0.0;
  for (int i = threadIdx.x; i < block.width; i += blockDim.x) {
    const double entry = core[i * (block.width + 1)];
    const double positive = entry < 0.0 ? 0.0 : entry;  // NaN stays
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

// The lower triangle of the scaled core.
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

// Rows R that whiten the core, the last ones 0 if it is singular, and their transpose. `vectors` is
// overwritten. Every thread returns how many are not 0, or -1 where the core is not finite.
// `regular` tells whether a triangular whitener may do.
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
    // Eigenvalues ascend.
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

// The transpose of the orthogonalisation; rows that depend on those before are left out. Every
// thread returns how many there are.
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
    int place = 0;  // rows that are left stand first
    for (int j = 0; j < row; ++j) place += block.values[j] != 0.0;
    transposed[i % width * width + place] = block.eigh.vectors[i] * block.scale[i % width];
  }
  return rank;
}

// Divide the eigenvectors by the roots of their values, descending, 0 beyond the rank, which every
// thread returns; tells the host the squares.
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

__device__ __forceinline__ double farthest(const double* overlaps, int rank, int width) {
  double miss = 0.0;
  for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
    const int row = i / width;
    const double target = row == i % width && row < rank ? 1.0 : 0.0;
    miss = fmax(miss, fabs(overlaps[i] - target));
  }
  return over_block(miss, Largest());
}

__device__ __forceinline__ void tell(const NystromTold& told, int width, int rank, bool uneven) {
  for (int i = threadIdx.x; i < width; i += blockDim.x) told.squares[i] = 0.0;
  if (threadIdx.x == 0) *told.rank = rank, *told.uneven = uneven;
}

// What is left of a layer whose numbers are of no use: no row.
__device__ __forceinline__ void give_up(int width, const NystromTold& told, double* mixing) {
  tell(told, width, 0, true);
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
  const NystromTold told = told_of(args, layer);

  NystromBlock block{{}, scale, values, width};
  block.eigh.width = width;
  block.eigh.players = even_width(width);
  block.eigh.triangle = shared;
  block.eigh.rotations = reinterpret_cast<Rotation*>(shared + triangle(block.eigh.players));
  // Where they are in global memory, nothing else of that scratch is alive while they are.
  block.eigh.vectors = kVectorsInShared ? shared + eigh_shared_size(width, false) : c;

  const double* core = args.core + layer * size;
  // Of a random basis all entries are alike, and rows to be orthogonalised have any length.
  grade(block, core, args.goal == kNystromSolve ? kNystromNoise : 0.0, told.captured);
  if (args.goal == kNystromOrthogonal) {
    const int left = orthogonalise(block, core, mixing);
    tell(told, width, left, left < width);
    return;
  }
  const double ceiling = args.ceiling[layer];
  // Of too few tokens what lies beyond the ceiling is rounding, however large.
  const bool full = args.goal == kNystromSolve || ceiling >= width;
  const int left = whiten(block, core, full, a, mixing, b);  // R in a, its transpose in mixing
  if (left < 0) {
    give_up(width, told, mixing);
    return;
  }
  if (args.goal == kNystromWhiten) {
    const int rank = ceiling < left ? static_cast<int>(fmax(ceiling, 0.0)) : left;
    tell(told, width, rank, rank < width);
    return;
  }
  multiply(a, metric, width, c);
  multiply(c, mixing, width, b);  // G = R (Y Y^T) R^T
  if (!eigenpairs(block, b, b)) {
    give_up(width, told, mixing);
    return;
  }
  const int rank = normalise(block, b, ceiling, c, told.squares);
  multiply(c, a, width, b, mixing);  // the new rows as mixtures of those of Y
  multiply(b, metric, width, a);
  multiply(a, mixing, width, c);
  const double miss = farthest(c, rank, width);
  if (threadIdx.x == 0) *told.rank = rank, *told.uneven = rank < width || !(miss <= args.loose);
}

}  // namespace eva_kernels
