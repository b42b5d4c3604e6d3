#include "eigh_launch.cuh"

namespace eva_kernels {

int eigh_cuda_max_width(int device) {
  const int available = eigh_available_bytes(device);
  int width = kEighMaxWidth;
  while (width > 0 && eigh_shared_bytes(width, false) > available) --width;
  return width;
}

void eigh_cuda(const EighArgs& args, int device, uintptr_t stream) {
  launch_eigh(eigh_kernel<true>, eigh_kernel<false>, args, args.n_matrices, device, stream, "eigh");
}

}  // namespace eva_kernels
