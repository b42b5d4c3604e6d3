// Runs device code on the CPU, functionally: the subset of CUDA that csrc/*.cuh uses, for tests.
//
// A CUDA thread is a fiber: begun by ucontext, and switched by jumps between stacks, which make no
// system call, as those of QEMU's coroutines. _FORTIFY_SOURCE, which forbids them, must not be set.
// The fibers of a block share one OS thread and yield to each other at barriers and warp shuffles;
// blocks run one after another, so `static` is memory shared by a block. A seed shuffles the order
// of fibers and blocks, which exposes a missing barrier. A round without progress of any fiber is
// reported as a deadlock, with what the fibers wait for. Compiled with -fsanitize=thread, races
// between the threads of a block are reported (races.h): a barrier orders what they do, a shuffle
// does not.
//
// Not modelled: races between blocks, memory ordering of atomics, speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
};
struct Index {
  unsigned x;
};

namespace emulator {

constexpr int kWarp = 32;
constexpr int kProductValues = 3;          // values that a lane contributes to a product
constexpr size_t kStackBytes = 256 << 10;  // enough for AddressSanitizer's red zones

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it has given way
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  CheckedThread checked;
  bool started = false, done = false;
  const char* waits_for = "";
};

using WarpValues = uint64_t[kWarp];

// A barrier of some threads: all deposit values, and the last to arrive opens it.
struct Meeting {
  int arrived = 0;
  unsigned round = 0;
  // by round, as a fast lane may already be in the next one
  WarpValues values[2][kProductValues] = {};
  bool any[2] = {};
};

struct Block {
  unsigned index = 0;
  unsigned thread = 0;  // the running thread
  int alive = 0;
  Meeting barrier;
  std::vector<Meeting> warps;
  std::vector<Fiber> fibers;
  std::vector<unsigned char> dynamic_shared;  // has the exact size, for AddressSanitizer
  jmp_buf scheduler;
  CheckedThread checked_scheduler = CheckedThread::running();
  char begun = 0, ended = 0;  // points for `publish` and `observe`
  uint64_t progress = 0;
  std::exception_ptr error;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
};

inline Block*& block() {
  static Block* current = nullptr;
  return current;
}

EVA_NOT_INSTRUMENTED inline void give_way(Block& b, Fiber& fiber) {
  b.checked_scheduler.enter();
  if (_setjmp(fiber.place) == 0) _longjmp(b.scheduler, 1);
}

