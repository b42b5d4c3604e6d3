// A list of kernels compiled elsewhere (by Triton), launched in order by one call: no framework
// header. csrc/README.md states the contract; eva_kernels/kernels/sequence.py is the caller.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace eva_kernels {

// Where the value of a kernel's parameter comes from.
enum class Origin : int {
  kGiven = 0,      // an address passed to the call: its index in `given`
  kWorkspace = 1,  // a byte offset from the workspace's address
  kNumber = 2,     // a constant, the same at every call
};

struct LaunchParameter {
  Origin origin;
  int64_t value;
};

struct Launch {
  uintptr_t function;  // CUfunction
  std::array<unsigned, 3> grid;
  unsigned threads;
  unsigned shared_bytes;
  bool early;  // programmatic dependent launch: the kernel itself waits for its predecessor
  std::vector<LaunchParameter> parameters;
};

constexpr size_t kMostParameters = 32;

class LaunchList {
 public:
  void add(Launch launch) {
    if (launch.parameters.size() > kMostParameters) {
      throw std::invalid_argument("eva_kernels: a kernel has too many parameters");
    }
    launches_.push_back(std::move(launch));
  }

  // Calls driver(launch, parameters) for every kernel, in order. Every parameter is stored in eight
  // bytes here; the driver reads as many low bytes as the kernel's parameter has.
  template <class Driver>
  void run(const std::vector<uintptr_t>& given, uintptr_t workspace, const Driver& driver) const {
    std::array<uint64_t, kMostParameters> values;
    std::array<void*, kMostParameters> parameters;
    for (size_t i = 0; i < kMostParameters; ++i) parameters[i] = &values[i];
    for (const Launch& launch : launches_) {
      for (size_t i = 0; i < launch.parameters.size(); ++i) {
        values[i] = value_of(launch.parameters[i], given, workspace);
      }
      driver(launch, parameters.data());
    }
  }

 private:
  static uint64_t value_of(const LaunchParameter& parameter, const std::vector<uintptr_t>& given,
                           uintptr_t workspace) {
    const auto value = static_cast<uint64_t>(parameter.value);
    if (parameter.origin == Origin::kGiven) return given.at(value);
    return parameter.origin == Origin::kWorkspace ? workspace + value : value;
  }

  std::vector<Launch> launches_;
};

// Asynchronous on `stream` of `device`. Throws std::runtime_error where the driver refuses.
void launch_cuda(const LaunchList& list, const std::vector<uintptr_t>& given, uintptr_t workspace,
                 int device, uintptr_t stream);

// Bytes of each parameter of a CUfunction; throws if the driver cannot report it (before
// CUDA 12.4).
std::vector<size_t> parameter_sizes_cuda(uintptr_t function);

}  // namespace eva_kernels
