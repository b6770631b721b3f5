#include "hostcuda/block_barrier.h"

#include "hostcuda/scheduler.h"

namespace hostcuda {

namespace {

// Hardware counts arrivals and cannot tell two barriers apart; a program that mixes them is a mistake all the same.
void check_same_barrier(Site site) {
  for (const Thread& other : block->threads) {
    if (other.state != State::kAtBlockBarrier) continue;
    if (!(other.site == site)) {
      fail("divergent __syncthreads: %s:%d here, but thread %d waits at %s:%d", site.file, site.line, other.rank,
           other.site.file, other.site.line);
    }
    return;
  }
}

}  // namespace

void release_barrier_if_complete() {
  BlockBarrier& barrier = block->barrier;
  if (barrier.num_arrived == 0 || barrier.num_arrived < block->num_live) return;
  barrier.num_arrived = 0;
  ++barrier.phase;
  barrier.votes[barrier.phase % 2] = 0;
  block->for_each_thread(options.schedule, [&](Thread& thread) {
    if (thread.state != State::kAtBlockBarrier) return;
    thread.fiber->acquire(&barrier.sync);
    make_ready(thread);
  });
}

int block_barrier(const char* operation, Site site, bool vote) {
  BlockBarrier& barrier = block->barrier;
  if (options.strict && barrier.num_arrived > 0) check_same_barrier(site);
  int& votes = barrier.votes[barrier.phase % 2];
  votes += vote;
  current->fiber->release(&barrier.sync);
  current->begin(State::kAtBlockBarrier, operation, site);
  ++barrier.num_arrived;
  release_barrier_if_complete();
  wait();
  return votes;
}

}  // namespace hostcuda
