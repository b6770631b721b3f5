// The backward of a tile of pairs that a warp holds in registers: from products to weights and gradients of scores.
#pragma once

#include <cuflash/attention/recompute.cuh>
#include <cuflash/attention/survivors.cuh>
#include <cuflash/tile/warpgroup_tile.cuh>

namespace cuflash {

// The rows of the tile are queries, or keys if kTransposed; the positions are those of the first element of this lane.
// With BiasPairs for Pairs gradients of scores become those of the bias. kExact: weights of float32.
template <class Options, bool kTransposed, bool kExact = false, template <class, Size> class SomePairs = Pairs>
struct GradientTile {
  const SomePairs<Options, Size::kAny>& pairs;
  int first_query, first_key;

  // Whether weights come of products by one multiply-add, with lse in base 2.
  static constexpr bool kFused = !Options::kChangesScores && !kExact;
  static constexpr float kLseUnit = kFused ? kLog2e : 1.0f;

  // Turns products into weights, and gradients of weights into those of scores. lse_of(i) and delta_of(i) are those of
  // the query of element i; survives(i) counts only where there is dropout.
  template <class Tile, class LseOf, class DeltaOf, class Survives>
  __device__ __forceinline__ void differentiate(Tile& scores, Tile& dweights, LseOf lse_of, DeltaOf delta_of,
                                                Survives survives) const {
    if constexpr (!Options::kChangesScores) {
      const float scale = pairs.scale * kLseUnit;
#pragma unroll
      for (int i = 0; i < Tile::kNumElements; ++i) {
        const float weight = kFused ? exp2f(fmaf(scores.x[i], scale, -lse_of(i)))
                                    : softmax_weight(__fmul_rn(scores.x[i], scale), lse_of(i));
        float factor = 1.0f;
        if constexpr (Options::kHasDropout) factor = survives(i) ? pairs.options.survivor_factor() : 0.0f;
        scores.x[i] = weight * factor;
        dweights.x[i] = weight * (factor * dweights.x[i] - delta_of(i));
      }
    } else if (!pairs.has_no_keys()) {  // without keys the band hides all pairs afterwards
      use_pairs(pairs, scores, [&](const auto& pairs) {
#pragma unroll
        for (int i = 0; i < Tile::kNumElements; ++i) {
          const PairGradient pair = pair_gradient<kExact>(pairs, scores.x[i], dweights.x[i], lse_of(i), delta_of(i),
                                                          query(i), key(i), survives(i));
          scores.x[i] = pair.weight;
          dweights.x[i] = pair.dscore;
        }
      });
    }
  }

  // The same as two factors, for who only adds them up: weights times slopes, which do not need gradients of weights,
  // with lse in base 2,
  template <class Tile, class LseOf>
  __device__ __forceinline__ void weigh(Tile& scores, LseOf lse_of) const {
    use_pairs(pairs, scores, [&](const auto& pairs) {
#pragma unroll
      for (int i = 0; i < Tile::kNumElements; ++i) {
        const Dual score = pairs.score(scores.x[i], query(i), key(i));
        scores.x[i] = exp2f(__fmul_rn(score.value, kLog2e) - lse_of(i)) * score.slope;
      }
    });
  }
  // and gradients of weights minus delta.
  template <class Tile, class DeltaOf, class Survives>
  __device__ __forceinline__ void subtract_delta(Tile& dweights, DeltaOf delta_of, Survives survives) const {
#pragma unroll
    for (int i = 0; i < Tile::kNumElements; ++i) {
      float kept = dweights.x[i];
      if constexpr (Options::kHasDropout) kept = survives(i) ? kept * pairs.options.survivor_factor() : 0.0f;
      dweights.x[i] = kept - delta_of(i);
    }
  }

  // Hides pairs outside of the band, and of queries beyond the end, in both.
  template <class Tile>
  __device__ __forceinline__ void hide_by_band(Tile& weights, Tile& dscores) const {
    const Band& band = pairs.band;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = (kTransposed ? first_key : first_query) + 8 * r,
                first_col = kTransposed ? first_query : first_key;
      Range seen;
      if constexpr (kTransposed) {
        seen = row < band.seqlen_k ? Range{row - band.end + 1, min(row - band.begin + 1, band.seqlen_q)} : Range{0, 0};
      } else {
        seen = row < band.seqlen_q ? Range{row + band.begin, min(row + band.end, band.seqlen_k)} : Range{0, 0};
      }
      const int begin = seen.begin - first_col, end = seen.end - first_col;
#pragma unroll
      for (int i = 0; i < Tile::kNumElements; ++i) {
        if (row_of_element(i) == r && !(begin <= col_of_element(i) & col_of_element(i) < end)) {
          weights.x[i] = dscores.x[i] = 0.0f;
        }
      }
    }
  }

  template <class Tile>
  __device__ __forceinline__ void hide_by_options(Tile& weights, Tile& dscores) const {
    if constexpr (Options::kHidesPairs) {
      if (pairs.options_hide_nothing()) return;
#pragma unroll
      for (int i = 0; i < Tile::kNumElements; ++i) {
        if (!pairs.visible_by_options(query(i), key(i))) weights.x[i] = dscores.x[i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ int query(int i) const {
    return first_query + (kTransposed ? col_of_element(i) : 8 * row_of_element(i));
  }
  __device__ __forceinline__ auto key(int i) const {
    if constexpr (kTransposed) {
      return first_key + 8 * row_of_element(i);
    } else {
      return Neighbour{first_key + col_of_element(i) - i % 2, i % 2 == 1};
    }
  }
};

}  // namespace cuflash
