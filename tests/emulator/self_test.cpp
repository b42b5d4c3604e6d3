// Shows that the emulator notices what it is for. Prints one line a probe.
#include <cstdio>

#include "cuda_emulator.h"

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

bool is_reversed(const std::vector<int>& out) {
  for (unsigned i = 0; i < out.size(); ++i) {
    const unsigned start = i / kThreads * kThreads;
    if (out[i] != static_cast<int>(start + kThreads - 1 - i % kThreads)) return false;
  }
  return true;
}

}  // namespace

int main() {
  std::vector<int> out(2 * kThreads);
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
  return 0;
}
