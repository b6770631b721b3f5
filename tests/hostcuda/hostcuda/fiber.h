// A fiber: a context with its stack, and what the sanitizers must be told about it.
//
// HOSTCUDA_ASAN and HOSTCUDA_TSAN say which sanitizer watches the kernel. The runtime itself is compiled without
// instrumentation: it tells ThreadSanitizer about synchronisation where CUDA has it, and nothing else.
#pragma once

#include <cstddef>

#include "hostcuda/context.h"

namespace hostcuda {

class Fiber {
 public:
  // A fiber with a stack of its own, followed by a guard page.
  static Fiber create();
  // Gives the stack back.
  void destroy();
  // The operating system's thread itself.
  static Fiber of_caller();

  // The next switch to this fiber calls entry(), which starts with entered() and ends with leave().
  void prepare(void (*entry)());
  static void entered();

  // Continues `to`; returns when somebody switches back to this fiber.
  void switch_to(Fiber& to);
  // The same for a fiber that is finished.
  void leave(Fiber& to);

  // Happens-before for ThreadSanitizer: what this fiber did before release(x) is ordered before what any fiber does
  // after its acquire(x). May be called while another fiber runs.
  void release(void* sync);
  void acquire(void* sync);

 private:
  Context context;
  char* stack = nullptr;
  size_t stack_size = 0;
  void* tsan_fiber = nullptr;
  void* asan_fake_stack = nullptr;

  void announce_switch(Fiber& to, void** fake_stack);
};

}  // namespace hostcuda
