// FlashAttention-2 backward on mma.sync: the gradient of an additive bias, summed over the axes along which it was
// broadcast.
#pragma once

#include <cuflash/attention/bias_tiles.cuh>
#include <cuflash/attention/register_gradient.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/mma_product.cuh>
#include <cuflash/tile/row_store.cuh>

namespace cuflash {

// A block computes one tile of the gradient after the other (BiasTiles). kSplits warps share the same rows of it, each
// has a part of the columns: a warp's sums, scores and gradients of weights are all there is in registers, whatever the
// head dimensions. Those come in panels of kPanel columns of Q, K, dO and V, through a ring of stages: kStages - 1 of
// them are on their way, be it for the next tile of the gradient.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kNumWarps,
          int kSplits, int kPanel, int kStages>
struct BwdSm80Dbias {
  using Element = typename Number::Element;
  using Bias = typename Options::Bias;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kWarpM = kBlockM / (kNumWarps / kSplits), kWarpN = kBlockN / kSplits;
  static constexpr int kTilesM = kWarpM / 16;
  static constexpr int kPanelsQ = kHeadDim / kPanel, kPanelsV = kHeadDimV / kPanel;
  static constexpr int kPanels = larger(kPanelsQ, kPanelsV);
  // As far as the registers hold the factors.
  static constexpr int kUnroll = unroll_along<Number>(kTilesM, kWarpN, kPanels == 1 ? kPanel / 16 : 2);

  using Scores = WarpgroupTile<kWarpN>;
  using Gradients = GradientTile<Options, false, sizeof(Element) == 4, BiasPairs>;

  struct Arrays {
    const Element *q, *k, *v, *dout;
    const float *lse, *delta;
    Bias* dbias;
  };

  // A panel; the last one of a tile has the statistics of its rows as well.
  struct Stage {
    LdmatrixTile<Number, kBlockM, kPanel> q, dout;
    LdmatrixTile<Number, kBlockN, kPanel> k, v;
    float lse[kBlockM], delta[kBlockM];
  };
  // The tiles after the one at hand of which panels may be on their way.
  static constexpr int kAhead = 1 + (kStages - 2) / kPanels;
  using Tiles = BiasTiles<kBlockM, kBlockN, kAhead>;
  using Walk = typename Tiles::Walk;
  using Step = typename Walk::Step;

  static constexpr int kPairBytes = Options::template kTileBytes<kBlockM, kBlockN>;
  struct Shared {
    Stage stages[kStages];
    alignas(16) unsigned char pairs[larger(kPairBytes, 16)];
    Tiles tiles;
  };
  // Without the padding at the end of the struct.
  static constexpr int kSharedBytes =
      larger(kStages * sizeof(Stage) + sizeof(Shared::pairs) + sizeof(Tiles), Walk::kSumBytes);

  static_assert(kNumWarps % kSplits == 0 && kBlockM % (16 * (kNumWarps / kSplits)) == 0 && kWarpN % 32 == 0);
  static_assert(kHeadDim % kPanel == 0 && kHeadDimV % kPanel == 0 && kStages >= 2);
  static_assert(kBlockM <= kNumThreads, "one thread fetches the statistics of one row");

