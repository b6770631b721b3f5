// What the runtime knows of a CUDA thread, its warp and its block.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <functional>
#include <unordered_map>
#include <vector>

#include "hostcuda/copies.h"
#include "hostcuda/fiber.h"
#include "hostcuda/options.h"

namespace hostcuda {

constexpr int kMaxThreads = 1024;
constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kNanByte = 0xff;  // any float of such bytes is NaN

// A place in the kernel's source. As a default argument, Site::here() is where the function was called.
struct Site {
  const char* file = "";
  int line = 0;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const;
};

enum class State { kReady, kAtBlockBarrier, kAtWarpOperation, kAsleep, kExited };

struct Warp;
struct Block;

struct Thread {
  uint3 index;
  int rank, lane;
  Warp* warp;
  Block* block;
  Fiber* fiber;
  State state = State::kReady;

  // What the thread waits in, or did last.
  const char* operation = "";
  Site site;
  unsigned mask = 0;               // the lanes that take part in a warp-wide operation
  const void* argument = nullptr;  // what this lane brings to it

  // Where the lane has gone, to compare with the other lanes: a digest of all its wmma loads and stores so far.
  uint64_t path = 0;
  Site last_step;

  CopyQueue copies;

  void begin(State new_state, const char* new_operation, Site new_site) {
    state = new_state;
    operation = new_operation;
    site = new_site;
  }
};

struct Warp {
  Thread* lanes[kWarpSize] = {};
  unsigned absent = kAllLanes;  // lanes that have exited, or never were
  unsigned waiting = 0;         // lanes that wait in a warp-wide operation
  char sync = 0;                // its address stands for __syncwarp towards ThreadSanitizer
};

// __syncthreads and its relatives.
struct BlockBarrier {
  int num_arrived = 0;
  unsigned phase = 0;
  int votes[2] = {0, 0};  // threads that voted yes, by parity of the phase
  char sync = 0;
};

struct Block {
  unsigned index;
  int num_live;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  BlockBarrier barrier;
  int num_arrived_at[16] = {};  // at the named barriers
  int num_arrived_in_cluster = 0;
  // By the address of what they wait for, threads that sleep, and what the copy engine has not done yet
  // (copy_engine.h).
  std::unordered_map<const void*, std::vector<Thread*>> asleep;
  std::unordered_map<const void*, std::vector<std::function<void()>>> under_way;
  unsigned char* shared_memory = nullptr;
  size_t shared_bytes;

  Block(unsigned index, const Options& options, Fiber* fibers);  // one fiber for each thread
  ~Block();
  Block(const Block&) = delete;

  template <class Function>
  void for_each_thread(Schedule schedule, Function function) {
    const int count = static_cast<int>(threads.size());
    for (int i = 0; i < count; ++i) function(threads[schedule == Schedule::kReverse ? count - 1 - i : i]);
  }
};

extern Options options;
extern std::vector<Block*> cluster;  // the blocks that run side by side
extern Block* block;                 // that of the thread that runs
extern Thread* current;              // the thread that runs

}  // namespace hostcuda
