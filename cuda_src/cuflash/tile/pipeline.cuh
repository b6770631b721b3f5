// A ring of stages in shared memory, filled by a producer and emptied by consumers.
#pragma once

#include <cuflash/ptx/mbarrier.cuh>

namespace cuflash {

// Where one side is in the ring: one register, for the stage and the parity of the round.
template <int kStages>
struct RingPosition {
  static constexpr unsigned kParity = 256;

  unsigned bits = 0;

  __device__ __forceinline__ int stage() const { return bits % kParity; }
  __device__ __forceinline__ unsigned parity() const { return bits / kParity; }
  __device__ __forceinline__ void advance() { bits = stage() + 1 == kStages ? ~bits & kParity : bits + 1; }
};

template <int kStages>
struct Pipeline {
  using Position = RingPosition<kStages>;

  ptx::Barrier full[kStages], empty[kStages];

  __device__ __forceinline__ void init(int num_consumers, int num_producers = 1) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(full + stage, num_producers);
      ptx::barrier_init(empty + stage, num_consumers);
    }
  }

  // Fresh barriers count as if the phase before had ended: stages are empty at first.
  __device__ __forceinline__ void wait_empty(const Position& at) { wait(empty + at.stage(), at.parity() ^ 1); }
  __device__ __forceinline__ void wait_full(const Position& at) { wait(full + at.stage(), at.parity()); }

  // The barrier that tells when so many bytes have come.
  __device__ __forceinline__ ptx::Barrier* expect(const Position& at, int num_bytes) {
    ptx::barrier_arrive_expect(full + at.stage(), num_bytes);
    return full + at.stage();
  }
  __device__ __forceinline__ void release(const Position& at) { ptx::barrier_arrive(empty + at.stage()); }

 private:
  static __device__ __forceinline__ void wait(ptx::Barrier* barrier, unsigned parity) {
    while (!ptx::barrier_try_wait(barrier, parity)) {
    }
  }
};

}  // namespace cuflash
