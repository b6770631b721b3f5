// Operations of a whole warp: __syncwarp, shuffles, votes.
//
// Every lane of the mask brings an argument and waits; the last one to arrive does the work for all of them.
#pragma once

#include "hostcuda/scheduler.h"

#ifdef HOSTCUDA_TSAN
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

namespace hostcuda {

// Waits for the lanes of the mask. Returns true in the last one, which must then call finish_warp_operation.
bool arrive_in_warp(unsigned mask, const char* operation, Site site, const void* argument);
void finish_warp_operation(unsigned mask);

// Called when a lane exits: the others may have waited for nobody else.
void release_warp_if_complete(Warp& warp);

// The last lane works on other lanes' registers, which no real race can touch.
class IgnoreAccesses {
#ifdef HOSTCUDA_TSAN
 public:
  IgnoreAccesses() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~IgnoreAccesses() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#endif
};

// The arguments of a warp-wide operation by lane; null for lanes that take no part.
template <class Argument>
class Lanes {
 public:
  explicit Lanes(unsigned mask) : mask(mask & ~current->warp->absent) {}

  bool all_present() const { return mask == kAllLanes; }
  bool present(int lane) const { return mask >> lane & 1; }
  Argument& operator[](int lane) const {
    return *static_cast<Argument*>(const_cast<void*>(current->warp->lanes[lane]->argument));
  }

  template <class Function>
  void for_each(Function function) const {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (present(lane)) function(lane, (*this)[lane]);
    }
  }

 private:
  const unsigned mask;
};

// Calls work(lanes) once, in the last lane that arrives.
template <class Argument, class Work>
inline void warp_operation(unsigned mask, const char* operation, Site site, Argument& argument, Work work) {
  if (!arrive_in_warp(mask, operation, site, &argument)) return;
  {
    [[maybe_unused]] IgnoreAccesses ignore;
    work(Lanes<Argument>(mask));
  }
  finish_warp_operation(mask);
}

// The lanes of a warp must walk through its wmma loads and stores together. To wait for each other there would hide
// missing __syncwarps, so each lane notes its steps, and the next warp-wide operation compares the notes.
void note_step(Site site, const void* pointer, unsigned leading_dimension);

void warp_barrier(unsigned mask, Site site);

template <class T>
T shuffle(unsigned mask, const char* operation, Site site, T value, int source) {
  struct Argument {
    T value, result;
    int source;
  } argument{value, value, source};
  warp_operation(mask, operation, site, argument, [&](const Lanes<Argument>& lanes) {
    lanes.for_each([&](int lane, Argument& mine) {
      if (!lanes.present(mine.source)) {
        fail("%s: lane %d reads from lane %d, which takes no part (%s:%d)", operation, lane, mine.source, site.file,
             site.line);
      }
      mine.result = lanes[mine.source].value;
    });
  });
  return argument.result;
}

template <class Operation>
int reduce(unsigned mask, const char* operation, Site site, int value, Operation combine) {
  struct Argument {
    int value, result;
  } argument{value, value};
  warp_operation(mask, operation, site, argument, [&](const Lanes<Argument>& lanes) {
    int result = value;  // of the lane that came last
    lanes.for_each([&](int, Argument& mine) {
      if (&mine != &argument) result = combine(result, mine.value);
    });
    lanes.for_each([&](int, Argument& mine) { mine.result = result; });
  });
  return argument.result;
}

unsigned ballot(unsigned mask, const char* operation, Site site, bool vote);

}  // namespace hostcuda

inline void __syncwarp(unsigned mask = hostcuda::kAllLanes, hostcuda::Site site = hostcuda::Site::here()) {
  hostcuda::warp_barrier(mask, site);
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, hostcuda::Site site = hostcuda::Site::here()) {
  const int first = hostcuda::current->lane / width * width;
  return hostcuda::shuffle(mask, "__shfl_sync", site, value, first + (source & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                         hostcuda::Site site = hostcuda::Site::here()) {
  const int lane = hostcuda::current->lane, source = lane ^ lane_mask;
  const bool inside = source < lane / width * width + width;
  return hostcuda::shuffle(mask, "__shfl_xor_sync", site, value, inside ? source : lane);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          hostcuda::Site site = hostcuda::Site::here()) {
  const int lane = hostcuda::current->lane, source = lane + static_cast<int>(delta);
  const bool inside = source < lane / width * width + width;
  return hostcuda::shuffle(mask, "__shfl_down_sync", site, value, inside ? source : lane);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        hostcuda::Site site = hostcuda::Site::here()) {
  const int lane = hostcuda::current->lane, source = lane - static_cast<int>(delta);
  const bool inside = source >= lane / width * width;
  return hostcuda::shuffle(mask, "__shfl_up_sync", site, value, inside ? source : lane);
}

inline int __reduce_add_sync(unsigned mask, int value, hostcuda::Site site = hostcuda::Site::here()) {
  return hostcuda::reduce(mask, "__reduce_add_sync", site, value, [](int x, int y) { return x + y; });
}
inline int __reduce_max_sync(unsigned mask, int value, hostcuda::Site site = hostcuda::Site::here()) {
  return hostcuda::reduce(mask, "__reduce_max_sync", site, value, [](int x, int y) { return x > y ? x : y; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, hostcuda::Site site = hostcuda::Site::here()) {
  return hostcuda::ballot(mask, "__ballot_sync", site, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, hostcuda::Site site = hostcuda::Site::here()) {
  return hostcuda::ballot(mask, "__any_sync", site, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, hostcuda::Site site = hostcuda::Site::here()) {
  return hostcuda::ballot(mask, "__all_sync", site, predicate == 0) == 0;
}
