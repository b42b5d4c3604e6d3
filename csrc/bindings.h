// The functions that both modules bind, with the names of their arguments. The CUDA versions take a
// device and a stream in addition, as the last arguments.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "convergence.h"
#include "eigh.h"
#include "fold.h"
#include "launch.h"
#include "nystrom.h"
#include "start.h"

namespace eva_kernels {

namespace py = pybind11;

template <size_t... I, class Function, class... Further>
void define(py::module_& m, const char* name, Function function,
            const std::array<const char*, sizeof...(I)>& arguments, std::index_sequence<I...>,
            const Further&... further) {
  m.def(name, function, py::arg(arguments[I])..., further...,
        py::call_guard<py::gil_scoped_release>());
}

// Binds run(make(...)), on the CPU.
template <class Args, class... Given>
void bind(py::module_& m, const char* name, Args (*make)(Given...), void (*run)(const Args&),
          const std::array<const char*, sizeof...(Given)>& arguments) {
  define(
      m, name, [=](Given... given) { run(make(given...)); }, arguments,
      std::index_sequence_for<Given...>());
}

// Binds run(make(...), device, stream), on CUDA.
template <class Args, class... Given>
void bind(py::module_& m, const char* name, Args (*make)(Given...),
          void (*run)(const Args&, int, uintptr_t),
          const std::array<const char*, sizeof...(Given)>& arguments) {
  define(
      m, name,
      [=](Given... given, int device, uintptr_t stream) { run(make(given...), device, stream); },
      arguments, std::index_sequence_for<Given...>(), py::arg("device"), py::arg("stream"));
}

// Wraps the `make` function of a fold pass: the arguments of `fold_args` come before its own.
template <auto make>
struct OfFold;

template <class Args, class... Own, Args (*make)(const FoldArgs&, Own...)>
struct OfFold<make> {
  static Args of(uintptr_t layers, int64_t n_layers, int width, int64_t features, uintptr_t numbers,
                 uintptr_t delta, uintptr_t along, Own... own) {
    return make(fold_args(layers, n_layers, width, features, numbers, delta, along), own...);
  }
};

// Binds the static members of a platform (CPU or CUDA).
template <class Platform>
void bind_functions(py::module_& m) {
  bind(m, "convergence", &convergence_args, Platform::convergence,
       {"matrices", "n_matrices", "n_rows", "tau", "similarity", "unconverged"});
  bind(m, "eigh", &eigh_args, Platform::eigh,
       {"matrices", "n_matrices", "width", "values", "vectors"});
  bind(m, "fold_prepare", &OfFold<&fold_prepare_args>::of, Platform::fold_prepare,
       {"layers", "n_layers", "width", "features", "numbers", "delta", "along", "mean", "scalars"});
  bind(m, "fold_measure", &OfFold<&fold_measure_args>::of, Platform::fold_measure,
       {"layers", "n_layers", "width", "features", "numbers", "delta", "along", "columns",
        "partial", "core", "metric"});
  bind(m, "fold_rows", &OfFold<&fold_rows_args>::of, Platform::fold_rows,
       {"layers", "n_layers", "width", "features", "numbers", "delta", "along", "mean", "mixing",
        "summary", "all_finite"});
  bind(m, "nystrom", &nystrom_args, Platform::nystrom,
       {"core", "metric", "ceiling", "trace", "n_layers", "width", "tolerance", "goal", "scratch",
        "mixing", "summary"});
  bind(m, "start", &start_args, Platform::start,
       {"basis", "products", "shift", "square", "mean", "width", "features", "tokens", "columns",
        "workspace"});
  m.def("start_bytes", &start_bytes, py::arg("width"), py::arg("features"), py::arg("columns"));
}

using Resolved =
    std::tuple<uintptr_t, std::array<unsigned, 3>, unsigned, unsigned, bool, std::vector<uint64_t>>;

// What `run` would pass to the driver: function, grid, threads, shared bytes, early, parameters.
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

inline py::class_<LaunchList> bind_launch_list(py::module_& m) {
  const auto add = [](LaunchList& list, uintptr_t function, const std::array<unsigned, 3>& grid,
                      unsigned threads, unsigned shared_bytes, bool early,
                      const std::vector<std::pair<int, int64_t>>& parameters) {
    Launch launch{function, grid, threads, shared_bytes, early, {}};
    for (const auto& [origin, value] : parameters) {
      launch.parameters.push_back({static_cast<Origin>(origin), value});
    }
    list.add(std::move(launch));
  };
  // module-local: both modules may be loaded, and each registers this class
  return py::class_<LaunchList>(m, "LaunchList", py::module_local())
      .def(py::init<>())
      .def("add", add, py::arg("function"), py::arg("grid"), py::arg("threads"),
           py::arg("shared_bytes"), py::arg("early"), py::arg("parameters"))
      .def("resolve", &resolve, py::arg("given"), py::arg("workspace"));
}

}  // namespace eva_kernels