EVA_NOT_INSTRUMENTED inline void resume(Block& b, Fiber& fiber) {
  fiber.checked.enter();
  if (_setjmp(b.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void open(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.round;
  meeting.any[meeting.round & 1] = false;  // from two rounds ago, which all threads have left
}

// Waits until all have arrived, and returns the completed round.
inline unsigned meet(Meeting& meeting, int expected, const char* name) {
  const Unchecked unchecked;
  Block& b = *block();
  Fiber& fiber = b.fibers[b.thread];
  const unsigned round = meeting.round;
  ++b.progress;
  if (++meeting.arrived == expected) {
    open(meeting);
  } else {
    fiber.waits_for = name;
    while (meeting.round == round) give_way(b, fiber);
  }
  return round;
}

// A barrier of the block. Returns whether any thread came with a predicate that is not 0.
inline bool meet_all(int predicate, const char* name) {
  const Unchecked unchecked;
  Meeting& barrier = block()->barrier;
  bool* any = &barrier.any[barrier.round & 1];
  *any |= predicate != 0;
  publish(any);
  meet(barrier, block()->alive, name);
  observe(any);
  return *any;
}

inline void fiber_main() {
  Block& b = *block();
  Fiber& fiber = b.fibers[b.thread];
  observe(&b.begun);
  try {
    b.body(b.arguments);
  } catch (...) {
    b.error = std::current_exception();
  }
  publish(&b.ended);
  {
    const Unchecked unchecked;
    fiber.done = true;
    ++b.progress;
    --b.alive;
    // Threads that have exited count as arrived, as they do on the device.
    if (b.barrier.arrived > 0 && b.barrier.arrived == b.alive) open(b.barrier);
  }
  give_way(b, fiber);
}

inline std::string deadlock(const Block& b) {
  std::map<std::string, int> waiting;
  for (const Fiber& fiber : b.fibers) {
    if (!fiber.done) ++waiting[fiber.waits_for];
  }
  std::string text = "deadlock:";
  for (const auto& [name, count] : waiting) {
    text += " " + std::to_string(count) + " threads wait at " + name + ";";
  }
  return text;
}

inline void run_block(Block& b, std::mt19937& random, bool shuffle) {
  const unsigned threads = b.fibers.size();
  publish(&b.begun);
  b.alive = static_cast<int>(threads);
  b.barrier = Meeting{};
  b.warps.assign((threads + kWarp - 1) / kWarp, Meeting{});
  std::fill(b.dynamic_shared.begin(), b.dynamic_shared.end(), 0xff);  // NaN if read as float
  for (Fiber& fiber : b.fibers) {
    fiber.started = fiber.done = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
  }
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  while (b.alive > 0) {
    if (shuffle) std::shuffle(order.begin(), order.end(), random);
    const uint64_t before = b.progress;
    for (const unsigned thread : order) {
      if (b.fibers[thread].done) continue;
      b.thread = thread;
      resume(b, b.fibers[thread]);
      if (b.error) std::rethrow_exception(b.error);
    }
    if (b.progress == before) throw std::runtime_error(deadlock(b));
  }
  observe(&b.ended);
}

// Runs `kernel(argument)` on a grid. Seed 0 keeps the order of threads and blocks.
template <class Argument>
void launch(void (*kernel)(Argument), unsigned grid, unsigned threads, Argument argument,
            unsigned seed, size_t dynamic_shared_bytes = 0) {
  const Unchecked unchecked;  // the calling thread only
  struct Call {
    void (*kernel)(Argument);
    Argument argument;
  } call{kernel, argument};
  Block b;
  b.fibers.resize(threads);
  b.dynamic_shared.resize(dynamic_shared_bytes);
  b.body = [](void* p) { static_cast<Call*>(p)->kernel(static_cast<Call*>(p)->argument); };
  b.arguments = &call;
  std::mt19937 random(seed);
  std::vector<unsigned> order(grid);
  std::iota(order.begin(), order.end(), 0u);
  if (seed != 0) std::shuffle(order.begin(), order.end(), random);
  block() = &b;
  for (const unsigned index : order) {
    b.index = index;
    run_block(b, random, seed != 0);
  }
  block() = nullptr;
}

// Every lane of the warp deposits values; returns those of all lanes.
template <class T, int count>
const WarpValues* exchange(unsigned mask, const T (&mine)[count], const char* name) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && count <= kProductValues);
  if (mask != 0xffffffffu) throw std::runtime_error("only full warps are modelled");
  const Unchecked unchecked;
  Block* b = block();
  Meeting& warp = b->warps[b->thread / kWarp];
  for (int i = 0; i < count; ++i) {
    uint64_t raw = 0;
    std::memcpy(&raw, &mine[i], sizeof(T));
    warp.values[warp.round & 1][i][b->thread % kWarp] = raw;
  }
  const unsigned round = meet(warp, kWarp, name);
  return warp.values[round & 1];
}

template <class T>
T read_lane(const uint64_t* values, int lane) {
  T value;
  std::memcpy(&value, &values[lane], sizeof(T));
  return value;
}

// The product of float64 tensor cores, as the PTX ISA defines mma.m16n8k4: entry (row, k) of the
// left matrix is value row / 8 of lane row % 8 * 4 + k, entry (k, column) of the right one is in
// lane column * 4 + k.
inline void add_product(const double (&left)[2], double right, double (&sum)[4]) {
  const WarpValues* all = exchange<double, 3>(0xffffffffu, {left[0], left[1], right}, "a product");
  const int lane = block()->thread % kWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;  // within each half of the rows
    for (int k = 0; k < 4; ++k) {
      const double of_left = read_lane<double>(all[i / 2], row * 4 + k);
      sum[i] += of_left * read_lane<double>(all[2], column * 4 + k);
    }
  }
}

}  // namespace emulator

#define EVA_ADD_PRODUCT emulator::add_product
#define threadIdx (Index{emulator::block()->thread})
#define blockIdx (Index{emulator::block()->index})
#define blockDim (Index{static_cast<unsigned>(emulator::block()->fibers.size())})
#define EVA_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(emulator::block()->dynamic_shared.data())

inline int __syncthreads_or(int predicate) {
  return emulator::meet_all(predicate, "__syncthreads_or");
}

inline void __syncthreads() { emulator::meet_all(0, "__syncthreads"); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::read_lane<T>(emulator::exchange<T, 1>(mask, {value}, "__shfl_sync")[0], lane);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const uint64_t* values = emulator::exchange<T, 1>(mask, {value}, "__shfl_down_sync")[0];
  const int lane = emulator::block()->thread % emulator::kWarp + delta;
  return lane < emulator::kWarp ? emulator::read_lane<T>(values, lane) : value;
}

template <class T>
T atomicAdd(T* address, T value) {
  const emulator::Unchecked unchecked;
  const T old = *address;
  *address = old + value;
  return old;
}
