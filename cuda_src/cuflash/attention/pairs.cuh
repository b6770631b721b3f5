// Arrays that hold a number for each pair of query and key: additive biases and boolean masks.
#pragma once

#include <cuflash/attention/neighbour.cuh>
#include <cuflash/attention/sequence.cuh>

namespace cuflash {

// Strides may be 0: the array is broadcast along that axis. Kernels copy a tile of it to shared memory ahead of time;
// what lies outside of the array is 0 there.
template <class T>
struct PairArray {
  const T* data;
  Strides strides;
  int seqlen_q, seqlen_k;             // of the sequence at hand
  const T* tile;                      // at hand
  int first_query, first_key, pitch;  // of that tile

  template <int kBlockM, int kBlockN>
  static constexpr int kTileBytes = kBlockM * padded<T>(kBlockN) * static_cast<int>(sizeof(T));

  __device__ __forceinline__ void enter(const Sequence& sequence, int head) {
    data += sequence.batch * strides.batch + head * strides.head;
    seqlen_q = sequence.seqlen_q;
    seqlen_k = sequence.seqlen_k;
  }

  template <int kBlockM, int kBlockN, int kNumThreads>
  __device__ __forceinline__ void load(unsigned char* memory, int first_query, int first_key, int thread) const {
    const Strides within = {0, 0, strides.row, strides.col};
    const Matrix<const T> pairs(data + first_key * strides.col, within, 0, 0, 0, seqlen_q, seqlen_k - first_key);
    load_tile<kBlockM, kBlockN, kNumThreads>(reinterpret_cast<T*>(memory), pairs, first_query, thread);
  }

  template <int kBlockN>
  __device__ __forceinline__ void look_at(const unsigned char* memory, int query, int key) {
    tile = reinterpret_cast<const T*>(memory);
    first_query = query;
    first_key = key;
    pitch = padded<T>(kBlockN);
  }

  __device__ __forceinline__ T at(int query, int key) const {
    return tile[(query - first_query) * pitch + key - first_key];
  }
  __device__ __forceinline__ auto at(int query, Neighbour key) const {
    using Two = TwoElements<T>;
    const T* two = tile + (query - first_query) * pitch + key.first - first_key;
    return Two::pick(*reinterpret_cast<const typename Two::Word*>(two), key.second);
  }
};

}  // namespace cuflash
