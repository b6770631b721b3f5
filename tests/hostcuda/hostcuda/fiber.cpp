#include "hostcuda/fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#ifdef HOSTCUDA_ASAN
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_stack, size_t* old_size);
#endif
#ifdef HOSTCUDA_TSAN
extern "C" void* __tsan_get_current_fiber();
extern "C" void* __tsan_create_fiber(unsigned flags);
extern "C" void __tsan_destroy_fiber(void* fiber);
extern "C" void __tsan_switch_to_fiber(void* fiber, unsigned flags);
extern "C" void __tsan_acquire(void* sync);
extern "C" void __tsan_release(void* sync);
#endif

namespace hostcuda {

namespace {

constexpr size_t kStackSize = 512 << 10;
constexpr size_t kGuardSize = 4096;

#ifdef HOSTCUDA_TSAN
constexpr unsigned kNoSynchronisation = 1;  // a switch of fibers is no barrier of the kernel

// Lets ThreadSanitizer believe for a moment that another fiber runs.
class OnBehalfOf {
 public:
  explicit OnBehalfOf(void* fiber) : self(__tsan_get_current_fiber()) { become(fiber); }
  ~OnBehalfOf() { become(self); }

 private:
  void* const self;

  static void become(void* fiber) {
    if (fiber != __tsan_get_current_fiber()) __tsan_switch_to_fiber(fiber, kNoSynchronisation);
  }
};
#endif

}  // namespace

Fiber Fiber::create() {
  Fiber fiber;
  void* const memory = mmap(nullptr, kGuardSize + kStackSize, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    perror("hostcuda: no memory for the stacks of the threads");
    abort();
  }
  mprotect(memory, kGuardSize, PROT_NONE);
  fiber.stack = static_cast<char*>(memory) + kGuardSize;
  fiber.stack_size = kStackSize;
#ifdef HOSTCUDA_TSAN
  fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
  return fiber;
}

void Fiber::destroy() {
#ifdef HOSTCUDA_TSAN
  __tsan_destroy_fiber(tsan_fiber);
#endif
  munmap(stack - kGuardSize, kGuardSize + stack_size);
}

Fiber Fiber::of_caller() {
  Fiber fiber;
#ifdef HOSTCUDA_ASAN
  pthread_attr_t attributes;
  void* stack;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &fiber.stack_size);
  pthread_attr_destroy(&attributes);
  fiber.stack = static_cast<char*>(stack);
#endif
#ifdef HOSTCUDA_TSAN
  fiber.tsan_fiber = __tsan_get_current_fiber();
#endif
  return fiber;
}

void Fiber::prepare(void (*entry)()) {
  asan_fake_stack = nullptr;
  context.prepare(stack, stack_size, entry);
}

void Fiber::entered() {
#ifdef HOSTCUDA_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void Fiber::announce_switch([[maybe_unused]] Fiber& to, [[maybe_unused]] void** fake_stack) {
#ifdef HOSTCUDA_ASAN
  __sanitizer_start_switch_fiber(fake_stack, to.stack, to.stack_size);
#endif
#ifdef HOSTCUDA_TSAN
  __tsan_switch_to_fiber(to.tsan_fiber, kNoSynchronisation);
#endif
}

void Fiber::switch_to(Fiber& to) {
  if (this == &to) return;
  announce_switch(to, &asan_fake_stack);
  context.switch_to(to.context);
#ifdef HOSTCUDA_ASAN
  __sanitizer_finish_switch_fiber(asan_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::leave(Fiber& to) {
  announce_switch(to, nullptr);
  context.switch_to(to.context);
}

void Fiber::release([[maybe_unused]] void* sync) {
#ifdef HOSTCUDA_TSAN
  OnBehalfOf self(tsan_fiber);
  __tsan_release(sync);
#endif
}

void Fiber::acquire([[maybe_unused]] void* sync) {
#ifdef HOSTCUDA_TSAN
  OnBehalfOf self(tsan_fiber);
  __tsan_acquire(sync);
#endif
}

}  // namespace hostcuda
