// Products of small float64 matrices by a warp. Device code without a CUDA header: tests/emulator
// runs it on a CPU.
//
// Tensor cores have twice the float64 rate of the FP64 units, and load each operand from shared
// memory once, where a thread that computes its own part of a product loads it several times.
// Without them (before compute capability 8.0, and in the tests) shuffles emulate the instruction:
// PTX ISA, "Matrix Fragments for mma.m8n8k4 with .f64", and the same for mma.m16n8k4.
#pragma once

#include "block.cuh"

namespace eva_kernels {

constexpr int kProductRows = 16;
constexpr int kProductColumns = 8;
constexpr int kProductDepth = 4;

// Which entries of the three fragments a lane holds.
struct ProductLane {
  int group;   // left: rows group and group + 8; right: column; sum: rows group and group + 8
  int within;  // left: column; right: row; sum: columns 2 within and 2 within + 1
};

__device__ __forceinline__ ProductLane product_lane() {
  const int lane = threadIdx.x % kLanes;
  return {lane / kProductDepth, lane % kProductDepth};
}

// sum += left right, (16, 4) by (4, 8), by all lanes of a warp together. `sum` holds the lane's two
// columns of its first row, then those of its second.
__device__ __forceinline__ void add_product_by_shuffles(const double (&left)[2], double right,
                                                        double (&sum)[4]) {
  constexpr unsigned kAll = 0xffffffffu;
  const ProductLane lane = product_lane();
#pragma unroll
  for (int k = 0; k < kProductDepth; ++k) {
    double of_right[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      of_right[j] = __shfl_sync(kAll, right, (2 * lane.within + j) * kProductDepth + k);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const double of_left = __shfl_sync(kAll, left[i], lane.group * kProductDepth + k);
#pragma unroll
      for (int j = 0; j < 2; ++j) sum[2 * i + j] += of_left * of_right[j];
    }
  }
}

// The same, by the tensor cores if the target architecture has float64 ones.
__device__ __forceinline__ void add_product(const double (&left)[2], double right,
                                            double (&sum)[4]) {
#if defined(EVA_ADD_PRODUCT)  // set by the tests: shuffles in the emulator would take minutes
  EVA_ADD_PRODUCT(left, right, sum);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+d"(sum[0]), "+d"(sum[1]), "+d"(sum[2]), "+d"(sum[3])
      : "d"(left[0]), "d"(left[1]), "d"(right));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(sum[2 * i]), "+d"(sum[2 * i + 1])
        : "d"(left[i]), "d"(right));
  }
#else
  add_product_by_shuffles(left, right, sum);
#endif
}

}  // namespace eva_kernels
