// The tiles of queries that a block of threads visits for its tile of keys.
#pragma once

#include <cuflash/attention/options.cuh>

namespace cuflash {

// Goes through those of one query head of the group after another, without the ones that options hide altogether. With
// kStaggered each head begins with the queries beside the keys: blocks of threads that go through the same heads keep
// step, and would otherwise add to the same sums, or ask for the same tiles, at the same time.
template <int kBlockM, int kBlockN, class Options, bool kStaggered>
struct QueryWalk {
  const Options& options;
  const Job& job;
  int begin, end;  // blocks of queries that see some of the keys, as far as the band is concerned
  int last_head;
  int head, block;  // at hand

  __device__ __forceinline__ QueryWalk(const Options& options, const Problem& problem, const Job& job, const Band& band)
      : options(options), job(job) {
    const int first_key = job.tile * kBlockN, group = problem.group_size();
    const Range queries = band.queries_of({first_key, first_key + kBlockN});
    begin = uniform(queries.begin / kBlockM);
    end = queries.begin < queries.end ? uniform(ceil_div(queries.end, kBlockM)) : begin;
    last_head = job.head * group + group - 1;
    head = begin < end ? job.head * group : last_head + 1;
    block = start();
    skip();
  }

  __device__ __forceinline__ bool done() const { return head > last_head; }

  __device__ __forceinline__ void advance() {
    step();
    skip();
  }

 private:
  // The block with which each head begins. Found anew each time: registers are few.
  __device__ __forceinline__ int start() const {
    return kStaggered ? larger(begin, smaller(job.tile * kBlockN / kBlockM, end - 1)) : begin;
  }

  __device__ __forceinline__ void step() {
    if (++block == end) block = begin;
    if (block == start()) ++head;
  }

  __device__ __forceinline__ void skip() {
    if constexpr (Options::kSkipsBlocks) {
      for (; !done(); step()) {
        Options there = options;
        there.enter(job.sequence, head);
        there.template look_at<kBlockM, kBlockN>(nullptr, block * kBlockM, job.tile * kBlockN);
        if (!there.hides_all()) return;
      }
    }
  }
};

}  // namespace cuflash
