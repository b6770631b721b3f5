// Shadows <cuflash/ptx/cp_async.cuh>; hostcuda/copies.h tells the idea.
#pragma once

namespace cuflash::ptx {

inline void run_copy(const hostcuda::Copy& copy) {
  *static_cast<uint4*>(copy.target) =
      copy.source != nullptr ? *static_cast<const uint4*>(copy.source) : make_uint4(0, 0, 0, 0);
}

// Chips before sm_80 have no cp.async; there the wrapper copies at once.
inline bool copies_are_lazy() { return hostcuda::options.lazy_copies && hostcuda::options.arch >= 800; }

inline void cp_async_16(void* shared, const void* global, bool valid, hostcuda::Site site = hostcuda::Site::here()) {
  const auto is_misaligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 != 0; };
  if (is_misaligned(shared) || is_misaligned(global)) {
    hostcuda::fail("cp.async at %s:%d: an address is not a multiple of 16", site.file, site.line);
  }
  hostcuda::check_in_shared_memory(shared, "cp.async", site);
  hostcuda::CopyQueue& copies = hostcuda::current->copies;
  const hostcuda::Copy copy = {shared, valid ? global : nullptr, copies.open_group};
  if (copies_are_lazy()) {
    *static_cast<uint4*>(shared) = make_uint4(~0u, ~0u, ~0u, ~0u);
    copies.pending.push_back(copy);
  } else {
    run_copy(copy);
  }
}

inline void cp_async_commit() { ++hostcuda::current->copies.open_group; }

template <int kPending>
inline void cp_async_wait() {
  hostcuda::CopyQueue& copies = hostcuda::current->copies;
  while (!copies.pending.empty() && copies.pending.front().group < copies.open_group - kPending) {
    run_copy(copies.pending.front());
    copies.pending.pop_front();
  }
}

}  // namespace cuflash::ptx
