// Which rows of the arrays belong to a sequence: a batch entry, or a stretch of packed arrays.
#pragma once

#include <cuflash/attention/params.cuh>

namespace cuflash {

struct Sequence {
  int batch;                   // its number
  int first_query, first_key;  // where its rows begin
  int seqlen_q, seqlen_k;
  int num_keys;  // rows of K and V that belong to it; only the first seqlen_k of them are used
  bool padding;  // no sequence at all, but rows of packed arrays that belong to none
};

// What a block of threads works on: a tile of the queries, or of the keys, of one sequence and head.
struct Job {
  static constexpr int kNoTile = -1;

  Sequence sequence;
  int head, tile;
};

// Which of several parts of a job's keys a block of threads has.
struct Part {
  int number, count;
};

// A tile of one of several heads, by the number of the job. Groups of heads run one after another, so that L2 holds
// what they read; in a group all heads go through the tiles in step, so that long jobs that come first in each head
// come first in all.
struct HeadTile {
  int head, tile;

  __device__ __forceinline__ HeadTile(int index, int num_heads, int num_tiles, int heads_in_group) {
    const int first = index / (heads_in_group * num_tiles) * heads_in_group;
    const int in_group = min(heads_in_group, num_heads - first), number = index - first * num_tiles;
    head = first + number % in_group;
    tile = number / in_group;
  }

  // A group has about as many jobs as a GPU has multiprocessors, or more; with queries in tiles that are all alike,
  // each head is a group.
  static __device__ __forceinline__ int group(int num_tiles) {
    return 8 * (num_tiles < 8 ? 4 : num_tiles < 16 ? 2 : 1);
  }

  // With tiles of keys, of long sequences fewer: all blocks that work on a head add to the same sums. Of heads that
  // belong to several query heads jobs are few and long: the longest of more heads come first.
  static __device__ __forceinline__ int group_of_keys(int num_tiles, bool alike, bool of_several) {
    if (num_tiles >= (alike ? 128 : 256)) return 2;
    if (num_tiles >= (alike && !of_several ? 32 : 128)) return 4;
    return of_several && !alike ? 2 * group(num_tiles) : group(num_tiles);
  }
};

// Sequences of one length, in a batch axis of the arrays.
struct BatchedSequences {
  template <int kBlockM>
  static __device__ __forceinline__ int num_query_jobs(const Problem& problem) {
    return ceil_div(problem.seqlen_q, kBlockM) * problem.num_heads * problem.batch;
  }

  // Under a causal mask the last queries see the most keys: they start first. If options skip blocks, tiles are not
  // alike, whatever the band says.
  template <int kBlockM>
  static __device__ __forceinline__ Job query_job(const Problem& problem, int index, bool may_be_alike = true) {
    const int num_tiles = ceil_div(problem.seqlen_q, kBlockM);
    const HeadTile job(index, problem.num_heads * problem.batch, num_tiles,
                       may_be_alike && shows_all(problem) ? 1 : HeadTile::group(num_tiles));
    return {sequence(problem, job.head / problem.num_heads), job.head % problem.num_heads, num_tiles - 1 - job.tile};
  }

  template <int kBlockN>
  static __device__ __forceinline__ int num_key_jobs(const Problem& problem) {
    return ceil_div(problem.seqlen_k, kBlockN) * problem.num_heads_kv * problem.batch;
  }

  // Under a causal mask the first keys are seen by the most queries: they start first.
  template <int kBlockN>
  static __device__ __forceinline__ Job key_job(const Problem& problem, int index) {
    const int num_tiles = ceil_div(problem.seqlen_k, kBlockN);
    const HeadTile job(
        index, problem.num_heads_kv * problem.batch, num_tiles,
        HeadTile::group_of_keys(num_tiles, shows_all(problem), problem.num_heads > problem.num_heads_kv));
    return {sequence(problem, job.head / problem.num_heads_kv), job.head % problem.num_heads_kv, job.tile};
  }

  // The number of a tile of queries of one head among those of all.
  template <int kBlockM>
  static __device__ __forceinline__ long long query_tile(const Problem& problem, const Sequence& sequence, int head,
                                                         int tile) {
    const long long row = static_cast<long long>(sequence.batch) * problem.num_heads + head;
    return row * ceil_div(problem.seqlen_q, kBlockM) + tile;
  }

  // Likewise of a tile of keys.
  template <int kBlockN>
  static __device__ __forceinline__ long long key_tile(const Problem& problem, const Sequence& sequence, int head,
                                                       int tile) {
    const long long row = static_cast<long long>(sequence.batch) * problem.num_heads_kv + head;
    return row * ceil_div(problem.seqlen_k, kBlockN) + tile;
  }

  // Whether the band hides nothing: then all tiles take the same time.
  static __device__ __forceinline__ bool shows_all(const Problem& problem) {
    return problem.window_begin <= -problem.seqlen_q && problem.window_end >= problem.seqlen_k;
  }

  static __device__ __forceinline__ Sequence sequence(const Problem& problem, int batch) {
    return {batch, 0, 0, problem.seqlen_q, problem.seqlen_k, problem.seqlen_k, false};
  }
};

}  // namespace cuflash
