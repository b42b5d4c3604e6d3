// Sums and maxima over a block of threads. Device code without a CUDA header: tests/emulator runs
// it on a CPU.
#pragma once

namespace eva_kernels {

constexpr int kLanes = 32;
constexpr int kBlockMaxThreads = 1024;

// Block-wide reduction by `join`, in a fixed order; every thread returns the result.
template <class Join>
__device__ __forceinline__ double over_block(double x, Join join) {
  __shared__ double of_warp[kBlockMaxThreads / kLanes];
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x = join(x, __shfl_down_sync(0xffffffffu, x, offset));
  }
  __syncthreads();  // every thread has read of_warp of a preceding reduction
  if (threadIdx.x % kLanes == 0) of_warp[threadIdx.x / kLanes] = x;
  __syncthreads();
  x = of_warp[0];
  for (int i = 1; i < static_cast<int>(blockDim.x) / kLanes; ++i) x = join(x, of_warp[i]);
  return x;
}

struct Sum {
  __device__ __forceinline__ double operator()(double x, double y) const { return x + y; }
};

struct Largest {
  __device__ __forceinline__ double operator()(double x, double y) const { return fmax(x, y); }
};

}  // namespace eva_kernels
