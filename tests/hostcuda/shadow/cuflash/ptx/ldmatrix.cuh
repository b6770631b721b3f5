// Shadows <cuflash/ptx/ldmatrix.cuh>: which lane gets what is as the PTX ISA draws it.
#pragma once

#include <cuflash/ptx/shared_address.cuh>

namespace cuflash::ptx {

// Each lane learns the rows of all, and then reads its own elements itself, so that sanitizers see who reads what.
inline void load_matrices(unsigned (&x)[4], const void* row, bool transposed, hostcuda::Site site) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    hostcuda::fail("ldmatrix at %s:%d: the address is not a multiple of 16", site.file, site.line);
  }
  hostcuda::check_in_shared_memory(row, "ldmatrix", site);
  struct Argument {
    const void* row;
    const uint16_t* rows[32];
  } argument = {row, {}};
  hostcuda::warp_operation(
      hostcuda::kAllLanes, "ldmatrix", site, argument, [&](const hostcuda::Lanes<Argument>& lanes) {
        if (!lanes.all_present()) {
          hostcuda::fail("ldmatrix at %s:%d: some lanes of the warp have exited", site.file, site.line);
        }
        lanes.for_each([&](int, Argument& mine) {
          lanes.for_each([&](int other, Argument& its) { mine.rows[other] = static_cast<const uint16_t*>(its.row); });
        });
      });
  const int lane = hostcuda::current->lane, row_of = lane / 4, pair = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const uint16_t* const* const rows = argument.rows + 8 * i;
    const uint16_t low = transposed ? rows[pair][row_of] : rows[row_of][pair];
    const uint16_t high = transposed ? rows[pair + 1][row_of] : rows[row_of][pair + 1];
    x[i] = low | uint32_t{high} << 16;
  }
}

inline void ldmatrix(unsigned (&x)[4], SharedAddress row, hostcuda::Site site = hostcuda::Site::here()) {
  load_matrices(x, reinterpret_cast<const void*>(row), false, site);
}

inline void ldmatrix_transposed(unsigned (&x)[4], SharedAddress row, hostcuda::Site site = hostcuda::Site::here()) {
  load_matrices(x, reinterpret_cast<const void*>(row), true, site);
}

}  // namespace cuflash::ptx
