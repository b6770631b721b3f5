#include "hostcuda/context.h"

#include <cstdint>

namespace hostcuda {

#ifdef HOSTCUDA_UCONTEXT  // any POSIX machine; slower, as every switch is a system call

void Context::prepare(char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void Context::switch_to(Context& to) { swapcontext(&context, &to.context); }

#else  // x86-64, System V calling convention

// Saves the registers that a function must preserve on the old stack, and restores those saved on the new one.
extern "C" void hostcuda_switch_stack(void** old_stack_pointer, void* new_stack_pointer);
asm(R"(
.text
.globl hostcuda_switch_stack
.hidden hostcuda_switch_stack
.type hostcuda_switch_stack, @function
hostcuda_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hostcuda_switch_stack, . - hostcuda_switch_stack
)");

void Context::prepare(char* stack, size_t size, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  void** const top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t{15});
  top[-1] = nullptr;  // where entry() would return to; also aligns its stack as a call does
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) top[-3 - i] = nullptr;
  stack_pointer = top - 2 - kSavedRegisters;
}

void Context::switch_to(Context& to) { hostcuda_switch_stack(&stack_pointer, to.stack_pointer); }

#endif

}  // namespace hostcuda
