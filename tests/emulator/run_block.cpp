// Runs reductions over a block under several schedules, one after another as kernels do, and
// compares them with loops. Exit code 0 if all agree; otherwise 1 and the first difference.
#include <cmath>
#include <cstdio>

#include "cuda_emulator.h"
// after the emulator, which replaces the CUDA headers
#include "block.cuh"

namespace {

struct Arguments {
  const double* in;  // (blocks, threads)
  double* sums;      // (blocks, threads): what each thread was told
  double* twice;     // the same of 2 x
  double* maxima;
};

__global__ void reduce(Arguments of) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  of.sums[i] = eva_kernels::over_block(of.in[i], eva_kernels::Sum());
  of.twice[i] = eva_kernels::over_block(2.0 * of.in[i], eva_kernels::Sum());
  of.maxima[i] = eva_kernels::over_block(of.in[i], eva_kernels::Largest());
}

void check(unsigned threads, unsigned seed) {
  constexpr unsigned kBlocks = 3;
  std::vector<double> in(kBlocks * threads), sums(in), twice(in), maxima(in);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<double>(i * i % 97) - 50.0;
  emulator::launch<Arguments>(reduce, kBlocks, threads,
                              {in.data(), sums.data(), twice.data(), maxima.data()}, seed);
  for (unsigned i = 0; i < in.size(); ++i) {
    const auto first = in.begin() + i / threads * threads;
    const double sum = std::accumulate(first, first + threads, 0.0);  // exact: small integers
    const double largest = *std::max_element(first, first + threads);
    if (sums[i] == sum && twice[i] == 2.0 * sum && maxima[i] == largest) continue;
    throw std::runtime_error(std::to_string(threads) + " threads, entry " + std::to_string(i));
  }
}

}  // namespace

int main() {
  try {
    for (unsigned seed = 0; seed < 4; ++seed) {
      for (const unsigned threads : {32u, 64u, 160u}) check(threads, seed);
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("all agree\n");
  return 0;
}
