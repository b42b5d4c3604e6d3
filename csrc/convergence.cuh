// Device code of the convergence check. It includes no CUDA header, so that the tests can compile
// the same text with a host compiler (tests/emulator).
#pragma once

#include "block.cuh"
#include "convergence.h"

namespace eva_kernels {

// 4 warps: a row of 4096 columns is 8 pairs of float4 per thread. Every row of every layer is a
// block of its own: thousands of blocks, enough to fill the device.
constexpr int kConvergenceThreads = 128;

// The result is valid in lane 0 only, which suffices here.
__device__ __forceinline__ RowSums warp_sum(RowSums sums) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    sums.dot += __shfl_down_sync(0xffffffffu, sums.dot, offset);
    sums.previous += __shfl_down_sync(0xffffffffu, sums.previous, offset);
    sums.current += __shfl_down_sync(0xffffffffu, sums.current, offset);
  }
  return sums;
}

// Index of the matrix that holds `row`: the last one with first_row <= row. This skips empty
// matrices, which have the first_row of their successor.
__device__ __forceinline__ int64_t find_matrix(const ConvergenceArgs& args, int64_t row) {
  int64_t low = 0;
  int64_t high = args.n_matrices;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (args.matrices[middle].first_row <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ bool is_vector_aligned(const float* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(float4) == 0;
}

// This thread's share of the sums. In double, even on GPUs where that is slow: the row is read
// once, and the arithmetic takes less time than the loads.
__device__ __forceinline__ RowSums thread_sums(const float* __restrict__ previous,
                                               const float* __restrict__ current, int64_t columns) {
  RowSums sums{};
  int64_t done = 0;
  if (is_vector_aligned(previous) && is_vector_aligned(current)) {
    const float4* previous4 = reinterpret_cast<const float4*>(previous);
    const float4* current4 = reinterpret_cast<const float4*>(current);
    for (int64_t i = threadIdx.x; i < columns / 4; i += kConvergenceThreads) {
      const float4 x = previous4[i];
      const float4 y = current4[i];
      sums.add(x.x, y.x);
      sums.add(x.y, y.y);
      sums.add(x.z, y.z);
      sums.add(x.w, y.w);
    }
    done = columns / 4 * 4;
  }
  for (int64_t i = done + threadIdx.x; i < columns; i += kConvergenceThreads) {
    sums.add(previous[i], current[i]);
  }
  return sums;
}

// Grid: one block per row of the whole batch. `unconverged` must be zero at launch.
__global__ void __launch_bounds__(kConvergenceThreads) convergence_kernel(ConvergenceArgs args) {
  constexpr int kWarps = kConvergenceThreads / kLanes;
  __shared__ RowSums warp_sums[kWarps];

  const int64_t row = blockIdx.x;
  const int64_t m = find_matrix(args, row);
  const ConvergenceMatrix& matrix = args.matrices[m];
  const int64_t i_row = row - matrix.first_row;
  const RowSums sums =
      warp_sum(thread_sums(matrix.previous + i_row * matrix.previous_row_stride,
                           matrix.current + i_row * matrix.current_row_stride, matrix.columns));
  if (threadIdx.x % kLanes == 0) warp_sums[threadIdx.x / kLanes] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;

  RowSums total = warp_sums[0];
  for (int w = 1; w < kWarps; ++w) {
    total.dot += warp_sums[w].dot;
    total.previous += warp_sums[w].previous;
    total.current += warp_sums[w].current;
  }
  const float similarity = similarity_of(total);
  args.similarity[row] = similarity;
  if (i_row < matrix.rank && is_unconverged(similarity, args.tau)) {
    atomicAdd(&args.unconverged[m], 1);
  }
}

}  // namespace eva_kernels
