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

// A tile of one of several heads, by the number of the job. Groups of heads run one after another, so that L2 holds
// what they read; in a group all heads go through the tiles in step, so that long jobs that come first in each head
// come first in all. A group has about as many jobs as a GPU has multiprocessors, or more; heads whose jobs are all
// alike are a group each.
struct HeadTile {
  static constexpr int kHeadsInGroup = 8;

  int head, tile;

  __device__ __forceinline__ HeadTile(int index, int num_heads, int num_tiles, bool alike = false) {
    const int heads_in_group = alike ? 1 : kHeadsInGroup * (num_tiles < 8 ? 4 : num_tiles < 16 ? 2 : 1);
    const int first = index / (heads_in_group * num_tiles) * heads_in_group;
    const int in_group = min(heads_in_group, num_heads - first), number = index - first * num_tiles;
    head = first + number % in_group;
    tile = number / in_group;
  }
};

// Sequences of one length, in a batch axis of the arrays.
struct BatchedSequences {
  template <int kBlockM>
  static __device__ __forceinline__ int num_query_jobs(const Problem& problem) {
    return ceil_div(problem.seqlen_q, kBlockM) * problem.num_heads * problem.batch;
  }

  // Under a causal mask the last queries see the most keys: they start first.
  template <int kBlockM>
  static __device__ __forceinline__ Job query_job(const Problem& problem, int index) {
    const int num_tiles = ceil_div(problem.seqlen_q, kBlockM);
    const bool alike = problem.window_begin <= -problem.seqlen_q && problem.window_end >= problem.seqlen_k;
    const HeadTile job(index, problem.num_heads * problem.batch, num_tiles, alike);
    return {sequence(problem, job.head / problem.num_heads), job.head % problem.num_heads, num_tiles - 1 - job.tile};
  }

  // Under a causal mask the first keys are seen by the most queries: they start first.
  template <int kBlockN>
  static __device__ __forceinline__ Job key_job(const Problem& problem) {
    const HeadTile job(blockIdx.x, problem.num_heads_kv * problem.batch, ceil_div(problem.seqlen_k, kBlockN));
    return {sequence(problem, job.head / problem.num_heads_kv), job.head % problem.num_heads_kv, job.tile};
  }

  static __device__ __forceinline__ Sequence sequence(const Problem& problem, int batch) {
    return {batch, 0, 0, problem.seqlen_q, problem.seqlen_k, problem.seqlen_k, false};
  }
};

}  // namespace cuflash
