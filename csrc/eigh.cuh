// Device code of the batched symmetric eigen-decomposition. It includes no CUDA header, so that the
// tests can compile the same text with a host compiler (tests/emulator).
//
// One block per matrix, two-sided Jacobi. For matrices this small the alternative, tridiagonal form
// and QL, is one long chain of dependent divisions and square roots; here every step is parallel.
// Jacobi is also more accurate on graded matrices, needs no second phase for the vectors, and
// cannot fail: the product of rotations is always orthogonal.
//
// A sweep has width - 1 rounds (a round-robin tournament), each of width / 2 disjoint pairs (p, q):
//   1. thread k finds the rotation of pair k from a_pp, a_qq, a_pq, and a barrier publishes it;
//   2. all threads rotate: every two pairs share a 2 x 2 block of the matrix, which one thread
//      reads, rotates from both sides and writes, so that no other barrier is needed; one warp
//      rotates the two rows of vectors of a pair.
// It stops after a sweep in which no pair rotated. A round without rotations skips step 2.
//
// Shared memory holds the lower triangle, packed: 65 KiB at width 128, which any device from
// compute capability 8.0 on has, and which leaves room for the vectors as well on the large ones
// (otherwise they are accumulated in the output array, through the L1 cache). Consecutive lanes
// take consecutive pairs and so walk along rows, columns or diagonals of the triangle: addresses
// are quadratic in the lane with an odd second difference, and spread over the banks like
// triangular numbers, without padding (2.1 times the ideal number of cycles at width 128, counted).
#pragma once

#include "block.cuh"
#include "eigh.h"

namespace eva_kernels {

constexpr int kEighMaxThreads = kBlockMaxThreads;
constexpr int kEighMaxWidth = 128;

// Enough threads for the 2 x 2 blocks of a round; the vectors are as much work again.
inline int eigh_threads(int width) {
  if (width <= 16) return 64;
  if (width <= 32) return 128;
  return width <= 64 ? 512 : kEighMaxThreads;
}

EVA_HOST_DEVICE inline int triangle(int n) { return n * (n + 1) / 2; }

// Players of the tournament: an odd width gets a row of zeros, which never rotates.
EVA_HOST_DEVICE inline int even_width(int width) { return width + width % 2; }

// Shared memory in doubles: triangle, rotations (later the diagonal), order, vectors.
EVA_HOST_DEVICE inline int eigh_shared_size(int width, bool vectors_in_shared) {
  const int even = even_width(width);
  return triangle(even) + even + even / 2 + (vectors_in_shared ? width * width : 0);
}

struct EighBlock {
  double* triangle;
  Rotation* rotations;  // of this round's pairs
  double* vectors;      // rows, in shared or in global memory
  int width;
  int players;

  // Position of entry (i, j) or (j, i), whichever is in the lower triangle.
  __device__ __forceinline__ double& at(int i, int j) const {
    return i > j ? triangle[i * (i + 1) / 2 + j] : triangle[j * (j + 1) / 2 + i];
  }
};

struct Pair {
  int p, q;
};

// Pair k of a round: the last player is fixed, the others rotate on a circle and meet across it.
__device__ __forceinline__ Pair pair_of(int k, int round, int players) {
  const int circle = players - 1;
  if (k == 0) return {round, circle};
  const int p = round + k;
  const int q = round - k;
  return {p >= circle ? p - circle : p, q < 0 ? q + circle : q};
}

// Rotate the rest of the matrix: the 2 x 2 block of every two pairs, from both sides.
__device__ __forceinline__ void rotate_blocks(const EighBlock& block, int round) {
  const int pairs = block.players / 2;
  for (int i = threadIdx.x; i < pairs * (pairs - 1) / 2; i += blockDim.x) {
    // Pair `a` and the pair `distance` further on, cyclically: every two pairs occur once.
    const int distance = i / pairs + 1;
    const int a = i % pairs;
    const int b = a + distance < pairs ? a + distance : a + distance - pairs;
    const Rotation rotation_a = block.rotations[a];
    const Rotation rotation_b = block.rotations[b];
    if (rotation_a.sine == 0.0 && rotation_b.sine == 0.0) continue;
    const Pair x = pair_of(a, round, block.players);
    const Pair y = pair_of(b, round, block.players);
    double& pp = block.at(x.p, y.p);
    double& pq = block.at(x.p, y.q);
    double& qp = block.at(x.q, y.p);
    double& qq = block.at(x.q, y.q);
    double v_pp = pp, v_pq = pq, v_qp = qp, v_qq = qq;
    rotation_a.apply(v_pp, v_qp);
    rotation_a.apply(v_pq, v_qq);
    rotation_b.apply(v_pp, v_pq);
    rotation_b.apply(v_qp, v_qq);
    pp = v_pp;
    pq = v_pq;
    qp = v_qp;
    qq = v_qq;
  }
}

// A warp takes a pair, so that lanes read consecutive elements and skip identities together.
__device__ __forceinline__ void rotate_vectors(const EighBlock& block, int round) {
  const int lane = threadIdx.x % kLanes;
  for (int k = threadIdx.x / kLanes; k < block.players / 2; k += blockDim.x / kLanes) {
    const Rotation rotation = block.rotations[k];
    if (rotation.sine == 0.0) continue;
    const Pair pair = pair_of(k, round, block.players);
    double* row_p = block.vectors + pair.p * block.width;
    double* row_q = block.vectors + pair.q * block.width;
    for (int i = lane; i < block.width; i += kLanes) {
      double x = row_p[i], y = row_q[i];
      rotation.apply(x, y);
      row_p[i] = x;
      row_q[i] = y;
    }
  }
}

// Every thread returns whether any pair rotated.
__device__ __forceinline__ bool sweep(const EighBlock& block) {
  bool any = false;
  for (int round = 0; round < block.players - 1; ++round) {
    bool rotated = false;
    for (int k = threadIdx.x; k < block.players / 2; k += blockDim.x) {
      const Pair pair = pair_of(k, round, block.players);
      rotated |= jacobi_rotation(block.at(pair.p, pair.p), block.at(pair.q, pair.q),
                                 block.at(pair.p, pair.q), block.rotations[k]);
    }
    if (!__syncthreads_or(rotated)) continue;
    any = true;
    rotate_blocks(block, round);
    rotate_vectors(block, round);
    __syncthreads();
  }
  return any;
}

// Copy the scaled matrix and initialise the vectors. Every thread returns the exponent of the scale
// and sets `finite`, which is false if an entry is NaN or infinite.
__device__ __forceinline__ int load(const EighBlock& block, const double* matrix, bool& finite) {
  const int width = block.width;
  double largest = 0.0;
  bool bad = false;
  for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
    const int row = i / width;
    const int column = i % width;
    block.vectors[i] = row == column ? 1.0 : 0.0;
    if (column > row) continue;
    const double x = matrix[i];
    block.at(row, column) = x;
    bad |= !eigh_is_finite(x);
    largest = fmax(largest, fabs(x));
  }
  for (int i = triangle(width) + threadIdx.x; i < triangle(block.players); i += blockDim.x) {
    block.triangle[i] = 0.0;
  }
  largest = over_block(largest, Largest());
  finite = !__syncthreads_or(bad);
  const int exponent = finite ? eigh_exponent(largest) : 0;
  for (int i = threadIdx.x; i < triangle(width); i += blockDim.x) {
    block.triangle[i] = scalbn(block.triangle[i], -exponent);
  }
  __syncthreads();
  return exponent;
}

