#include <pybind11/pybind11.h>

#include "convergence.h"
#include "eigh.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU part of eva_kernels. Addresses and sizes in, nothing checked: see csrc/README.md.";
  m.def(
      "convergence",
      [](uintptr_t matrices, int64_t n_matrices, int64_t n_rows, float tau, uintptr_t similarity,
         uintptr_t unconverged) {
        eva_kernels::convergence_cpu(eva_kernels::convergence_args(matrices, n_matrices, n_rows,
                                                                   tau, similarity, unconverged));
      },
      py::arg("matrices"), py::arg("n_matrices"), py::arg("n_rows"), py::arg("tau"),
      py::arg("similarity"), py::arg("unconverged"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "eigh",
      [](uintptr_t matrices, int64_t n_matrices, int width, uintptr_t values, uintptr_t vectors) {
        eva_kernels::eigh_cpu(eva_kernels::eigh_args(matrices, n_matrices, width, values, vectors));
      },
      py::arg("matrices"), py::arg("n_matrices"), py::arg("width"), py::arg("values"),
      py::arg("vectors"), py::call_guard<py::gil_scoped_release>());
}
