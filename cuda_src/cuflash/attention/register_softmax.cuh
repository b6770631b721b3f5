// The softmax of tiles of scores that warps hold in registers, each two rows a lane, one tile of keys after another.
#pragma once

#include <cuflash/attention/options.cuh>
#include <cuflash/attention/softmax.cuh>
#include <cuflash/attention/survivors.cuh>
#include <cuflash/tile/warpgroup_tile.cuh>

namespace cuflash {

// Where a tile may have pairs that the band hides: only behind its end, or anywhere.
enum class Hidden { kBehind, kAround };

// What is left to do of scores: x * scale - penalty; with kIsBounded, those of this lane are then not above the
// bound, but for rounding.
template <bool kIsBounded>
struct RestOfScores {
  float scale, penalty, bound;
};

// The tile at hand: what its pairs are asked, and the positions of the first element that this lane holds.
template <class Options>
struct TileOfPairs {
  using Rest = RestOfScores<Options::kLeavesFactor>;

  const Pairs<Options>& pairs;
  int first_query, first_key;

  // Turns products into scores as far as options change them. Returns what is left to do.
  template <class Scores>
  __device__ __forceinline__ Rest change(Scores& scores) const {
    if constexpr (Options::kHasPenalties) {
      return penalize(scores);
    } else if constexpr (Options::kLeavesFactor) {
      return bend(scores);
    } else if constexpr (Options::kChangesScores) {
      if (!pairs.has_no_keys()) {
        use_pairs(pairs, scores, [&](const auto& pairs) {
#pragma unroll
          for (int i = 0; i < Scores::kNumElements; ++i) {
            scores.x[i] = pairs.score(scores.x[i], query(i), neighbour(i)).value;
          }
        });
      }
      return {1.0f, 0.0f};
    } else {
      return {pairs.scale, 0.0f};
    }
  }

  // A bit for each element of a row.
  template <Hidden kHidden, class Scores>
  __device__ __forceinline__ void hide_by_band(Scores& scores) const {
    const int begin = elements_before(first_query + pairs.band.begin - first_key);
    const int end = elements_before(first_query + pairs.band.end - first_key);
    const int all = elements_before(pairs.band.seqlen_k - first_key);
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // 8 queries further on a row sees 8 other keys
#pragma unroll
      for (int first = 0; first < Scores::kNumElements / 2; first += 32) {
        unsigned hidden = bits_from(min(end + 2 * r, all) - first);
        if constexpr (kHidden == Hidden::kAround) hidden |= ~bits_from(begin + 2 * r - first);
#pragma unroll
        for (int bit = 0; bit < smaller(32, Scores::kNumElements / 2 - first); ++bit) {
          const int element = first + bit;  // of the row
          if (hidden >> bit & 1) scores.x[element / 2 * 4 + 2 * r + element % 2] = -infinity();
        }
      }
    }
  }

  template <class Scores>
  __device__ __forceinline__ void hide_by_options(Scores& scores) const {
    if constexpr (Options::kHidesPairs) {
      if (pairs.options_hide_nothing()) return;
#pragma unroll
      for (int i = 0; i < Scores::kNumElements; ++i) {
        if (!shown_by_options(i)) scores.x[i] = -infinity();
      }
    }
  }

  // Element i, or the one so many columns to the right of it, an even number.
  __device__ __forceinline__ bool shown_by_options(int i, int further = 0) const {
    return pairs.visible_by_options(query(i), neighbour(i, further));
  }

 private:
  // No score is larger than the scaled product, of which the choice of a short way has found the largest.
  template <class Scores>
  __device__ __forceinline__ Rest bend(Scores& scores) const {
    Rest rest = {};
    rest.bound = scores.largest() * fabsf(pairs.scale);
    use_pairs(pairs, scores, [&](const auto& pairs) {
      rest.scale = pairs.factor();
#pragma unroll
      for (int i = 0; i < Scores::kNumElements; ++i) {
        scores.x[i] = pairs.score_over_factor(scores.x[i], query(i), neighbour(i)).value;
      }
    });
    return rest;
  }

