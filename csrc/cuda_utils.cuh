// Host-side helpers of the launchers.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace eva_kernels {

inline void cuda_check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // clear it, or the next call would report it again
  throw std::runtime_error(std::string("eva_kernels: ") + what + ": " + cudaGetErrorString(error) +
                           " (" + cudaGetErrorName(error) + ")");
}

// Makes `device` current and restores the caller's: the default stream does not imply a device.
// cudaSetDevice is called even if the device is already current: it makes the context current in a
// new thread, which driver API functions need.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda_check(cudaGetDevice(&previous_), "cudaGetDevice");
    cuda_check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace eva_kernels
