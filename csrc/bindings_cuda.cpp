#include <cuda_runtime_api.h>

#include "bindings.h"

#ifndef EVA_CUDA_ARCHS
#define EVA_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace {

struct Cuda {
  static constexpr auto convergence = &eva_kernels::convergence_cuda;
  static constexpr auto eigh = &eva_kernels::eigh_cuda;
  static constexpr auto fold_prepare = &eva_kernels::fold_prepare_cuda;
  static constexpr auto fold_measure = &eva_kernels::fold_measure_cuda;
  static constexpr auto fold_rows = &eva_kernels::fold_rows_cuda;
  static constexpr auto nystrom = &eva_kernels::nystrom_cuda;
  static constexpr auto start = &eva_kernels::start_cuda;
};

int device_count() {
  int count = 0;
  // Without a driver CUDA returns an error; for the caller that means 0 devices.
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA part of eva_kernels. Addresses and sizes in, nothing checked: see csrc/README.md.";
  m.attr("archs") = EVA_CUDA_ARCHS;
  m.attr("toolkit") = CUDART_VERSION;
  m.def("device_count", &device_count);
  m.def("eigh_max_width", &eva_kernels::eigh_cuda_max_width, py::arg("device"));
  m.def("parameter_sizes", &eva_kernels::parameter_sizes_cuda, py::arg("function"));
  eva_kernels::bind_functions<Cuda>(m);
  eva_kernels::bind_launch_list(m).def("run", &eva_kernels::launch_cuda, py::arg("given"),
                                       py::arg("workspace"), py::arg("device"), py::arg("stream"),
                                       py::call_guard<py::gil_scoped_release>());
}