// Choose signs so that the component of largest magnitude of every vector (the first, if several
// are equal) is positive.
__device__ __forceinline__ void fix_signs(const EighBlock& block) {
  const int lane = threadIdx.x % kLanes;
  for (int j = threadIdx.x / kLanes; j < block.width; j += blockDim.x / kLanes) {
    double* row = block.vectors + j * block.width;
    int peak = lane;
    double value = 0.0;  // at the peak; reading it there again would race with its sign change
    for (int i = lane; i < block.width; i += kLanes) {
      if (fabs(row[i]) > fabs(value)) {
        peak = i;
        value = row[i];
      }
    }
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      const double other = __shfl_down_sync(0xffffffffu, value, offset);
      const int other_peak = __shfl_down_sync(0xffffffffu, peak, offset);
      if (fabs(other) > fabs(value) || (fabs(other) == fabs(value) && other_peak < peak)) {
        peak = other_peak;
        value = other;
      }
    }
    const int negative = __shfl_sync(0xffffffffu, value < 0.0, 0);
    if (!negative) continue;
    for (int i = lane; i < block.width; i += kLanes) row[i] = -row[i];
  }
}

// Write values and vectors in ascending order; equal values keep the order of the diagonal. The
// vectors are permuted through the memory of the triangle, one half of the columns at a time,
// because the output may be where they are stored.
__device__ __forceinline__ void store(const EighBlock& block, int exponent, double* values,
                                      double* vectors) {
  const int width = block.width;
  double* diagonal = reinterpret_cast<double*>(block.rotations);
  int* order = reinterpret_cast<int*>(diagonal + block.players);
  for (int j = threadIdx.x; j < width; j += blockDim.x) diagonal[j] = block.at(j, j);
  fix_signs(block);
  __syncthreads();
  for (int j = threadIdx.x; j < width; j += blockDim.x) {
    const double value = diagonal[j];
    int rank = 0;
    for (int i = 0; i < width; ++i) {
      rank += diagonal[i] < value || (diagonal[i] == value && i < j);
    }
    order[rank] = j;
    values[rank] = scalbn(value, exponent);
  }
  __syncthreads();
  const int half = (width + 1) / 2;
  for (int first = 0; first < width; first += half) {
    const int columns = first + half < width ? half : width - first;
    for (int i = threadIdx.x; i < width * columns; i += blockDim.x) {
      block.triangle[i] = block.vectors[order[i / columns] * width + first + i % columns];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width * columns; i += blockDim.x) {
      vectors[i / columns * width + first + i % columns] = block.triangle[i];
    }
    __syncthreads();
  }
}

// Grid: one block per matrix; threads: a multiple of 32; dynamic shared memory: eigh_shared_size
// doubles.
template <bool kVectorsInShared>
__global__ void __launch_bounds__(kEighMaxThreads) eigh_kernel(EighArgs args) {
  EVA_DYNAMIC_SHARED(double, shared);
  const int width = args.width;
  const int64_t size = int64_t(width) * width;
  double* values = args.values + blockIdx.x * int64_t(width);
  double* vectors = args.vectors + blockIdx.x * size;
  EighBlock block{};
  block.width = width;
  block.players = even_width(width);
  block.triangle = shared;
  block.rotations = reinterpret_cast<Rotation*>(shared + triangle(block.players));
  block.vectors = kVectorsInShared ? shared + eigh_shared_size(width, false) : vectors;

  bool finite = false;
  const int exponent = load(block, args.matrices + blockIdx.x * size, finite);
  if (!finite) {
    for (int i = threadIdx.x; i < width; i += blockDim.x) values[i] = kEighNan;
    for (int i = threadIdx.x; i < width * width; i += blockDim.x) vectors[i] = kEighNan;
    return;
  }
  for (int i = 0; i < kEighMaxSweeps && sweep(block); ++i) {
  }
  store(block, exponent, values, vectors);
}

}  // namespace eva_kernels
