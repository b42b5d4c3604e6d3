#include "nystrom.cuh"

#include "eigh_launch.cuh"

namespace eva_kernels {

void nystrom_cuda(const NystromArgs& args, int device, uintptr_t stream) {
  launch_eigh(nystrom_kernel<true>, nystrom_kernel<false>, args, args.n_layers, device, stream,
              "nystrom");
}

}  // namespace eva_kernels
