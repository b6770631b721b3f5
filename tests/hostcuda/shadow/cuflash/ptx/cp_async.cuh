// Shadows <cuflash/ptx/cp_async.cuh>; hostcuda/copies.h tells the idea.
#pragma once

namespace cuflash::ptx {

template <class Piece>
inline void run_copy_of(const hostcuda::Copy& copy) {
  *static_cast<Piece*>(copy.target) = copy.source != nullptr ? *static_cast<const Piece*>(copy.source) : Piece{};
}

inline void run_copy(const hostcuda::Copy& copy) {
  copy.size == 16 ? run_copy_of<uint4>(copy) : run_copy_of<unsigned>(copy);
}

// Chips before sm_80 have no cp.async; there the wrapper copies at once.
inline bool copies_are_lazy() { return hostcuda::options.lazy_copies && hostcuda::options.arch >= 800; }

template <class Piece>
inline void start_copy(void* shared, const void* global, bool valid, hostcuda::Site site) {
  const auto is_misaligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(Piece); };
  if (is_misaligned(shared) || is_misaligned(global)) {
    hostcuda::fail("cp.async at %s:%d: an address is not a multiple of %d", site.file, site.line, int(sizeof(Piece)));
  }
  hostcuda::check_in_shared_memory(shared, "cp.async", site);
  hostcuda::CopyQueue& copies = hostcuda::current->copies;
  const hostcuda::Copy copy = {shared, valid ? global : nullptr, sizeof(Piece), copies.open_group};
  if (copies_are_lazy()) {
    memset(shared, 0xff, sizeof(Piece));
    copies.pending.push_back(copy);
  } else {
    run_copy(copy);
  }
}

inline void cp_async_16(void* shared, const void* global, bool valid, hostcuda::Site site = hostcuda::Site::here()) {
  start_copy<uint4>(shared, global, valid, site);
}

inline void cp_async_4(void* shared, const void* global, bool valid, hostcuda::Site site = hostcuda::Site::here()) {
  start_copy<unsigned>(shared, global, valid, site);
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
