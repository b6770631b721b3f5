#include <cstdlib>
#include <cstring>

#include "hostcuda/thread.h"

namespace hostcuda {

namespace {

constexpr size_t kSharedAlignment = 1024;

// Exactly as long as asked for, so that AddressSanitizer sees its end; full of NaN, as nobody may rely on zeros.
unsigned char* allocate_shared_memory(size_t size) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kSharedAlignment, size) != 0) abort();
  memset(memory, kNanByte, size);
  return static_cast<unsigned char*>(memory);
}

}  // namespace

Block::Block(unsigned index, const Options& options, Fiber* fibers)
    : index(index),
      num_live(options.num_threads),
      threads(options.num_threads),
      warps((options.num_threads + kWarpSize - 1) / kWarpSize),
      shared_bytes(options.shared_bytes) {
  if (shared_bytes > 0) shared_memory = allocate_shared_memory(shared_bytes);
  for (int rank = 0; rank < options.num_threads; ++rank) {
    Thread& thread = threads[rank];
    thread.index = {static_cast<unsigned>(rank), 0, 0};
    thread.rank = rank;
    thread.block = this;
    thread.lane = rank % kWarpSize;
    thread.warp = &warps[rank / kWarpSize];
    thread.warp->lanes[thread.lane] = &thread;
    thread.warp->absent &= ~(1u << thread.lane);
    thread.fiber = &fibers[rank];
  }
}

Block::~Block() { free(shared_memory); }

}  // namespace hostcuda