  static __device__ __forceinline__ void run(const Arrays& arrays, const DbiasParams& params, const Options& options) {
    const Problem& problem = params.problem;
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    Tiles& tiles = shared.tiles;
    if (threadIdx.x == 0) tiles.begin(params, options);
    __syncthreads();
    const Band& band = tiles.band;
    const int warp = threadIdx.x / 32, warp_row = warp / kSplits * kWarpM, warp_col = warp % kSplits * kWarpN;
    // Whether pairs of one tile share their bias. Then each block has one tile of the gradient.
    const bool shares = params.rows == 1 || params.cols == 1;

    const auto options_of = [&](const Step& step) {
      Options there = options;
      there.enter(BatchedSequences::sequence(problem, step.batch), step.head);
      return there;
    };
    const auto load_pairs = [&](const Step& step) {
      unsigned thread = threadIdx.x;
      ptx::make_opaque(thread);  // as in LdmatrixTile::load
      options_of(step).template load<kBlockM, kBlockN, kNumThreads>(shared.pairs, step.first_query(), step.first_key(),
                                                                    static_cast<int>(thread));
    };
    // The panel that comes so many turns after the first of a tile.
    const auto load = [&](Stage& stage, int number, int turns) {
      const auto& tile = tiles.at(number + turns / kPanels);
      const int panel = turns % kPanels, first_query = tile.step.first_query(), first_key = tile.step.first_key();
      if (!tile.visible) return;
      const auto panel_of = [&](const Element* array, const Strides& strides, int head, int rows, int cols) {
        const int first_col = panel * kPanel;
        return Matrix<const Element>(array + first_col * strides.col, strides, tile.step.batch, head, 0, rows,
                                     cols - first_col);
      };
      const int head = tile.step.head, head_kv = tile.head_kv;
      if (kPanelsQ == kPanels || panel < kPanelsQ) {
        stage.q.template load<kNumThreads>(panel_of(arrays.q, params.q, head, problem.seqlen_q, problem.head_dim),
                                           first_query);
        stage.k.template load<kNumThreads>(panel_of(arrays.k, params.k, head_kv, problem.seqlen_k, problem.head_dim),
                                           first_key);
      }
      if (kPanelsV == kPanels || panel < kPanelsV) {
        stage.dout.template load<kNumThreads>(
            panel_of(arrays.dout, params.dout, head, problem.seqlen_q, problem.head_dim_v), first_query);
        stage.v.template load<kNumThreads>(panel_of(arrays.v, params.v, head_kv, problem.seqlen_k, problem.head_dim_v),
                                           first_key);
      }
      if (panel == kPanels - 1 && threadIdx.x < kBlockM) {
        const Sequence sequence = BatchedSequences::sequence(problem, tile.step.batch);
        const RowStatistics rows(arrays.lse, arrays.delta, params, sequence, head);
        const int row = threadIdx.x;
        rows.start_to_copy(first_query + row, stage.lse + row, stage.delta + row);
      }
    };

    WarpgroupTile<kWarpN> sums[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) sums[m].clear();
    if (tiles.at(0).visible) load_pairs(tiles.at(0).step);
#pragma unroll 1
    for (int turns = 0; turns < kStages - 1; ++turns) {
      load(shared.stages[turns], 0, turns);
      ptx::cp_async_commit();
    }

    int next_stage = 0;
#pragma unroll 1
    for (int number = 0; tiles.at(number).exists; ++number) {
      const auto& tile_of_pairs = tiles.at(number);
      const Step& step = tile_of_pairs.step;
      const bool visible = tile_of_pairs.visible, new_pairs = number > 0 && visible && !tile_of_pairs.same;
      Scores scores[kTilesM], dweights[kTilesM];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        scores[m].clear();
        dweights[m].clear();
      }
      int stage = 0;
#pragma unroll 1
      for (int panel = 0; panel < kPanels; ++panel) {
        stage = next_stage;
        next_stage = (stage + 1) % kStages;
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // this panel has arrived, and the one before is no longer read
        if (panel == 0 && new_pairs) load_pairs(step);
        const Stage& at_hand = shared.stages[stage];
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {  // of the warps one half multiplies while the other starts copies
          if (warp / (kNumWarps / 2) == half) {
            load(shared.stages[(stage + kStages - 1) % kStages], number, panel + kStages - 1);
            ptx::cp_async_commit();
          } else if (visible && (kPanelsQ == kPanels || panel < kPanelsQ)) {
            add_product_along<kPanel, kUnroll>(scores, RowsOf(at_hand.q, warp_row), at_hand.k, warp_col);
          }
        }
        if (visible && (kPanelsV == kPanels || panel < kPanelsV)) {
          add_product_along<kPanel, kUnroll>(dweights, RowsOf(at_hand.dout, warp_row), at_hand.v, warp_col);
        }
      }
      if (new_pairs) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // the pairs have arrived
      }

      if (visible) {
        Options here = options_of(step);
        here.template look_at<kBlockM, kBlockN>(shared.pairs, step.first_query(), step.first_key());
        const BiasPairs<Options> pairs = {here, band, problem.softmax_scale};
        const int first_query = step.first_query() + warp_row, first_key = step.first_key() + warp_col;
        const Range queries = {first_query, first_query + kWarpM}, keys = {first_key, first_key + kWarpN};
        const bool masked = queries.end > band.seqlen_q || !band.all_visible(queries, keys);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          unsigned lane = threadIdx.x % 32;
          ptx::make_opaque(lane);  // as in TileReader
          const int lane_row = 16 * m + static_cast<int>(lane / 4), lane_col = lane % 4 * 2;
          float lse[2], delta[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row = warp_row + lane_row + 8 * r;
            lse[r] = RowStatistics::lse_of_value(shared.stages[stage].lse[row]) * Gradients::kLseUnit;
            delta[r] = shared.stages[stage].delta[row];
          }
          const Gradients tile = {pairs, first_query + lane_row, first_key + lane_col};
          const Survivors<Options, kWarpN, false> survives(here, first_query + 16 * m, first_key);
          tile.differentiate(
              scores[m], dweights[m], [&](int i) { return lse[row_of_element(i)]; },
              [&](int i) { return delta[row_of_element(i)]; }, survives);
          if (masked) tile.hide_by_band(scores[m], dweights[m]);
          tile.hide_by_options(scores[m], dweights[m]);
#pragma unroll
          for (int i = 0; i < Scores::kNumElements; ++i) sums[m].x[i] += dweights[m].x[i];
        }
      }
      if (tiles.at(number + 1).first && !shares) {
        const Matrix<Bias> dbias(arrays.dbias, params.dbias, params.batch == 1 ? 0 : step.batch,
                                 params.heads == 1 ? 0 : step.head, 0, params.rows, params.cols);
        const int row = step.first_query() + warp_row + threadIdx.x % 32 / 4, col = step.first_key() + warp_col;
        const float one[2] = {1.0f, 1.0f};
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          store_rows(dbias, sums[m], one, row + 16 * m, col);
          sums[m].clear();
        }
      }
      if (threadIdx.x == 0) tiles.advance(number, problem, options);
    }
    ptx::cp_async_wait<0>();
    if (!shares) return;
    const Walk walk = tiles.walk;
    __syncthreads();  // shared memory is no longer read: the sums take its place
    const int lane = threadIdx.x % 32;
    float* const memory = reinterpret_cast<float*>(dynamic_shared_memory());
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < Scores::kNumElements; ++i) {
        const int row = warp_row + 16 * m + lane / 4 + 8 * row_of_element(i);
        memory[row * Walk::kPitch + warp_col + lane % 4 * 2 + col_of_element(i)] = sums[m].x[i];
      }
    }
    __syncthreads();
    walk.template write<kNumWarps>(arrays.dbias, params, memory);
  }
};

}  // namespace cuflash
