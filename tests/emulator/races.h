// Makes ThreadSanitizer take the fibers of the emulator for threads, ordered by nothing but what
// the emulator tells it. Without -fsanitize=thread all of this is empty.
//
// Interface: sanitizer/tsan_interface.h of LLVM and GCC ("Fiber switching API").
#pragma once

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)  // of clang
#define __SANITIZE_THREAD__
#endif
#endif

#if defined(__SANITIZE_THREAD__)

#include <sanitizer/tsan_interface.h>

#define EVA_NOT_INSTRUMENTED __attribute__((no_sanitize("thread")))

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace emulator {

constexpr bool kChecksRaces = true;

// While it is alive, what the running thread reads and writes is the emulator's own business.
struct Unchecked {
  Unchecked() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unchecked() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unchecked(const Unchecked&) = delete;
};

// A thread in the eyes of ThreadSanitizer: a new one, or the one that runs.
class CheckedThread {
 public:
  CheckedThread() : handle_(__tsan_create_fiber(0)), created_(true) {}
  explicit CheckedThread(void* handle) : handle_(handle), created_(false) {}
  CheckedThread(CheckedThread&& other) noexcept : handle_(other.handle_), created_(other.created_) {
    other.created_ = false;
  }
  ~CheckedThread() {
    if (created_) __tsan_destroy_fiber(handle_);
  }
  static CheckedThread running() { return CheckedThread(__tsan_get_current_fiber()); }
  EVA_NOT_INSTRUMENTED void enter() const {
    __tsan_switch_to_fiber(handle_, __tsan_switch_to_fiber_no_sync);
  }

 private:
  void* handle_;
  bool created_;
};

// What a thread did before `publish(point)` is ordered before what one does after `observe(point)`.
inline void publish(void* point) { __tsan_release(point); }
inline void observe(void* point) { __tsan_acquire(point); }

}  // namespace emulator

#else

#define EVA_NOT_INSTRUMENTED

namespace emulator {

constexpr bool kChecksRaces = false;

struct Unchecked {
  Unchecked() {}
};

struct CheckedThread {
  static CheckedThread running() { return {}; }
  void enter() const {}
};

inline void publish(void*) {}
inline void observe(void*) {}

}  // namespace emulator

#endif
