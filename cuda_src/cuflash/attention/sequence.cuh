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
  Sequence sequence;
  int head, tile;
};

// Sequences of one length, in a batch axis of the arrays.
struct BatchedSequences {
  // Under a causal mask the last queries see the most keys: they start first.
  template <int kBlockM>
  static __device__ __forceinline__ Job query_job(const Problem& problem) {
    const int num_tiles = ceil_div(problem.seqlen_q, kBlockM);
    const Job job = numbered_job(problem, problem.num_heads, num_tiles);
    return {job.sequence, job.head, num_tiles - 1 - job.tile};
  }

  // Under a causal mask the first keys are seen by the most queries: they start first.
  template <int kBlockN>
  static __device__ __forceinline__ Job key_job(const Problem& problem) {
    return numbered_job(problem, problem.num_heads_kv, ceil_div(problem.seqlen_k, kBlockN));
  }

  static __device__ __forceinline__ Sequence sequence(const Problem& problem, int batch) {
    return {batch, 0, 0, problem.seqlen_q, problem.seqlen_k, problem.seqlen_k, false};
  }

 private:
  // Groups of heads run one after another, so that L2 holds their keys; in a group all heads go through the tiles in
  // step, so that the longest jobs of all start first.
  static constexpr int kHeadsInGroup = 8;

  static __device__ __forceinline__ Job numbered_job(const Problem& problem, int num_heads, int num_tiles) {
    const int total = num_heads * problem.batch, first = blockIdx.x / (kHeadsInGroup * num_tiles) * kHeadsInGroup;
    const int in_group = min(kHeadsInGroup, total - first), job = blockIdx.x - first * num_tiles;
    const int number = first + job % in_group;
    return {sequence(problem, number / num_heads), number % num_heads, job / in_group};
  }
};

}  // namespace cuflash
