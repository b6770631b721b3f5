// How a launch runs. Mirrored by LaunchOptions in tests/hostcuda/launch.py.
#pragma once

#include <cstdint>

namespace hostcuda {

// In which order the threads that could run do run.
enum class Schedule : int32_t {
  kForward,  // in turn, lowest first
  kReverse,  // in turn, highest first
  kGreedy,   // whoever was released last: one warp runs as far ahead as barriers let it
  kRandom,
};

struct Options {
  int32_t num_blocks, num_threads, shared_bytes;
  Schedule schedule;
  int32_t lazy_copies;       // cp.async copies at the last moment that its wait allows, instead of at once
  int32_t strict;            // also report what only careless hardware forgives
  int32_t paired_fragments;  // wmma elements 2i and 2i + 1 are neighbours in a row
  int32_t arch;              // 900 for sm_90
  int32_t cluster;           // blocks that run side by side
  uint64_t seed;             // of Schedule::kRandom
};

}  // namespace hostcuda
