#include "hostcuda/warp.h"

#include <cstring>

namespace hostcuda {

namespace {

void check_same_operation(unsigned mask, const char* operation, Site site) {
  const Thread& self = *current;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!((mask & ~self.warp->absent) >> lane & 1)) continue;
    const Thread& other = *self.warp->lanes[lane];
    if (other.mask != mask || strcmp(other.operation, operation) != 0 || (options.strict && !(other.site == site))) {
      fail("divergent warp: lane %d is in %s at %s:%d with mask %08x, lane %d in %s at %s:%d with mask %08x", self.lane,
           operation, site.file, site.line, mask, lane, other.operation, other.site.file, other.site.line, other.mask);
    }
    if (options.strict && mask == kAllLanes && other.path != self.path) {
      fail(
          "the lanes of a warp disagree about the wmma loads and stores before %s at %s:%d: the last one of lane %d "
          "was "
          "at %s:%d, of lane %d at %s:%d, or with another pointer or leading dimension",
          operation, site.file, site.line, self.lane, self.last_step.file, self.last_step.line, lane,
          other.last_step.file, other.last_step.line);
    }
  }
}

// Lanes that have exited are not waited for.
bool everybody_arrived(const Warp& warp, unsigned mask) { return (warp.waiting & mask) == (mask & ~warp.absent); }

}  // namespace

bool arrive_in_warp(unsigned mask, const char* operation, Site site, const void* argument) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  if (!(mask >> self.lane & 1)) {
    fail("%s at %s:%d: the calling lane %d is not in its mask %08x", operation, site.file, site.line, self.lane, mask);
  }
  self.begin(State::kAtWarpOperation, operation, site);
  self.mask = mask;
  self.argument = argument;
  warp.waiting |= 1u << self.lane;
  while (!everybody_arrived(warp, mask)) {
    wait();
    const bool done = !(warp.waiting >> self.lane & 1);
    if (done) return false;
  }
  check_same_operation(mask, operation, site);
  return true;
}

void finish_warp_operation(unsigned mask) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  const unsigned present = mask & ~warp.absent;
  warp.waiting &= ~present;
  self.state = State::kReady;
  for (int i = 0; i < kWarpSize; ++i) {
    const int lane = options.schedule == Schedule::kReverse ? kWarpSize - 1 - i : i;
    if ((present >> lane & 1) && lane != self.lane) make_ready(*warp.lanes[lane]);
  }
}

void release_warp_if_complete(Warp& warp) {
  for (Thread* lane : warp.lanes) {
    if (lane == nullptr || lane->state != State::kAtWarpOperation || !everybody_arrived(warp, lane->mask)) continue;
    make_ready(*lane);
    return;
  }
}

void note_step(Site site, const void* pointer, unsigned leading_dimension) {
  Thread& self = *current;
  constexpr uint64_t kMultiplier = 0x9e3779b97f4a7c15;
  for (const uint64_t value : {reinterpret_cast<uint64_t>(pointer), uint64_t{leading_dimension}, uint64_t(site.line)}) {
    self.path = (self.path ^ value) * kMultiplier;
    self.path ^= self.path >> 32;
  }
  self.last_step = site;
}

void warp_barrier(unsigned mask, Site site) {
  // Shuffles and votes order no memory; of the warp-wide operations only this one does.
  current->fiber->release(&current->warp->sync);
  int nothing = 0;
  warp_operation(mask, "__syncwarp", site, nothing, [](const Lanes<int>& lanes) {
    lanes.for_each([](int lane, int&) { current->warp->lanes[lane]->fiber->acquire(&current->warp->sync); });
  });
}

unsigned ballot(unsigned mask, const char* operation, Site site, bool vote) {
  struct Argument {
    bool vote;
    unsigned result;
  } argument{vote, 0};
  warp_operation(mask, operation, site, argument, [](const Lanes<Argument>& lanes) {
    unsigned result = 0;
    lanes.for_each([&](int lane, Argument& mine) { result |= unsigned{mine.vote} << lane; });
    lanes.for_each([&](int, Argument& mine) { mine.result = result; });
  });
  return argument.result;
}

}  // namespace hostcuda
