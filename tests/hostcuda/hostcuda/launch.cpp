#include "hostcuda/launch.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "hostcuda/index.h"
#include "hostcuda/scheduler.h"

// The static __shared__ variables of the kernel, gathered by the linker (see keywords.h).
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_hostcuda_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __stop_hostcuda_shared[];

namespace hostcuda {

namespace {

BoundKernel bound;

// Those of one launch: a process may load hundreds of kernels, and the system limits the mappings of all their stacks.
class Fibers {
 public:
  Fibers() = default;
  Fibers(const Fibers&) = delete;
  ~Fibers() {
    for (Fiber& fiber : fibers) fiber.destroy();
  }

  Fiber* at_least(size_t count) {
    while (fibers.size() < count) fibers.push_back(Fiber::create());
    return fibers.data();
  }

 private:
  std::vector<Fiber> fibers;
};

bool has_static_shared_memory() { return __start_hostcuda_shared != __stop_hostcuda_shared; }

// Blocks run one after another, but nothing orders them on a GPU: ThreadSanitizer may report two blocks that touch the
// same memory. Static shared memory is one and the same for all blocks here, so with it they must pass for ordered.
bool blocks_are_ordered() {
#ifdef HOSTCUDA_TSAN
  return has_static_shared_memory();
#else
  return true;
#endif
}

// ThreadSanitizer sees no races between blocks that run on the same fibers, so unordered blocks take turns with several
// sets of them. A set costs 100 ms; three let a block be compared with the two before it.
int num_fiber_sets() { return blocks_are_ordered() ? 1 : 3; }

}  // namespace

const char* check_arguments(int expected, const size_t* expected_sizes, int given, const size_t* given_sizes) {
  static std::string message;
  if (given != expected) {
    message = "the kernel takes " + std::to_string(expected) + " arguments, got " + std::to_string(given);
    return message.c_str();
  }
  for (int i = 0; i < given; ++i) {
    if (given_sizes[i] == expected_sizes[i]) continue;
    message = "argument " + std::to_string(i) + " of the kernel has " + std::to_string(expected_sizes[i]) +
              " bytes, got " + std::to_string(given_sizes[i]);
    return message.c_str();
  }
  return nullptr;
}

const char* launch(const Options& launch_options, const BoundKernel& kernel) {
  options = launch_options;
  bound = kernel;
  gridDim = dim3(options.num_blocks);
  blockDim = dim3(options.num_threads);
  Fiber caller = Fiber::of_caller();
  Fibers fibers;
  std::vector<std::unique_ptr<Block>> blocks;  // unordered ones must not reuse each other's memory
  char started = 0, finished = 0;
  const char* error = nullptr;
  for (int index = 0; index < options.num_blocks && error == nullptr; index += options.cluster) {
    if (blocks_are_ordered()) {
      caller.acquire(&finished);
      blocks.clear();
    }
    const int number = index / options.cluster, num_clusters = options.num_blocks / options.cluster;
    const int num_fibers = options.num_threads * options.cluster, first_fiber = number % num_fiber_sets() * num_fibers;
    Fiber* const all = fibers.at_least(num_fibers * std::min(num_clusters, num_fiber_sets()));
    std::vector<Block*> cluster;
    for (int rank = 0; rank < options.cluster; ++rank) {
      Fiber* const first = all + first_fiber + rank * options.num_threads;
      blocks.push_back(std::make_unique<Block>(index + rank, options, first));
      cluster.push_back(blocks.back().get());
    }
    if (has_static_shared_memory()) {
      memset(__start_hostcuda_shared, kNanByte, __stop_hostcuda_shared - __start_hostcuda_shared);
    }
    caller.release(&started);
    const auto for_each_fiber = [&](auto function) {
      std::for_each(all + first_fiber, all + first_fiber + num_fibers, function);
    };
    for_each_fiber([&](Fiber& fiber) { fiber.acquire(&started); });
    error = run_cluster(cluster, caller, [] { bound.call(bound.kernel, bound.arguments); });
    for_each_fiber([&](Fiber& fiber) { fiber.release(&finished); });
  }
  caller.acquire(&finished);
  return error;
}

}  // namespace hostcuda
