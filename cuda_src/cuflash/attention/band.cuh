// Which keys a query sees: causal masks and sliding windows are bands around a diagonal.
#pragma once

#include <cuflash/common/math.cuh>

namespace cuflash {

struct Range {
  int begin, end;  // end is exclusive
};

// Query i sees key j iff i + begin <= j < i + end, and j < seqlen_k.
struct Band {
  int begin, end, seqlen_q, seqlen_k;

  __device__ __forceinline__ bool visible(int i, int j) const { return i + begin <= j && j < i + end && j < seqlen_k; }

  // Whether every query of one range sees every key of the other.
  __device__ __forceinline__ bool all_visible(Range queries, Range keys) const {
    return queries.end - 1 + begin <= keys.begin && keys.end <= queries.begin + end && keys.end <= seqlen_k;
  }

  // Whether it hides a pair of these queries and keys, of those that there are: what lies behind the ends is zeros.
  __device__ __forceinline__ bool hides_any(Range queries, Range keys) const {
    return !all_visible({queries.begin, min(queries.end, seqlen_q)}, {keys.begin, min(keys.end, seqlen_k)});
  }

  // Whether any query of one range sees any key of the other.
  __device__ __forceinline__ bool any_visible(Range queries, Range keys) const {
    const Range seen = keys_of(queries);
    return max(seen.begin, keys.begin) < min(seen.end, keys.end);
  }

  // The keys that at least one of these queries sees.
  __device__ __forceinline__ Range keys_of(Range queries) const {
    const int last = min(queries.end, seqlen_q) - 1;
    return {max(0, queries.begin + begin), min(seqlen_k, last + end)};
  }

  // The queries that see at least one of these keys.
  __device__ __forceinline__ Range queries_of(Range keys) const {
    const int last = min(keys.end, seqlen_k) - 1;
    if (last < keys.begin) return {0, 0};
    return {max(0, keys.begin - end + 1), min(seqlen_q, last - begin + 1)};
  }
};

}  // namespace cuflash
