// A ring of stages in shared memory, filled by a producer and emptied by consumers.
#pragma once

#include <cuflash/ptx/cluster.cuh>

namespace cuflash {

// Where one side is in the ring, and the parity of its round: two registers, or one of which it takes longer to read.
template <int kStages, bool kCompact = false>
struct RingPosition {
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ unsigned parity() const { return parity_; }
  __device__ __forceinline__ void advance() {
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  int stage_ = 0;
  unsigned parity_ = 0;
};

template <int kStages>
struct RingPosition<kStages, true> {
  static_assert((kStages & (kStages - 1)) == 0, "a count tells stage and parity by its bits");

  __device__ __forceinline__ int stage() const { return count_ % kStages; }
  __device__ __forceinline__ unsigned parity() const { return count_ / kStages % 2; }
  __device__ __forceinline__ void advance() { ++count_; }

  // How many stages there were before.
  __device__ __forceinline__ unsigned count() const { return count_; }

 private:
  unsigned count_ = 0;
};

template <int kStages, bool kCompact = false>
struct Pipeline {
  using Position = RingPosition<kStages, kCompact>;

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
  __device__ __forceinline__ void fill(const Position& at) { ptx::barrier_arrive(full + at.stage()); }
  // The same by threads that copy with cp.async, and do not wait for their copies. Each arrives twice, since what it
  // may have stored itself belongs to the first arrival alone.
  __device__ __forceinline__ void fill_by_copies(const Position& at) {
    fill(at);
    ptx::barrier_arrive_after_copies(full + at.stage());
  }
  __device__ __forceinline__ void release(const Position& at) { ptx::barrier_arrive(empty + at.stage()); }
  // The same of the ring of a block of the cluster.
  __device__ __forceinline__ void release_of(int rank, const Position& at) {
    ptx::barrier_arrive_at(empty + at.stage(), rank);
  }

 private:
  static __device__ __forceinline__ void wait(ptx::Barrier* barrier, unsigned parity) {
    while (!ptx::barrier_try_wait(barrier, parity)) {
    }
  }
};

}  // namespace cuflash
