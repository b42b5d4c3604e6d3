// Launcher of kernels that decompose one matrix per block in shared memory (eigh.cuh).
#pragma once

#include <limits>
#include <mutex>

#include "cuda_utils.cuh"
#include "eigh.cuh"

namespace eva_kernels {

// Upper bound of the static shared memory of such a kernel, which counts against the same limit.
constexpr int kEighStaticBytes = 4096;

inline int eigh_shared_bytes(int width, bool vectors_in_shared) {
  return static_cast<int>(sizeof(double)) * eigh_shared_size(width, vectors_in_shared);
}

inline int eigh_available_bytes(int device) {
  int bytes = 0;
  cuda_check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "eigh: cudaDeviceGetAttribute");
  return bytes - kEighStaticBytes;
}

// One block per matrix. `in_shared` keeps the vectors in shared memory and is launched if they fit;
// otherwise `in_global` is.
template <class Args>
void launch_eigh(void (*in_shared)(Args), void (*in_global)(Args), const Args& args,
                 int64_t n_matrices, int device, uintptr_t stream, const std::string& name) {
  if (n_matrices == 0 || args.width == 0) return;
  if (n_matrices > std::numeric_limits<int>::max()) {
    throw std::runtime_error("eva_kernels: " + name +
                             ": more matrices than a CUDA grid has blocks");
  }
  const DeviceGuard guard(device);
  const int available = eigh_available_bytes(device);
  if (args.width > kEighMaxWidth || eigh_shared_bytes(args.width, false) > available) {
    throw std::runtime_error("eva_kernels: " + name + ": width " + std::to_string(args.width) +
                             " is too large; this device takes up to " +
                             std::to_string(eigh_cuda_max_width(device)));
  }
  const bool fits = eigh_shared_bytes(args.width, true) <= available;
  const auto kernel = fits ? in_shared : in_global;
  const int bytes = eigh_shared_bytes(args.width, fits);
  // The attribute belongs to the kernel: another thread must not lower it before the launch.
  static std::mutex launching;
  const std::lock_guard<std::mutex> lock(launching);
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             (name + ": cudaFuncSetAttribute").c_str());
  kernel<<<static_cast<unsigned>(n_matrices), eigh_threads(args.width), bytes,
           reinterpret_cast<cudaStream_t>(stream)>>>(args);
  cuda_check(cudaGetLastError(), (name + ": launch").c_str());
}

}  // namespace eva_kernels
