// Jobs of a block of threads that stays on its multiprocessor, taken from a counter by one warp and handed to others.
#pragma once

#include <cuflash/attention/sequence.cuh>
#include <cuflash/tile/pipeline.cuh>

namespace cuflash {

template <int kStages, bool kCompact = false>
struct JobRing {
  using Ring = Pipeline<kStages, kCompact>;
  using Position = typename Ring::Position;

  Ring ring;
  Job jobs[kStages];

  __device__ __forceinline__ void init(int num_takers) { ring.init(num_takers); }

  // The next job, for a whole warp; without one its tile is kNoTile. What the problem tells is not read from memory: it
  // needs no registers.
  template <class Options>
  __device__ __forceinline__ Job take(Position& at, const Problem& problem) {
    ring.wait_full(at);
    Job job = jobs[at.stage()];
    __syncwarp();
    if (threadIdx.x % 32 == 0) ring.release(at);
    at.advance();
    job.tile = uniform(job.tile);
    job.head = uniform(job.head);
    job.sequence.batch = uniform(job.sequence.batch);
    if constexpr (!Options::kPacked) job.sequence = Options::sequence(problem, job.sequence.batch);
    return job;
  }

  // The same, and whether there is one.
  template <class Options>
  __device__ __forceinline__ bool take(Job& job, Position& at, const Problem& problem) {
    job = take<Options>(at, problem);
    return job.tile != Job::kNoTile;
  }

  // Hands on a job.
  __device__ __forceinline__ void put(Position& at, const Job& job) {
    if (threadIdx.x % 32 == 0) {
      ring.wait_empty(at);
      jobs[at.stage()] = job;
      ring.fill(at);
    }
    at.advance();
  }
};

// The jobs of a kernel: tiles of queries, or of keys. Those without a row are left out.
template <int kBlockM>
struct QueryJobs {
  template <class Options>
  static __device__ __forceinline__ int count(const Options&, const Problem& problem) {
    return Options::template num_query_jobs<kBlockM>(problem);
  }
  template <class Options>
  static __device__ __forceinline__ Job job(const Options& options, const Problem& problem, int index) {
    if constexpr (Options::kPacked) {
      return options.template query_job<kBlockM>(problem, index);
    } else {
      const Job job = options.template query_job<kBlockM>(problem, short_last(problem, index));
      if (Options::template kTileBytes<1, 1> == 0 || !options.same_in_batch()) return job;
      // Batch entries one after the other for each head, not the other way round: they read the same tiles of pairs.
      const int head = job.sequence.batch * problem.num_heads + job.head;
      return {Options::sequence(problem, head % problem.batch), head / problem.batch, job.tile};
    }
  }
  static __device__ __forceinline__ bool has_rows(const Job& job) {
    return job.tile >= 0 && job.tile * kBlockM < job.sequence.seqlen_q;
  }

 private:
  // Where tiles are alike but for the last rows, and those are few, they come last of all heads: short jobs let the
  // multiprocessors end together. They read keys from memory that tiles of the same head had shared: so only if those
  // are several. Else each head begins with its last rows.
  static __device__ __forceinline__ int short_last(const Problem& problem, int index) {
    const int num_whole = problem.seqlen_q / kBlockM, rest = problem.seqlen_q % kBlockM;
    const int first_short = num_whole * problem.num_heads * problem.batch;
    if (!BatchedSequences::shows_all(problem) || rest == 0 || 2 * rest > kBlockM || num_whole < 4) return index;
    return index < first_short ? index + index / num_whole + 1 : (index - first_short) * (num_whole + 1);
  }
};

template <int kBlockN>
struct KeyJobs {
  template <class Options>
  static __device__ __forceinline__ int count(const Options&, const Problem& problem) {
    return Options::template num_key_jobs<kBlockN>(problem);
  }
  template <class Options>
  static __device__ __forceinline__ Job job(const Options& options, const Problem& problem, int index) {
    return options.template key_job<kBlockN>(problem, index);
  }
  static __device__ __forceinline__ bool has_rows(const Job& job) {
    return job.tile >= 0 && job.tile * kBlockN < job.sequence.num_keys;
  }
};

// Asks a counter for jobs, by a whole warp. The first job of a block is its own number, so that blocks ask one after
// another. The counter wraps to 0 when all blocks have asked in vain: it needs no clearing between kernels.
template <class Jobs, class Options>
struct JobCounter {
  const Options& options;
  const Problem& problem;
  unsigned* counter;
  int num_jobs;

  __device__ __forceinline__ JobCounter(const Options& options, const Problem& problem, unsigned* counter)
      : options(options), problem(problem), counter(counter), num_jobs(Jobs::count(options, problem)) {}

  // Starts to ask; lane 0 has the answer.
  __device__ __forceinline__ unsigned ask() const {
    return threadIdx.x % 32 == 0 ? atomicInc(counter, num_jobs - 1) + gridDim.x : 0u;
  }

  // The job of this number, or the next one that has a tile.
  __device__ __forceinline__ Job job(int index) const {
    Job job;
    job.tile = Job::kNoTile;
    for (; index < num_jobs; index = uniform(ask())) {
      job = Jobs::job(options, problem, index);
      if (!Options::kPacked || Jobs::has_rows(job)) break;
      job.tile = Job::kNoTile;
    }
    return job;
  }
};

}  // namespace cuflash
