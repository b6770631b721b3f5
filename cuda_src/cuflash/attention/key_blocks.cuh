// Which blocks of keys a tile of queries visits, and in which of them every pair is visible.
#pragma once

#include <cuflash/attention/options.cuh>

namespace cuflash {

template <int kBlockM, int kBlockN>
struct KeyBlocks {
  int begin, end;            // visited
  int full_begin, full_end;  // in the band altogether, as far as some of the queries are concerned

  // A tile without any visible key visits one block, where there are keys, and sees nothing there.
  __device__ __forceinline__ KeyBlocks(const Band& band, int first_query, Range some_queries) {
    const Range keys = band.keys_of({first_query, first_query + kBlockM});
    begin = min(keys.begin, larger(band.seqlen_k, 1) - 1) / kBlockN;
    end = larger(begin + 1, ceil_div(keys.end, kBlockN));
    full_begin = clamp(ceil_div(min(some_queries.end, band.seqlen_q) - 1 + band.begin, kBlockN), begin, end);
    full_end = clamp(min(some_queries.begin + band.end, band.seqlen_k) / kBlockN, begin, end);
  }

  // Leaves one of several parts, of the same length or less; it may be empty.
  __device__ __forceinline__ void keep(const Part& part) {
    const int length = ceil_div(end - begin, part.count);
    begin = min(begin + part.number * length, end);
    end = min(begin + length, end);
  }

  // A block that is visited, and whether options show all its pairs.
  struct Visited {
    int block;
    bool shown;
  };

  // This block, or the next before it that options do not hide altogether. The first is visited in any case.
  template <class Options>
  static __device__ __forceinline__ Visited visited(const Options& options, int first_query, int block, int begin) {
    if constexpr (Options::kSkipsBlocks) {
      for (Options there = options; block >= begin; --block) {
        there.template look_at<kBlockM, kBlockN>(nullptr, first_query, block * kBlockN);
        if (block == begin || !there.hides_all()) return {block, there.shows_all()};
      }
    }
    return {block, !Options::kHidesPairs};
  }

  // Calls visit(options of the job, visited block, whether it is the last) from the last block of a job to its first.
  template <class Options, class Visit>
  static __device__ __forceinline__ void for_each(const Options& options, const Problem& problem, const Job& job,
                                                  Visit visit) {
    const int first_query = job.tile * kBlockM;
    const Band band = problem.band(job.sequence.seqlen_q, job.sequence.seqlen_k);
    const KeyBlocks blocks(band, first_query, {first_query, first_query + kBlockM});
    Options here = options;
    here.enter(job.sequence, job.head);
    for (int block = blocks.end; block > blocks.begin;) {
      const Visited next = visited(here, first_query, block - 1, blocks.begin);
      block = next.block;
      visit(here, next, block == blocks.begin);
    }
  }
};

}  // namespace cuflash
