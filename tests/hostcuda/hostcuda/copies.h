// cp.async: a thread's copies that are still on their way.
//
// The copies themselves are made by code that is compiled into the kernel (see shadow/cuflash/ptx/cp_async.cuh), so
// that sanitizers see them. Eager copies are made when they are issued. Lazy ones fill their target with NaN then, and
// are made when a wait asks for their group: a wait that is too weak leaves the NaN where it is.
// Hopper's copy engine has its own queue (copy_engine.h).
#pragma once

#include <deque>

namespace hostcuda {

struct Copy {
  void* target;
  const void* source;  // null: write zeros
  int size;            // 4 or 16 bytes
  int group;
};

struct CopyQueue {
  std::deque<Copy> pending;
  int open_group = 0;
};

}  // namespace hostcuda
