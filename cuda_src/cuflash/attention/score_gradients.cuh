// The weights of a tile and the gradients of its scores, in the registers of a warpgroup whose rows are keys.
#pragma once

#include <cuflash/attention/survivors.cuh>
#include <cuflash/tile/warpgroup_tile.cuh>

namespace cuflash {

// What a stage of the pipeline holds of the queries of a tile.
template <int kBlockM>
struct RowsOfTile {
  float lse_log2[kBlockM];  // in powers of two; +infinity gives weights of 0
  float delta[kBlockM];     // rowsum(dout * out) - dlse
};

// 64 keys, and all queries of the tile. Of every element there is first a product of query and key, then its weight,
// and a product of dout and value, then the gradient of the score.
template <class Element, class Options, int kBlockM>
struct ScoreGradients {
  using Scores = WarpgroupTile<kBlockM>;
  using Factor = WarpgroupFactor<Element, kBlockM>;
  static constexpr int kCount = Scores::kNumElements;
  // Then the rounded weights serve for both gradients, and leave room in the registers for a product in flight.
  static constexpr bool kPlainWeights = !Options::kBendsScores && !Options::kHasDropout;

  const Pairs<Options>& pairs;
  int first_query, first_key;  // of the first element that this lane holds
  const RowsOfTile<kBlockM>& rows;
  int first_col;  // of this lane

  // Which weights survive dropout.
  using Survivors = cuflash::Survivors<Options, kBlockM, true>;
  __device__ __forceinline__ Survivors draw() const {
    return Survivors(pairs.options, first_query - first_col, first_key - threadIdx.x % 32 / 4);
  }

  // Scores become weights times the slopes of options (with kPlainWeights they are left), and `weights` the weights as
  // the factor of dV. With all pairs visible nothing is hidden.
  __device__ __forceinline__ void weigh(Scores& scores, Factor& weights, bool all_visible,
                                        const Survivors& survives) const {
    use_pairs(pairs, scores, [&](const auto& pairs) {
      if (all_visible) {
        weigh(pairs, scores, weights, survives, [](int) { return true; });
      } else {
        const Range seen[2] = {seen_by(first_key), seen_by(first_key + 8)};
        weigh(pairs, scores, weights, survives, [&](int i) {
          const Range& columns = seen[row_of_element(i)];
          bool visible = columns.begin <= col_of_element(i) & col_of_element(i) < columns.end;
          if constexpr (Options::kHidesPairs) visible = visible & pairs.visible_by_options(query(i), key(i));
          return visible;
        });
      }
    });
  }

  // What `weigh` leaves: the weights times the slopes of options.
  static __device__ __forceinline__ const auto& slopes(const Scores& scores, const Factor& weights) {
    if constexpr (kPlainWeights) {
      return weights;
    } else {
      return scores;
    }
  }

  // The gradients of scores, from those of weights and the slopes, Scores or Factor. Those of hidden pairs are 0, or
  // NaN where what they meet is not finite: a key's row then, or a query's column, or both.
  template <class Slopes>
  __device__ __forceinline__ Factor differentiate(const Scores& dweights, const Slopes& slopes,
                                                  const Survivors& survives) const {
    Factor dscores;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      float change[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float dweight = dweights.x[i + j];
        if constexpr (Options::kHasDropout) {
          dweight = survives(i + j) ? dweight * pairs.options.survivor_factor() : 0.0f;
        }
        change[j] = dweight - rows.delta[col(i + j)];
      }
      dscores.x[i / 8][i / 2 % 4] = Factor::packed(slopes.at(i) * change[0], slopes.at(i + 1) * change[1]);
    }
    return dscores;
  }

 private:
  __device__ __forceinline__ int col(int i) const { return first_col + col_of_element(i); }
  __device__ __forceinline__ int query(int i) const { return first_query + col_of_element(i); }
  __device__ __forceinline__ int key(int i) const { return first_key + 8 * row_of_element(i); }

  // The queries that the band lets see a key, counted from the first that this lane holds.
  __device__ __forceinline__ Range seen_by(int key) const {
    const Range queries = pairs.band.queries_of({key, key + 1});
    return {queries.begin - first_query, queries.end - first_query};
  }

  // Scores become weights times the slopes of options.
  template <class SomePairs, class Visible>
  __device__ __forceinline__ void weigh(const SomePairs& pairs, Scores& scores, Factor& weights,
                                        const Survivors& survives, const Visible& visible) const {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      float weight[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& x = scores.x[i + j];
        const float shift = rows.lse_log2[col(i + j)];
        float slope = 1.0f;
        if constexpr (Options::kChangesScores) {
          const Dual score = pairs.score(x, query(i + j), key(i + j));
          weight[j] = exp2f(fmaf(score.value, kLog2e, -shift));
          slope = score.slope;
        } else {
          weight[j] = exp2f(fmaf(x, pairs.scale * kLog2e, -shift));
        }
        if (!visible(i + j)) weight[j] = 0.0f;
        if constexpr (!kPlainWeights) x = Options::kBendsScores && weight[j] != 0.0f ? weight[j] * slope : weight[j];
        if constexpr (Options::kHasDropout) {
          weight[j] = survives(i + j) ? weight[j] * pairs.options.survivor_factor() : 0.0f;
        }
      }
      weights.x[i / 8][i / 2 % 4] = Factor::packed(weight[0], weight[1]);
    }
  }
};

}  // namespace cuflash
