#include "cuda_utils.cuh"
#include "start.h"

namespace eva_kernels {
namespace {

constexpr int kSetUpThreads = 128;

// Grid: one block. Writes the inputs of the folds on the device, which saves a copy from the host.
__global__ void __launch_bounds__(kSetUpThreads) set_up_kernel(StartArgs args, StartParts parts) {
  for (int i = threadIdx.x; i < 2 * (kFoldNumbers + args.width); i += kSetUpThreads) {
    parts.numbers[i] = start_number(i, args.width, args.tokens);
  }
  if (threadIdx.x != 0) return;
  *parts.layers = args.layer;
  *parts.all_finite = true;
}

struct Cuda {
  int device;
  uintptr_t stream;

  cudaStream_t queue() const { return reinterpret_cast<cudaStream_t>(stream); }
  void set_up(const StartArgs& args, const StartParts& parts) const {
    const DeviceGuard guard(device);
    set_up_kernel<<<1, kSetUpThreads, 0, queue()>>>(args, parts);
    cuda_check(cudaGetLastError(), "start: launch of set_up");
  }
  void clear(const StartArgs& args, const StartParts& parts) const {
    const DeviceGuard guard(device);
    zero(args.sums.products, args.width * args.features * sizeof(float));
    zero(args.sums.shift, args.features * sizeof(double));
    zero(args.sums.square, sizeof(double));
    zero(parts.delta, args.features * sizeof(double));
  }
  void prepare(const FoldPrepareArgs& args) const { fold_prepare_cuda(args, device, stream); }
  void measure(const FoldMeasureArgs& args) const { fold_measure_cuda(args, device, stream); }
  void decompose(const NystromArgs& args) const { nystrom_cuda(args, device, stream); }
  void rows(const FoldRowsArgs& args) const { fold_rows_cuda(args, device, stream); }

 private:
  void zero(void* memory, size_t bytes) const {
    cuda_check(cudaMemsetAsync(memory, 0, bytes, queue()), "start: cudaMemsetAsync");
  }
};

}  // namespace

void start_cuda(const StartArgs& args, int device, uintptr_t stream) {
  run_start(args, Cuda{device, stream});
}

}  // namespace eva_kernels
