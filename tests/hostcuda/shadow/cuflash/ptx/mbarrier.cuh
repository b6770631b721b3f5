// Shadows <cuflash/ptx/mbarrier.cuh>: threads sleep until the phase that they wait for is over.
#pragma once

#include <cuflash/ptx/cp_async.cuh>

namespace cuflash::ptx {

using Barrier = unsigned long long;

// What the word in shared memory holds here.
struct BarrierState {
  static constexpr int kMaxArrivals = 0x7fff;  // what is not initialised holds more

  uint16_t arrivals, pending;
  int32_t num_bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

inline BarrierState& state_of(Barrier* barrier, hostcuda::Site site) {
  hostcuda::check_in_shared_memory(barrier, "mbarrier", site);
  BarrierState& state = *reinterpret_cast<BarrierState*>(barrier);
  if (state.arrivals > BarrierState::kMaxArrivals) {
    hostcuda::fail("mbarrier at %s:%d: it is not initialised", site.file, site.line);
  }
  return state;
}

inline void end_phase_if_complete(Barrier* barrier, BarrierState& state) {
  if (state.pending != 0 || state.num_bytes != 0) return;
  state.pending = state.arrivals;
  state.phase ^= 1;
  hostcuda::wake(barrier);
}

inline void barrier_init(Barrier* barrier, int arrivals, hostcuda::Site site = hostcuda::Site::here()) {
  hostcuda::check_in_shared_memory(barrier, "mbarrier.init", site);
  if (arrivals < 1 || arrivals > BarrierState::kMaxArrivals) {
    hostcuda::fail("mbarrier.init at %s:%d: %d arrivals", site.file, site.line, arrivals);
  }
  const auto count = static_cast<uint16_t>(arrivals);
  *reinterpret_cast<BarrierState*>(barrier) = {count, count, 0, 0};
}

inline void barrier_init_fence() {}

inline void barrier_arrive_expect(Barrier* barrier, int num_bytes, hostcuda::Site site = hostcuda::Site::here()) {
  BarrierState& state = state_of(barrier, site);
  if (state.pending == 0) {
    hostcuda::fail("mbarrier.arrive at %s:%d: more than %d arrivals", site.file, site.line, state.arrivals);
  }
  hostcuda::current->fiber->release(barrier);
  --state.pending;
  state.num_bytes += num_bytes;
  end_phase_if_complete(barrier, state);
}

inline void barrier_arrive(Barrier* barrier, hostcuda::Site site = hostcuda::Site::here()) {
  barrier_arrive_expect(barrier, 0, site);
}

inline void barrier_arrive_after_copies(Barrier* barrier, hostcuda::Site site = hostcuda::Site::here()) {
  auto copies = std::exchange(hostcuda::current->copies.pending, {});
  hostcuda::by_copy_engine(barrier, [barrier, site, copies = std::move(copies)] {
    for (const hostcuda::Copy& copy : copies) run_copy(copy);
    barrier_arrive(barrier, site);
  });
}

// The copy engine has brought bytes that this phase expects.
inline void barrier_complete(Barrier* barrier, int num_bytes, hostcuda::Site site) {
  BarrierState& state = state_of(barrier, site);
  hostcuda::current->fiber->release(barrier);
  state.num_bytes -= num_bytes;
  end_phase_if_complete(barrier, state);
}

inline bool barrier_try_wait(Barrier* barrier, unsigned parity, hostcuda::Site site = hostcuda::Site::here()) {
  const BarrierState& state = state_of(barrier, site);
  hostcuda::finish_copies(barrier);
  if (state.phase == parity) {
    hostcuda::sleep_until(barrier, "mbarrier.try_wait", site);
  } else {
    hostcuda::current->fiber->acquire(barrier);
  }
  return state.phase != parity;
}

}  // namespace cuflash::ptx
