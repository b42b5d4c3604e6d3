#include "bindings.h"

namespace {

struct Cpu {
  static constexpr auto convergence = &eva_kernels::convergence_cpu;
  static constexpr auto eigh = &eva_kernels::eigh_cpu;
  static constexpr auto fold_prepare = &eva_kernels::fold_prepare_cpu;
  static constexpr auto fold_measure = &eva_kernels::fold_measure_cpu;
  static constexpr auto fold_rows = &eva_kernels::fold_rows_cpu;
  static constexpr auto nystrom = &eva_kernels::nystrom_cpu;
  static constexpr auto start = &eva_kernels::start_cpu;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU part of eva_kernels. Addresses and sizes in, nothing checked: see csrc/README.md.";
  eva_kernels::bind_functions<Cpu>(m);
  eva_kernels::bind_launch_list(m);
}
