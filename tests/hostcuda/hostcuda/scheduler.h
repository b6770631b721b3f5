// Who runs next. Exactly one thread runs at a time, until it waits or exits.
#pragma once

#include "hostcuda/thread.h"

namespace hostcuda {

// Runs the block, from the fiber `caller`, until all its threads have exited or one has failed.
// Returns null, or what went wrong; the text lives until the next call.
const char* run_block(Block& block, Fiber& caller, void (*body)());

// The thread may run again.
void make_ready(Thread& thread);

// The calling thread waits in its current operation; returns after somebody has made it ready, and it is its turn.
void wait();

// Ends the launch with a message; call it from a thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace hostcuda
