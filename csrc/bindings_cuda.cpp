#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "bindings_launch.h"
#include "convergence.h"
#include "eigh.h"
#include "fold.h"
#include "nystrom.h"
#include "start.h"

#ifndef EVA_CUDA_ARCHS
#define EVA_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace {

int device_count() {
  int count = 0;
  // Without a driver this is an error to CUDA; to a caller who asks how many there are it is 0.
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
  m.def(
      "convergence",
      [](uintptr_t matrices, int64_t n_matrices, int64_t n_rows, float tau, uintptr_t similarity,
         uintptr_t unconverged, int device, uintptr_t stream) {
        eva_kernels::convergence_cuda(eva_kernels::convergence_args(matrices, n_matrices, n_rows,
                                                                    tau, similarity, unconverged),
                                      device, stream);
      },
      py::arg("matrices"), py::arg("n_matrices"), py::arg("n_rows"), py::arg("tau"),
      py::arg("similarity"), py::arg("unconverged"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "eigh",
      [](uintptr_t matrices, int64_t n_matrices, int width, uintptr_t values, uintptr_t vectors,
         int device, uintptr_t stream) {
        eva_kernels::eigh_cuda(eva_kernels::eigh_args(matrices, n_matrices, width, values, vectors),
                               device, stream);
      },
      py::arg("matrices"), py::arg("n_matrices"), py::arg("width"), py::arg("values"),
      py::arg("vectors"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  m.def("eigh_max_width", &eva_kernels::eigh_cuda_max_width, py::arg("device"));
  m.def(
      "fold_prepare",
      [](uintptr_t layers, int64_t n_layers, int width, int64_t features, uintptr_t numbers,
         uintptr_t delta, uintptr_t along, uintptr_t mean, uintptr_t scalars, int device,
         uintptr_t stream) {
        const auto fold =
            eva_kernels::fold_args(layers, n_layers, width, features, numbers, delta, along);
        eva_kernels::fold_prepare_cuda(eva_kernels::fold_prepare_args(fold, mean, scalars), device,
                                       stream);
      },
      py::arg("layers"), py::arg("n_layers"), py::arg("width"), py::arg("features"),
      py::arg("numbers"), py::arg("delta"), py::arg("along"), py::arg("mean"), py::arg("scalars"),
      py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "fold_measure",
      [](uintptr_t layers, int64_t n_layers, int width, int64_t features, uintptr_t numbers,
         uintptr_t delta, uintptr_t along, int64_t columns, uintptr_t partial, uintptr_t core,
         uintptr_t metric, int device, uintptr_t stream) {
        const auto fold =
            eva_kernels::fold_args(layers, n_layers, width, features, numbers, delta, along);
        eva_kernels::fold_measure_cuda(
            eva_kernels::fold_measure_args(fold, columns, partial, core, metric), device, stream);
      },
      py::arg("layers"), py::arg("n_layers"), py::arg("width"), py::arg("features"),
      py::arg("numbers"), py::arg("delta"), py::arg("along"), py::arg("columns"),
      py::arg("partial"), py::arg("core"), py::arg("metric"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "fold_rows",
      [](uintptr_t layers, int64_t n_layers, int width, int64_t features, uintptr_t numbers,
         uintptr_t delta, uintptr_t along, uintptr_t mean, uintptr_t mixing, uintptr_t told,
         uintptr_t sound, int device, uintptr_t stream) {
        const auto fold =
            eva_kernels::fold_args(layers, n_layers, width, features, numbers, delta, along);
        eva_kernels::fold_rows_cuda(eva_kernels::fold_rows_args(fold, mean, mixing, told, sound),
                                    device, stream);
      },
      py::arg("layers"), py::arg("n_layers"), py::arg("width"), py::arg("features"),
      py::arg("numbers"), py::arg("delta"), py::arg("along"), py::arg("mean"), py::arg("mixing"),
      py::arg("told"), py::arg("sound"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "nystrom",
      [](uintptr_t core, uintptr_t metric, uintptr_t ceiling, int64_t n_layers, int width,
         double loose, int goal, uintptr_t scratch, uintptr_t mixing, uintptr_t told, int device,
         uintptr_t stream) {
        eva_kernels::nystrom_cuda(eva_kernels::nystrom_args(core, metric, ceiling, n_layers, width,
                                                            loose, goal, scratch, mixing, told),
                                  device, stream);
      },
      py::arg("core"), py::arg("metric"), py::arg("ceiling"), py::arg("n_layers"), py::arg("width"),
      py::arg("loose"), py::arg("goal"), py::arg("scratch"), py::arg("mixing"), py::arg("told"),
      py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "start",
      [](uintptr_t basis, uintptr_t products, uintptr_t shift, uintptr_t square, uintptr_t mean,
         int width, int64_t features, double tokens, int64_t columns, uintptr_t workspace,
         int device, uintptr_t stream) {
        const auto args = eva_kernels::start_args(basis, products, shift, square, mean, width,
                                                  features, tokens, columns, workspace);
        eva_kernels::start_cuda(args, device, stream);
      },
      py::arg("basis"), py::arg("products"), py::arg("shift"), py::arg("square"), py::arg("mean"),
      py::arg("width"), py::arg("features"), py::arg("tokens"), py::arg("columns"),
      py::arg("workspace"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  m.def("start_bytes", &eva_kernels::start_bytes, py::arg("width"), py::arg("features"),
        py::arg("columns"));
  eva_kernels::bind_launch_list(m).def("run", &eva_kernels::launch_cuda, py::arg("given"),
                                       py::arg("workspace"), py::arg("device"), py::arg("stream"),
                                       py::call_guard<py::gil_scoped_release>());
  m.def("parameter_sizes", &eva_kernels::parameter_sizes_cuda, py::arg("function"));
}
