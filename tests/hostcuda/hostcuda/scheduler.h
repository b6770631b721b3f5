// Who runs next. Exactly one thread runs at a time, until it waits or exits.
#pragma once

#include "hostcuda/thread.h"

namespace hostcuda {

// Runs the blocks of a cluster, from the fiber `caller`, until all their threads have exited or one has failed.
// Returns null, or what went wrong; the text lives until the next call.
const char* run_cluster(std::vector<Block*> blocks, Fiber& caller, void (*body)());

// The thread may run again.
void make_ready(Thread& thread);

// The calling thread waits in its current operation; returns after somebody has made it ready, and it is its turn.
void wait();

// The calling thread waits until another one wakes those that wait for `what`.
void sleep_until(const void* what, const char* operation, Site site);
void wake(const void* what);

// Ends the launch with a message; call it from a thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace hostcuda