  // Where penalties are a line, that of one pair is left to do, and the others differ from it by a step for each key
  // and query between.
  template <class Scores>
  __device__ __forceinline__ Rest penalize(Scores& scores) const {
    const Options& options = pairs.options;
    constexpr int kHalf = Scores::kNumElements;  // of the columns
    const int middle = first_key + kHalf;
    if (__all_sync(kFullMask, options.penalties_are_line(first_query, middle, 2 * kHalf))) {
      const float step = options.penalty_step(first_query, middle);
#pragma unroll
      for (int i = 0; i < Scores::kNumElements; ++i) {
        scores.x[i] = fmaf(step, col_of_element(i) - kHalf - 8 * row_of_element(i), scores.x[i]);
      }
      return {pairs.scale, options.penalty(first_query, middle) * pairs.scale};
    }
#pragma unroll
    for (int i = 0; i < Scores::kNumElements; ++i) scores.x[i] -= options.penalty(query(i), key(i));
    return {pairs.scale, 0.0f};
  }

  __device__ __forceinline__ int query(int i) const { return first_query + 8 * row_of_element(i); }
  __device__ __forceinline__ int key(int i) const { return first_key + col_of_element(i); }
  __device__ __forceinline__ Neighbour neighbour(int i, int further = 0) const {
    return {key(i - i % 2) + further, i % 2 == 1};
  }
};

// The softmax of a row: of float32 a base has to be a score to the last bit.
template <class Element, class Options>
using RowSoftmax = OnlineSoftmax<sizeof(Element) == 4        ? Exponential::kNatural
                                 : kScoresOfAnySize<Options> ? Exponential::kFused
                                                             : Exponential::kLog2>;

// The two rows of which a lane holds a part.
template <class Element, class Options>
struct RowPair {
  using Softmax = RowSoftmax<Element, Options>;

  Softmax softmax[2];
  float sum[2] = {0.0f, 0.0f};  // of this lane's part

  // Lets the bases follow the scores of the warp. Where they must, `factor` is what earlier sums must be multiplied by.
  // That is rare: a vote finds out before the lanes of a row exchange their maxima.
  template <class Scores, bool kIsBounded>
  __device__ __forceinline__ bool follow(const Scores& scores, const RestOfScores<kIsBounded>& rest,
                                         float (&factor)[2]) {
    if (kIsBounded && !exceeded_by(rest.bound * Softmax::kUnit, rest.bound * Softmax::kUnit)) return false;
    float largest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float maxima[2] = {-infinity(), -infinity()};  // two chains are done in half the time
#pragma unroll
      for (int i = 0; i < Scores::kNumElements; ++i) {
        if (row_of_element(i) == r) maxima[i % 2] = fmaxf(maxima[i % 2], scores.x[i]);
      }
      largest[r] = fmaf(fmaxf(maxima[0], maxima[1]), rest.scale * Softmax::kUnit, -rest.penalty * Softmax::kUnit);
    }
    if (!exceeded_by(largest[0], largest[1])) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[r] = softmax[r].rescale(reduce(largest[r], [](float x, float y) { return fmaxf(x, y); }));
      sum[r] *= factor[r];
    }
    return true;
  }

  // Turns scores into weights, once the rest is done.
  template <class Scores, class Rest>
  __device__ __forceinline__ void weigh(Scores& scores, const Rest& rest) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sums[2] = {0.0f, 0.0f};  // two chains, as above
      const float offset = -softmax[r].shift() - rest.penalty * kLog2e;
#pragma unroll
      for (int i = 0; i < Scores::kNumElements; ++i) {
        if (row_of_element(i) != r) continue;
        scores.x[i] = Softmax::kLog2 ? exp2f(fmaf(scores.x[i], rest.scale * kLog2e, offset))
                                     : softmax[r].weight(rounded(scores.x[i], rest.scale));
        sums[i % 2] += scores.x[i];
      }
      sum[r] += sums[0] + sums[1];
    }
  }

  // The sum of a whole row.
  __device__ __forceinline__ float total(int r) const {
    return reduce(sum[r], [](float x, float y) { return x + y; });
  }

 private:
  // A score as it is, not fused with a difference, which then would not be 0 where it is the base.
  static __device__ __forceinline__ float rounded(float x, float scale) {
    return Options::kChangesScores ? x : __fmul_rn(x, scale);
  }

  __device__ __forceinline__ bool exceeded_by(float score_0, float score_1) const {
    return __any_sync(kFullMask, softmax[0].exceeded_by(score_0) || softmax[1].exceeded_by(score_1));
  }

  // Of what the four lanes of a row hold.
  template <class Operation>
  static __device__ __forceinline__ float reduce(float x, Operation operation) {
    x = operation(x, __shfl_xor_sync(kFullMask, x, 1));
    return operation(x, __shfl_xor_sync(kFullMask, x, 2));
  }
};

}  // namespace cuflash
