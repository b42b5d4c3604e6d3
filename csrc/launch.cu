#include <cuda.h>

#include <string>

#include "cuda_utils.cuh"
#include "launch.h"

namespace eva_kernels {
namespace {

// Looks up a driver function. The driver is not linked, so the module can be imported without one.
template <class Function>
Function driver_function(const char* name, unsigned version) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result);
#else
  (void)version;
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  cuda_check(error, name);
  if (found == nullptr) {
    throw std::runtime_error(std::string("eva_kernels: the CUDA driver has no ") + name);
  }
  return reinterpret_cast<Function>(found);
}

std::string told_by_driver(const char* function, CUresult result) {
  using GetString = CUresult (*)(CUresult, const char**);
  const char* text = nullptr;
  const auto get_string = driver_function<GetString>(function, 6000);
  return get_string(result, &text) == CUDA_SUCCESS ? text : "unknown error";
}

void driver_check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  throw std::runtime_error(std::string("eva_kernels: ") + what + ": " +
                           told_by_driver("cuGetErrorString", result) + " (" +
                           told_by_driver("cuGetErrorName", result) + ")");
}

}  // namespace

void launch_cuda(const LaunchList& list, const std::vector<uintptr_t>& given, uintptr_t workspace,
                 int device, uintptr_t stream) {
  using LaunchKernel = CUresult (*)(const CUlaunchConfig*, CUfunction, void**, void**);
  static const auto launch_kernel = driver_function<LaunchKernel>("cuLaunchKernelEx", 11060);
  const DeviceGuard guard(device);
  CUlaunchAttribute early{};
  early.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  early.value.programmaticStreamSerializationAllowed = 1;
  list.run(given, workspace, [&](const Launch& launch, void** parameters) {
    CUlaunchConfig config{};
    config.gridDimX = launch.grid[0];
    config.gridDimY = launch.grid[1];
    config.gridDimZ = launch.grid[2];
    config.blockDimX = launch.threads;
    config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = launch.shared_bytes;
    config.hStream = reinterpret_cast<CUstream>(stream);
    config.attrs = &early;
    config.numAttrs = launch.early ? 1 : 0;
    const auto function = reinterpret_cast<CUfunction>(launch.function);
    driver_check(launch_kernel(&config, function, parameters, nullptr), "cuLaunchKernelEx");
  });
}

std::vector<size_t> parameter_sizes_cuda(uintptr_t function) {
  using ParameterInfo = CUresult (*)(CUfunction, size_t, size_t*, size_t*);
  static const auto info = driver_function<ParameterInfo>("cuFuncGetParamInfo", 12040);
  std::vector<size_t> sizes;
  while (true) {
    size_t offset = 0, size = 0;
    const CUresult result =
        info(reinterpret_cast<CUfunction>(function), sizes.size(), &offset, &size);
    if (result == CUDA_ERROR_INVALID_VALUE) return sizes;  // there are no more
    driver_check(result, "cuFuncGetParamInfo");
    sizes.push_back(size);
  }
}

}  // namespace eva_kernels
