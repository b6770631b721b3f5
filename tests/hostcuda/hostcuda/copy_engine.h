// The copy engine, which works for a block while its threads go on.
//
// Eager work is done when it is asked for. Lazy work is done when somebody waits for it, or at once if somebody does
// already: what is read without waiting is what was there before.
#pragma once

#include <utility>

#include "hostcuda/scheduler.h"

namespace hostcuda {

// Work of which threads learn by waiting for `what`.
template <class Work>
inline void by_copy_engine(const void* what, Work work) {
  if (options.lazy_copies && block->asleep[what].empty()) {
    block->under_way[what].push_back(std::move(work));
  } else {
    work();
  }
}

inline void finish_copies(const void* what) {
  for (const auto& work : std::exchange(block->under_way[what], {})) work();
}

}  // namespace hostcuda
