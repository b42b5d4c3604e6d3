// What both modules bind of LaunchList.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "launch.h"

namespace eva_kernels {

using Resolved =
    std::tuple<uintptr_t, std::array<unsigned, 3>, unsigned, unsigned, bool, std::vector<uint64_t>>;

// What a driver would be given: function, grid, threads, shared bytes, early, parameters.
inline std::vector<Resolved> resolve(const LaunchList& list, const std::vector<uintptr_t>& given,
                                     uintptr_t workspace) {
  std::vector<Resolved> found;
  list.run(given, workspace, [&](const Launch& launch, void** parameters) {
    std::vector<uint64_t> values;
    for (size_t i = 0; i < launch.parameters.size(); ++i) {
      values.push_back(*static_cast<uint64_t*>(parameters[i]));
    }
    found.emplace_back(launch.function, launch.grid, launch.threads, launch.shared_bytes,
                       launch.early, values);
  });
  return found;
}

inline pybind11::class_<LaunchList> bind_launch_list(pybind11::module_& m) {
  namespace py = pybind11;
  // local: both modules may be loaded, and each has its own
  return py::class_<LaunchList>(m, "LaunchList", py::module_local())
      .def(py::init<>())
      .def(
          "add",
          [](LaunchList& list, uintptr_t function, const std::array<unsigned, 3>& grid,
             unsigned threads, unsigned shared_bytes, bool early,
             const std::vector<std::pair<int, int64_t>>& parameters) {
            Launch launch{function, grid, threads, shared_bytes, early, {}};
            for (const auto& [origin, value] : parameters) {
              launch.parameters.push_back({static_cast<Origin>(origin), value});
            }
            list.add(std::move(launch));
          },
          py::arg("function"), py::arg("grid"), py::arg("threads"), py::arg("shared_bytes"),
          py::arg("early"), py::arg("parameters"))
      .def("resolve", &resolve, py::arg("given"), py::arg("workspace"));
}

}  // namespace eva_kernels
