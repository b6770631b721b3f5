// Switching between stacks: the part of a fiber that depends on the machine.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(HOSTCUDA_UCONTEXT)
#define HOSTCUDA_UCONTEXT 1
#endif
#ifdef HOSTCUDA_UCONTEXT
#include <ucontext.h>
#endif

namespace hostcuda {

struct Context {
  // The next switch to this context calls entry(), which must not return, on this stack.
  void prepare(char* stack, size_t size, void (*entry)());

  // Continues `to`; returns when somebody switches back to this context.
  void switch_to(Context& to);

 private:
#ifdef HOSTCUDA_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
};

}  // namespace hostcuda
