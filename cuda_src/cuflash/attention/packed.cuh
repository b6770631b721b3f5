// Sequences of any lengths, packed one behind the other along the rows of the arrays.
#pragma once

#include <cuflash/attention/sequence.cuh>
#include <cuflash/ptx/warp_reduce.cuh>

namespace cuflash {

// Sequence s has the queries from cu_seqlens_q[s] to cu_seqlens_q[s + 1], and keys likewise. Lengths are known on the
// device alone, so the grid has room for the tiles of any, and jobs without a tile do nothing. Rows behind the last
// sequence count as one more, in which nobody sees anything.
struct PackedSequences {
  const int *cu_seqlens_q, *cu_seqlens_k, *seqused_k;  // the last may be null

  template <int kBlockM>
  static __device__ __forceinline__ int num_query_jobs(const Problem& problem) {
    return jobs_of_head<kBlockM>(problem, problem.seqlen_q) * problem.num_heads;
  }

  template <int kBlockM>
  __device__ __forceinline__ Job query_job(const Problem& problem, int index) const {
    const int num_jobs = jobs_of_head<kBlockM>(problem, problem.seqlen_q);
    const HeadTile numbered(index, problem.num_heads, num_jobs, HeadTile::group(num_jobs));
    const Place found = place<kBlockM>(problem, cu_seqlens_q, problem.seqlen_q, numbered.tile);
    // Under a causal mask the last queries see the most keys.
    return {sequence(problem, found.sequence), numbered.head,
            found.exists() ? found.num_tiles - 1 - found.rank : Job::kNoTile};
  }

  template <int kBlockN>
  static __device__ __forceinline__ int num_key_jobs(const Problem& problem) {
    return jobs_of_head<kBlockN>(problem, problem.seqlen_k) * problem.num_heads_kv;
  }

  template <int kBlockN>
  __device__ __forceinline__ Job key_job(const Problem& problem, int index) const {
    const int num_jobs = jobs_of_head<kBlockN>(problem, problem.seqlen_k);
    const HeadTile numbered(index, problem.num_heads_kv, num_jobs, HeadTile::group_of_keys(num_jobs, false, false));
    const Place found = place<kBlockN>(problem, cu_seqlens_k, problem.seqlen_k, numbered.tile);
    // Under a causal mask the first keys are seen by the most queries.
    return {sequence(problem, found.sequence), numbered.head, found.exists() ? found.rank : Job::kNoTile};
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

  // Where a job of a head is: a tile of a sequence, by how many of its tiles take longer. Beyond them there is none.
  struct Place {
    int sequence, num_tiles, rank;

    __device__ __forceinline__ bool exists() const { return rank < num_tiles; }
  };

  template <int kBlock>
  static __device__ __forceinline__ Place place(const Problem& problem, const int* cu_seqlens, int total, int number) {
    if (problem.batch < 32) return longest_first<kBlock>(problem, cu_seqlens, total, number);
    // More are taken one after the other: none of so many is most of the work.
    const int s = owner<kBlock>(cu_seqlens, total, problem.batch, number);
    return {s, num_tiles<kBlock>(cu_seqlens, total, problem.batch, s),
            number - first_job<kBlock>(cu_seqlens, total, s)};
  }

  // All jobs by how long they take, in tiles, so that multiprocessors end together. Each lane looks at one sequence.
  template <int kBlock>
  static __device__ __forceinline__ Place longest_first(const Problem& problem, const int* cu_seqlens, int total,
                                                        int number) {
    const int lane = threadIdx.x % 32, batch = problem.batch;
    const int tiles = lane <= batch ? num_tiles<kBlock>(cu_seqlens, total, batch, lane) : 0;
    const bool alike = BatchedSequences::shows_all(problem);
    // How many jobs of this sequence take longer: each takes as long as all its tiles, or one less than the one before.
    const auto longer = [&](int time) { return alike ? (tiles > time ? tiles : 0) : larger(tiles - time, 0); };
    if (ptx::warp_sum(tiles) <= number) return {0, 0, 0};  // there is none
    int time = 0;  // of the job: the least that no more than `number` jobs exceed
    for (int step = 1 << (31 - __clz(ptx::warp_max(tiles))); step > 0; step /= 2) {
      if (ptx::warp_sum(longer(time + step - 1)) > number) time += step;
    }
    // The number among those of the same time, and how many of these belong to this sequence and those before it.
    const int before = longer(time), own = longer(time - 1) - before;
    const int among = number - ptx::warp_sum(before);
    int end = own;
#pragma unroll 1  // warps that look for jobs have few registers
    for (int distance = 1; distance < 32; distance *= 2) {
      const int left = __shfl_up_sync(kFullMask, end, distance);
      if (lane >= distance) end += left;
    }
    const int s = __popc(__ballot_sync(kFullMask, end <= among));
    return {s, __shfl_sync(kFullMask, tiles, s), __shfl_sync(kFullMask, before + among - (end - own), s)};
  }

  // Whatever the offsets are, they never lead outside of the arrays.
  static __device__ __forceinline__ int offset(const int* cu_seqlens, int total, int s) {
    return clamp(cu_seqlens[s], 0, total);
  }

  template <int kBlock>
  static __device__ __forceinline__ int num_tiles(const int* cu_seqlens, int total, int batch, int s) {
    const int end = s == batch ? total : offset(cu_seqlens, total, s + 1);
    return ceil_div(larger(0, end - offset(cu_seqlens, total, s)), kBlock);
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
