#include "convergence.cuh"

#include <limits>

#include "cuda_utils.cuh"

namespace eva_kernels {

void convergence_cuda(const ConvergenceArgs& args, int device, uintptr_t stream) {
  if (args.n_matrices == 0) return;
  if (args.n_rows > std::numeric_limits<int>::max()) {
    throw std::runtime_error("eva_kernels: convergence: more rows than a CUDA grid has blocks");
  }
  const DeviceGuard guard(device);
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  cuda_check(cudaMemsetAsync(args.unconverged, 0, sizeof(int32_t) * args.n_matrices, cuda_stream),
             "convergence: cudaMemsetAsync");
  if (args.n_rows == 0) return;
  convergence_kernel<<<static_cast<unsigned>(args.n_rows), kConvergenceThreads, 0, cuda_stream>>>(
      args);
  cuda_check(cudaGetLastError(), "convergence: launch");
}

}  // namespace eva_kernels
