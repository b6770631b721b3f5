// The weights of a tile and the gradients of its scores, in the registers of a warpgroup whose rows are keys.
#pragma once

#include <cuflash/attention/survivor_tile.cuh>
#include <cuflash/tile/warpgroup_tile.cuh>

namespace cuflash {

// What a stage of the pipeline holds of the queries of a tile.
template <int kBlockM>
struct RowsOfTile {
  float lse_log2[kBlockM];  // in powers of two; +infinity gives weights of 0
  float delta[kBlockM];     // rowsum(dout * out) - dlse
};

// Whether all pairs of a tile are visible, as far as the band decides and as far as options do.
struct AllVisible {
  bool by_band, by_options;

  __device__ __forceinline__ operator bool() const { return by_band && by_options; }
};

// 64 keys, and all queries of the tile. Of every element there is first a product of query and key, then its weight,
// and a product of dout and value, then the gradient of the score.
template <class Element, class Options, int kBlockM>
struct ScoreGradients {
  using Scores = WarpgroupTile<kBlockM>;
  using Factor = WarpgroupFactor<Element, kBlockM>;
  static constexpr int kCount = Scores::kNumElements;

  const Pairs<Options>& pairs;
  int first_query, first_key;  // of the first element that this lane holds
  const RowsOfTile<kBlockM>& rows;
  int first_col;  // of this lane

  using Survivors = KeptElements<kBlockM>;

  // From scores to the weights as the factor of dV, and the weights before dropout times the slopes of options: both
  // rounded, to leave room in the registers for a product in flight. With all pairs visible nothing is hidden.
  __device__ __forceinline__ void weigh(Scores& scores, Factor& weights, Factor& slopes, AllVisible all_visible,
                                        const Survivors& survives) const {
    use_pairs(pairs, scores, [&](const auto& pairs) {
      if (all_visible) {
        weigh(pairs, scores, weights, slopes, survives, [](int, float&) {});
      } else if (Options::kHidesPairs && all_visible.by_band) {
        weigh(pairs, scores, weights, slopes, survives, [&](int i, float& weight) { hide_by_options(i, weight); });
      } else {
        const Seen seen[2] = {seen_by(first_key), seen_by(first_key + 8)};
        weigh(pairs, scores, weights, slopes, survives, [&](int i, float& weight) {
          if (!seen[row_of_element(i)](i)) weight = 0.0f;
          hide_by_options(i, weight);
        });
      }
    });
  }

  // The gradients of scores, from those of weights and the slopes. Those of hidden pairs are 0, or NaN where what they
  // meet is not finite: a key's row then, or a query's column, or both.
  __device__ __forceinline__ Factor differentiate(const Scores& dweights, const Factor& slopes,
                                                  const Survivors& survives) const {
    Factor dscores;
    const Scores kept = kept_of(dweights, survives);
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      float change[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float dweight = kept.x[i + j], delta = rows.delta[col(i + j)];
        if constexpr (Options::kHasDropout) {
          change[j] = fmaf(dweight, pairs.options.survivor_factor(), -delta);
        } else {
          change[j] = dweight - delta;
        }
      }
      dscores.x[i / 8][i / 2 % 4] = Factor::packed(slopes.at(i) * change[0], slopes.at(i + 1) * change[1]);
    }
    return dscores;
  }

 private:
  // In the order of the bits: then several become predicates at once.
  static __device__ __forceinline__ Scores kept_of(const Scores& dweights, const Survivors& survives) {
    Scores kept = dweights;
    if constexpr (Options::kHasDropout) {
#pragma unroll
      for (int bit = 0; bit < kCount; ++bit) {
        const int i = Survivors::element(bit);
        if (!survives(i)) kept.x[i] = 0.0f;
      }
    }
    return kept;
  }

  __device__ __forceinline__ int col(int i) const { return first_col + col_of_element(i); }
  __device__ __forceinline__ int query(int i) const { return first_query + col_of_element(i); }
  __device__ __forceinline__ int key(int i) const { return first_key + 8 * row_of_element(i); }

  // A bit for each query that this lane holds, if the band lets it see a key.
  struct Seen {
    unsigned words[ceil_div(kBlockM, 128)];

    __device__ __forceinline__ bool operator()(int i) const {
      const int query = i / 4 * 2 + i % 2;
      return words[query / 32] >> query % 32 & 1;
    }
  };
  __device__ __forceinline__ Seen seen_by(int key) const {
    const Range queries = pairs.band.queries_of({key, key + 1});
    const int begin = elements_before(queries.begin - first_query), end = elements_before(queries.end - first_query);
    Seen seen;
#pragma unroll
    for (int i = 0; i < ceil_div(kBlockM, 128); ++i) {
      seen.words[i] = bits_from(begin - 32 * i) & ~bits_from(end - 32 * i);
    }
    return seen;
  }

  __device__ __forceinline__ void hide_by_options(int i, float& weight) const {
    if constexpr (Options::kHidesPairs) {
      if (!pairs.visible_by_options(query(i), key(i))) weight = 0.0f;
    }
  }

  template <class SomePairs, class Hide>
  __device__ __forceinline__ void weigh(const SomePairs& pairs, const Scores& scores, Factor& weights, Factor& slopes,
                                        const Survivors& survives, const Hide& hide) const {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      float weight[2], slope[2] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float x = scores.x[i + j], shift = rows.lse_log2[col(i + j)];
        if constexpr (Options::kChangesScores) {
          const Dual score = pairs.score_over_factor(x, query(i + j), key(i + j));
          const float factor = pairs.factor() * kLog2e;
          weight[j] = exp2f(kScoresOfAnySize<Options> ? __fmul_rn(score.value, factor) - shift
                                                      : fmaf(score.value, factor, -shift));
          slope[j] = score.slope;
        } else {
          weight[j] = exp2f(fmaf(x, pairs.scale * kLog2e, -shift));
        }
        hide(i + j, weight[j]);
        if constexpr (Options::kBendsScores) {
          slope[j] = Options::kBreaksScores && weight[j] == 0.0f ? 0.0f : weight[j] * slope[j];
        }
      }
      unsigned& both = weights.x[i / 8][i / 2 % 4];
      both = Factor::packed(weight[0], weight[1]);
      slopes.x[i / 8][i / 2 % 4] = Options::kBendsScores ? Factor::packed(slope[0], slope[1]) : both;
      if constexpr (Options::kHasDropout) both &= survives.pair(i);
    }
  }
};

}  // namespace cuflash
