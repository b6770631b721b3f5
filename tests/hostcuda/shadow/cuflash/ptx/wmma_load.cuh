// Shadows <cuflash/ptx/wmma_load.cuh>: to load through a shared address is to load.
#pragma once

#include <mma.h>

namespace cuflash::ptx {

template <class Fragment, class Element>
inline void wmma_load(Fragment& factor, const Element* tile, int pitch, hostcuda::Site site = hostcuda::Site::here()) {
  hostcuda::check_in_shared_memory(tile, "wmma.load", site);
  nvcuda::wmma::load_matrix_sync(factor, tile, pitch, site);
}

}  // namespace cuflash::ptx
