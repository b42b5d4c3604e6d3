// Shows that the emulator detects deadlocks and missing barriers. Prints one line per probe. The
// argument "small" runs a kernel without a barrier alone, for ThreadSanitizer.
#include <cstdio>

#include "cuda_emulator.h"
#include "product.cuh"

namespace {

constexpr unsigned kThreads = 64;

__global__ void mismatched_waits(int*) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __shfl_down_sync(0xffffffffu, 1, 1);
  }
}

template <bool kBarrier>
__global__ void reverse(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = static_cast<int>(threadIdx.x + kThreads * blockIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x + kThreads * blockIdx.x] = values[kThreads - 1 - threadIdx.x];
  __syncthreads();
}

__global__ void early_exit(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  atomicAdd(out, 1);
}

struct Matrices {
  const double* left;   // (16, 4)
  const double* right;  // (4, 8)
  double* sums;         // two of (16, 8), added to in place
};

// The emulated tensor-core instruction, and the same product by shuffles.
__global__ void products(Matrices of) {
  const eva_kernels::ProductLane lane = eva_kernels::product_lane();
  const double left[2] = {of.left[lane.group * 4 + lane.within],
                          of.left[(lane.group + 8) * 4 + lane.within]};
  const double right = of.right[lane.within * 8 + lane.group];
  for (int way = 0; way < 2; ++way) {
    double* first = of.sums + way * 128 + lane.group * 8 + 2 * lane.within;
    double sum[4] = {first[0], first[1], first[64], first[65]};
    if (way == 0) {
      eva_kernels::add_product(left, right, sum);
    } else {
      eva_kernels::add_product_by_shuffles(left, right, sum);
    }
    first[0] = sum[0], first[1] = sum[1], first[64] = sum[2], first[65] = sum[3];
  }
}

// Counts the entries of both sums that differ from a plain loop.
int wrong_entries() {
  double left[64], right[32], sums[256];
  for (int i = 0; i < 64; ++i) left[i] = i * i % 23 - 7;
  for (int i = 0; i < 32; ++i) right[i] = i * i % 17 - 5;
  for (int i = 0; i < 256; ++i) sums[i] = i % 128;
  emulator::launch<Matrices>(products, 1, emulator::kWarp, {left, right, sums}, 3);
  int wrong = 0;
  for (int i = 0; i < 256; ++i) {
    double sum = i % 128;
    for (int k = 0; k < 4; ++k) sum += left[i % 128 / 8 * 4 + k] * right[k * 8 + i % 8];
    wrong += sum != sums[i];
  }
  return wrong;
}

bool is_reversed(const std::vector<int>& out) {
  for (unsigned i = 0; i < out.size(); ++i) {
    const unsigned start = i / kThreads * kThreads;
    if (out[i] != static_cast<int>(start + kThreads - 1 - i % kThreads)) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char**) {
  std::vector<int> out(2 * kThreads);
  if (argc > 1) {
    emulator::launch<int*>(reverse<false>, 1, kThreads, out.data(), 0);
    return 0;
  }
  try {
    emulator::launch<int*>(mismatched_waits, 1, kThreads, out.data(), 1);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
  int wrong[2] = {0, 0};
  for (unsigned seed = 1; seed < 6; ++seed) {
    emulator::launch<int*>(reverse<false>, 2, kThreads, out.data(), seed);
    wrong[0] += !is_reversed(out);
    emulator::launch<int*>(reverse<true>, 2, kThreads, out.data(), seed);
    wrong[1] += !is_reversed(out);
  }
  std::printf("wrong without a barrier: %s, with it: %d\n", wrong[0] > 0 ? "yes" : "no", wrong[1]);
  out[0] = 0;
  emulator::launch<int*>(early_exit, 1, kThreads, out.data(), 2);
  std::printf("after an early exit of 24 threads: %d\n", out[0]);
  std::printf("wrong entries of a product: %d\n", wrong_entries());
  return 0;
}
