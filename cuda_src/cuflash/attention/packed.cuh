// Sequences of any lengths, packed one behind the other along the rows of the arrays.
#pragma once

#include <cuflash/attention/sequence.cuh>

namespace cuflash {

// Sequence s has the queries from cu_seqlens_q[s] to cu_seqlens_q[s + 1], and keys likewise. Lengths are known on the
// device alone, so the grid has room for any: tile t of sequence s is job number cu_seqlens[s] / kBlock + s + t, and
// jobs without a tile do nothing. Rows behind the last sequence count as one more, in which nobody sees anything.
struct PackedSequences {
  const int *cu_seqlens_q, *cu_seqlens_k, *seqused_k;  // the last may be null

  template <int kBlockM>
  static __device__ __forceinline__ int num_query_jobs(const Problem& problem) {
    return jobs_of_head<kBlockM>(problem, problem.seqlen_q) * problem.num_heads;
  }

  // Under a causal mask the last queries see the most keys: they start first.
  template <int kBlockM>
  __device__ __forceinline__ Job query_job(const Problem& problem, int index) const {
    const int num_jobs = jobs_of_head<kBlockM>(problem, problem.seqlen_q);
    const HeadTile numbered(index, problem.num_heads, num_jobs, HeadTile::group(num_jobs));
    return job<kBlockM>(problem, cu_seqlens_q, problem.seqlen_q, numbered.head, num_jobs - 1 - numbered.tile);
  }

  template <int kBlockN>
  static __device__ __forceinline__ int num_key_jobs(const Problem& problem) {
    return jobs_of_head<kBlockN>(problem, problem.seqlen_k) * problem.num_heads_kv;
  }

  template <int kBlockN>
  __device__ __forceinline__ Job key_job(const Problem& problem, int index) const {
    const int num_jobs = jobs_of_head<kBlockN>(problem, problem.seqlen_k);
    const HeadTile numbered(index, problem.num_heads_kv, num_jobs, HeadTile::group_of_keys(num_jobs, false, false));
    return job<kBlockN>(problem, cu_seqlens_k, problem.seqlen_k, numbered.head, numbered.tile);
  }

  // The number of a tile of queries of one head among those of all; rows of padding are those of one more sequence.
  template <int kBlockM>
  static __device__ __forceinline__ long long query_tile(const Problem& problem, const Sequence& sequence, int head,
                                                         int tile) {
    return head * static_cast<long long>(jobs_of_head<kBlockM>(problem, problem.seqlen_q)) +
           sequence.first_query / kBlockM + number(sequence) + tile;
  }

  // Likewise of a tile of keys.
  template <int kBlockN>
  static __device__ __forceinline__ long long key_tile(const Problem& problem, const Sequence& sequence, int head,
                                                       int tile) {
    return head * static_cast<long long>(jobs_of_head<kBlockN>(problem, problem.seqlen_k)) +
           sequence.first_key / kBlockN + number(sequence) + tile;
  }

 private:
  template <int kBlock>
  static __device__ __forceinline__ int jobs_of_head(const Problem& problem, int total) {
    return total / kBlock + problem.batch + 1;
  }

  static __device__ __forceinline__ int number(const Sequence& sequence) {
    return sequence.batch + (sequence.padding ? 1 : 0);
  }

  // The job of this number among those of a head.
  template <int kBlock>
  __device__ __forceinline__ Job job(const Problem& problem, const int* cu_seqlens, int total, int head,
                                     int index) const {
    const int s = owner<kBlock>(cu_seqlens, total, problem.batch, index);
    return {sequence(problem, s), head, index - first_job<kBlock>(cu_seqlens, total, s)};
  }

  // Whatever the offsets are, they never lead outside of the arrays.
  static __device__ __forceinline__ int offset(const int* cu_seqlens, int total, int s) {
    return clamp(cu_seqlens[s], 0, total);
  }

  template <int kBlock>
  static __device__ __forceinline__ int first_job(const int* cu_seqlens, int total, int s) {
    return offset(cu_seqlens, total, s) / kBlock + s;
  }

  // The last sequence whose jobs begin at or before this one; each lane looks at another sequence.
  template <int kBlock>
  static __device__ __forceinline__ int owner(const int* cu_seqlens, int total, int batch, int job) {
    int count = 0;
    for (int first = 0; first <= batch; first += 32) {
      const int s = first + threadIdx.x % 32;
      const bool begun = s <= batch && first_job<kBlock>(cu_seqlens, total, s) <= job;
      count += __popc(__ballot_sync(kFullMask, begun));
    }
    return larger(0, count - 1);
  }

  __device__ __forceinline__ Sequence sequence(const Problem& problem, int s) const {
    const int first_query = offset(cu_seqlens_q, problem.seqlen_q, s);
    const int first_key = offset(cu_seqlens_k, problem.seqlen_k, s);
    if (s == problem.batch) {  // each of the two has its rows to clear, and none of the other to see
      return {problem.batch - 1,
              first_query,
              first_key,
              problem.seqlen_q - first_query,
              0,
              problem.seqlen_k - first_key,
              true};
    }
    const int seqlen_q = larger(0, offset(cu_seqlens_q, problem.seqlen_q, s + 1) - first_query);
    const int num_keys = larger(0, offset(cu_seqlens_k, problem.seqlen_k, s + 1) - first_key);
    const int seqlen_k = seqused_k == nullptr ? num_keys : clamp(seqused_k[s], 0, num_keys);
    return {s, first_query, first_key, seqlen_q, seqlen_k, num_keys, false};
  }
};

}  // namespace cuflash
