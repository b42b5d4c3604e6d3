#include "eigh.cuh"

#include <limits>

#include "cuda_utils.cuh"

namespace eva_kernels {
namespace {

// Static shared memory of the kernel, which counts against the same limit.
constexpr int kStaticBytes = kEighMaxThreads / kLanes * sizeof(double);

int shared_bytes(int width, bool vectors_in_shared) {
  return static_cast<int>(sizeof(double)) * eigh_shared_size(width, vectors_in_shared);
}

int available_bytes(int device) {
  int bytes = 0;
  cuda_check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "eigh: cudaDeviceGetAttribute");
  return bytes - kStaticBytes;
}

template <bool kVectorsInShared>
void launch(const EighArgs& args, cudaStream_t stream) {
  const auto kernel = eigh_kernel<kVectorsInShared>;
  const int bytes = shared_bytes(args.width, kVectorsInShared);
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "eigh: cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(args.n_matrices), eigh_threads(args.width), bytes, stream>>>(args);
  cuda_check(cudaGetLastError(), "eigh: launch");
}

}  // namespace

int eigh_cuda_max_width(int device) {
  const int available = available_bytes(device);
  int width = kEighMaxWidth;
  while (width > 0 && shared_bytes(width, false) > available) --width;
  return width;
}

void eigh_cuda(const EighArgs& args, int device, uintptr_t stream) {
  if (args.n_matrices == 0 || args.width == 0) return;
  if (args.n_matrices > std::numeric_limits<int>::max()) {
    throw std::runtime_error("eva_kernels: eigh: more matrices than a CUDA grid has blocks");
  }
  const DeviceGuard guard(device);
  const int available = available_bytes(device);
  if (args.width > kEighMaxWidth || shared_bytes(args.width, false) > available) {
    throw std::runtime_error("eva_kernels: eigh: width " + std::to_string(args.width) +
                             " is too large; this device takes up to " +
                             std::to_string(eigh_cuda_max_width(device)));
  }
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  if (shared_bytes(args.width, true) <= available) {
    launch<true>(args, cuda_stream);
  } else {
    launch<false>(args, cuda_stream);
  }
}

}  // namespace eva_kernels
