#include "hostcuda/scheduler.h"

#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>

#include "hostcuda/block_barrier.h"
#include "hostcuda/index.h"
#include "hostcuda/warp.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace hostcuda {

Options options;
std::vector<Block*> cluster;
Block* block;
Thread* current;

namespace {

class ReadyQueue {
 public:
  bool empty() const { return count == 0; }
  void clear() { head = count = 0; }
  void seed(uint64_t value) { random.seed(value); }
  void push(Thread* thread) { at(count++) = thread; }

  Thread* pop() {
    switch (options.schedule) {
      case Schedule::kGreedy:
        break;
      case Schedule::kRandom:
        std::swap(at(random() % count), at(count - 1));
        break;
      default:
        --count;
        return ring[head++ % kMaxThreads];
    }
    return at(--count);
  }

 private:
  std::array<Thread*, kMaxThreads> ring;
  unsigned head = 0, count = 0;
  std::mt19937_64 random;

  Thread*& at(unsigned i) { return ring[(head + i) % kMaxThreads]; }
};

ReadyQueue ready;
Fiber* caller;  // to go back to when the cluster is done
std::string message;
void (*kernel_body)();

std::string formatted(const char* format, va_list arguments) {
  char text[1024];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

std::string describe(const Thread& thread) {
  return std::string(thread.operation) + " at " + thread.site.file + ":" + std::to_string(thread.site.line);
}

// Threads in a row that wait at the same place take one line.
std::string describe_deadlock(const Block& block) {
  std::string text = "block " + std::to_string(block.index) + ": deadlock";
  const std::vector<Thread>& threads = block.threads;
  for (size_t first = 0, end; first < threads.size(); first = end) {
    const auto same = [&](const Thread& other) {
      return other.state == threads[first].state &&
             (other.state == State::kExited ||
              (other.site == threads[first].site && other.mask == threads[first].mask));
    };
    for (end = first + 1; end < threads.size() && same(threads[end]);) ++end;
    text += "\n  threads " + std::to_string(first) + " to " + std::to_string(end - 1);
    if (threads[first].state == State::kExited) {
      text += " have exited";
      continue;
    }
    text += " wait in " + describe(threads[first]);
    if (threads[first].state == State::kAtWarpOperation) {
      char mask[32];
      snprintf(mask, sizeof mask, " with mask %08x", threads[first].mask);
      text += mask;
    }
  }
  return text;
}

Thread* next_thread() {
  if (!ready.empty()) return ready.pop();
  for (const Block* block : cluster) {
    if (block->num_live > 0) message += (message.empty() ? "" : "\n") + describe_deadlock(*block);
  }
  return nullptr;
}

void resume(Thread& thread) {
  current = &thread;
  block = thread.block;
  threadIdx = thread.index;
  blockIdx = {block->index, 0, 0};
}

void enter_thread() {
  Fiber::entered();
  kernel_body();
  Thread& self = *current;
  self.state = State::kExited;
  self.warp->absent |= 1u << self.lane;
  --block->num_live;
  release_warp_if_complete(*self.warp);
  release_barrier_if_complete();
  Thread* const next = next_thread();
  if (next != nullptr) resume(*next);
  self.fiber->leave(next != nullptr ? *next->fiber : *caller);
  __builtin_unreachable();
}

}  // namespace

bool Site::operator==(const Site& other) const { return line == other.line && strcmp(file, other.file) == 0; }

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  ready.push(&thread);
}

void wait() {
  Thread& self = *current;
  Thread* const next = next_thread();
  if (next != nullptr) resume(*next);
  self.fiber->switch_to(next != nullptr ? *next->fiber : *caller);
}

void sleep_until(const void* what, const char* operation, Site site) {
  current->begin(State::kAsleep, operation, site);
  block->asleep[what].push_back(current);
  wait();
  current->fiber->acquire(const_cast<void*>(what));
}

void wake(const void* what) {
  for (Thread* thread : std::exchange(block->asleep[what], {})) make_ready(*thread);
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  message = "block " + std::to_string(block->index) + ", thread " + std::to_string(current->rank) + ": " +
            formatted(format, arguments);
  va_end(arguments);
  current->fiber->leave(*caller);
  __builtin_unreachable();
}

const char* run_cluster(std::vector<Block*> blocks, Fiber& the_caller, void (*body)()) {
  cluster = std::move(blocks);
  kernel_body = body;
  caller = &the_caller;
  message.clear();
  ready.clear();
  ready.seed(options.seed + cluster[0]->index);
  for (Block* block : cluster) {
    block->for_each_thread(options.schedule, [](Thread& thread) {
      thread.fiber->prepare(enter_thread);
      make_ready(thread);
    });
  }
  Thread* const first = next_thread();
  resume(*first);
  caller->switch_to(*first->fiber);
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace hostcuda
