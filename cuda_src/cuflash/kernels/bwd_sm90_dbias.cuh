// FlashAttention backward for Hopper: the gradient of an additive bias, summed over the batch entries and heads along
// which it was broadcast.
#pragma once

#include <cuflash/attention/backward_block.cuh>
#include <cuflash/attention/bias_tiles.cuh>
#include <cuflash/attention/register_gradient.cuh>
#include <cuflash/tile/wgmma_product.cuh>

namespace cuflash {

// One struct, because each argument costs the host time (mirrored in cuflash/_params.py).
struct DbiasSm90Params {
  DbiasParams dbias;
  const void *q, *k, *v, *dout;  // where the host has filled in the maps
  BwdMaps maps;
};

// A block computes one tile of the gradient after the other (BiasTiles). Each of two consumers has 64 of its rows:
// sums, scores and gradients of weights lie in registers. Q and K, then dO and V come in panels of 64 columns, through
// a ring that knows no tiles: so shared memory does not depend on the head dimensions, and copies never stop. L2 is
// what they wait for: so the two blocks of a cluster have neighbouring keys of the same rows, and each brings half of
// these to both.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kStages,
          int kStagesPairs, int kCluster>
struct BwdSm90Dbias {
  using Element = typename Number::Element;
  using Bias = typename Options::Bias;

  static constexpr int kNumConsumers = kBlockM / 64, kNumThreads = 128 * (1 + kNumConsumers);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kPanel = 64, kPanelsQ = kHeadDim / kPanel, kPanelsV = kHeadDimV / kPanel;

  using Scores = WarpgroupTile<kBlockN>;
  using Gradients = GradientTile<Options, false, false, BiasPairs>;

  // Of what is on its way one warp writes down what comes, and the others read it.
  static constexpr int kTilesAhead = 4;
  using Tiles = BiasTiles<kBlockM, kCluster * kBlockN, 0, kTilesAhead>;  // of all blocks of a cluster
  using Tile = typename Tiles::Tile;

  using Ring = Pipeline<kStages, true>;
  using RingRows = Pipeline<2, true>;
  using RingPairs = Pipeline<kStagesPairs, true>;
  using RingTiles = Pipeline<kTilesAhead, true>;

  struct Panel {
    SwizzledTile<Element, 64, kPanel> rows[kNumConsumers];  // of Q or dO
    SwizzledTile<Element, kBlockN, kPanel> cols;            // of K or V
  };
  struct alignas(16) TileOfPairs {
    unsigned char memory[Options::template kTileBytes<kBlockM, kBlockN>];
  };
  struct Rows {
    float lse[kBlockM], delta[kBlockM];
  };
  struct Rings {
    Ring panels;
    RingRows rows;
    RingPairs pairs;
    RingTiles tiles;
  };
  struct Shared {
    Panel panels[kStages];
    TileOfPairs pairs[kStagesPairs];
    Rows rows[2];
    Rings rings;
    Tiles tiles;
  };
  // Without the padding that makes the struct a multiple of 1024.
  static constexpr int kSharedBytes =
      sizeof(Panel) * kStages + sizeof(TileOfPairs) * kStagesPairs + sizeof(Rows) * 2 + sizeof(Rings) + sizeof(Tiles);

  static_assert(kNumConsumers == 2 && (kCluster == 1 || kCluster == 2) && kHeadDim % kPanel == 0 &&
                kHeadDimV % kPanel == 0);

  struct Arrays {
    const float *lse, *delta;
    Bias* dbias;
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const DbiasSm90Params& params,
                                             const Options& options) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    if (threadIdx.x == 0) {
      const BwdMaps& maps = params.maps;
      ptx::tma_prefetch(&maps.q);
      ptx::tma_prefetch(&maps.k);
      ptx::tma_prefetch(&maps.v);
      ptx::tma_prefetch(&maps.dout);
      const int num_warps = 4 * kNumConsumers;  // wgmma ends warp by warp: each releases what it has read
      shared.rings.panels.init(kCluster * num_warps);
      shared.rings.rows.init(num_warps, 2 * 32);  // every lane copies, and arrives twice
      shared.rings.pairs.init(num_warps, 2 * 64);
      shared.rings.tiles.init(num_warps + 3);
      ptx::barrier_init_fence();
      shared.tiles.begin(params.dbias, options, blockIdx.x / kCluster, gridDim.x / kCluster);
    }
    meet();
    if (threadIdx.x < 128) {
      ptx::release_registers<kProducerRegisters>();
      if (threadIdx.x < 64) {
        load_pairs(params.dbias.problem, options, shared);
      } else if (threadIdx.x >= 96) {
        load_rows(arrays, params.dbias, shared);
      } else if (threadIdx.x == 64) {
        load(params.maps, params.dbias, options, shared);
      }
    } else {
      ptx::acquire_registers<kConsumerRegisters>();
      consume(arrays, params.dbias, options, shared);
    }
    if constexpr (kCluster > 1) meet();  // nobody leaves while the other still copies to its memory
  }

  // All threads of a cluster.
  static __device__ __forceinline__ void meet() {
    if constexpr (kCluster > 1) {
      ptx::cluster_sync();
    } else {
      __syncthreads();
    }
  }

  static __device__ __forceinline__ int rank() { return kCluster > 1 ? ptx::cluster_rank() : 0; }
  // The first of this block's keys.
  static __device__ __forceinline__ int first_key_of(const typename Tiles::Step& step) {
    return step.first_key() + rank() * kBlockN;
  }

  // ---- Loads

  // Run by one thread, which also walks.
  static __device__ __forceinline__ void load(const BwdMaps& maps, const DbiasParams& params, const Options& options,
                                              Shared& shared) {
    Rings& rings = shared.rings;
    typename Ring::Position at;
    typename RingTiles::Position tile_at;
#pragma unroll 1
    for (;;) {
      const int number = tile_at.count();
      const Tile& tile = shared.tiles.at(number);
      rings.tiles.fill(tile_at);
      if (!tile.exists) break;
      const auto load_panels = [&](int count, const ptx::TensorMap& map_rows, const Strides& rows,
                                   const ptx::TensorMap& map_cols, const Strides& cols) {
#pragma unroll 1
        for (int panel = 0; panel < count; ++panel) {
          rings.panels.wait_empty(at);
          ptx::Barrier* const arrived = rings.panels.expect(at, sizeof(Panel));
          Panel& target = shared.panels[at.stage()];
          const int batch = tile.step.batch, first_col = panel * kPanel;
#pragma unroll
          for (int i = 0; i < kNumConsumers / kCluster; ++i) {
            const int part = kCluster > 1 ? rank() : i, first_row = tile.step.first_query() + 64 * part;
            target.rows[part].template load<kCluster>(&map_rows, arrived, rows, batch, tile.step.head, first_row,
                                                      first_col);
          }
          target.cols.load(&map_cols, arrived, cols, batch, tile.head_kv, first_key_of(tile.step), first_col);
          at.advance();
        }
      };
      if (tile.visible) {
        load_panels(kPanelsQ, maps.q, params.q, maps.k, params.k);
        load_panels(kPanelsV, maps.dout, params.dout, maps.v, params.v);
      }
      tile_at.advance();
      rings.tiles.wait_empty(tile_at);
      shared.tiles.advance(number, params.problem, options);
    }
  }

  // Calls use(tile) for each tile of pairs that anybody sees, by a warp.
  template <class Use>
  static __device__ __forceinline__ void each_visible_tile(Shared& shared, const Use& use) {
    typename RingTiles::Position at;
#pragma unroll 1
    for (;;) {
      shared.rings.tiles.wait_full(at);
      const Tile& tile = shared.tiles.at(at.count());
      if (!tile.exists) break;
      if (tile.visible) use(tile);
      __syncwarp();
      if (threadIdx.x % 32 == 0) shared.rings.tiles.release(at);
      at.advance();
    }
  }

  // Run by another warp.
  static __device__ __forceinline__ void load_rows(const Arrays& arrays, const DbiasParams& params, Shared& shared) {
    RingRows& ring = shared.rings.rows;
    typename RingRows::Position at;
    each_visible_tile(shared, [&](const Tile& tile) {
      ring.wait_empty(at);
      const Sequence sequence = BatchedSequences::sequence(params.problem, tile.step.batch);
      const RowStatistics rows(arrays.lse, arrays.delta, params, sequence, tile.step.head);
      Rows& target = shared.rows[at.stage()];
#pragma unroll
      for (int row = threadIdx.x % 32; row < kBlockM; row += 32) {
        rows.start_to_copy(tile.step.first_query() + row, target.lse + row, target.delta + row);
      }
      ring.fill_by_copies(at);
      at.advance();
    });
  }

  // Run by two more: bias and mask, once for all batch entries where they have them in common.
  static __device__ __forceinline__ void load_pairs(const Problem& problem, const Options& options, Shared& shared) {
    RingPairs& ring = shared.rings.pairs;
    typename RingPairs::Position at;
    each_visible_tile(shared, [&](const Tile& tile) {
      if (tile.same) return;
      ring.wait_empty(at);
      Options there = options;
      there.enter(BatchedSequences::sequence(problem, tile.step.batch), tile.step.head);
      there.template load<kBlockM, kBlockN, 64>(shared.pairs[at.stage()].memory, tile.step.first_query(),
                                                first_key_of(tile.step));
      ring.fill_by_copies(at);
      at.advance();
    });
  }

  // ---- The consumers

  static __device__ __forceinline__ void consume(const Arrays& arrays, const DbiasParams& params,
                                                 const Options& options, Shared& shared) {
    const Problem& problem = params.problem;
    const Band band = problem.band(problem.seqlen_q, problem.seqlen_k);
    Rings& rings = shared.rings;
    const int consumer = uniform(threadIdx.x / 128 - 1);
    const unsigned thread = thread_of_warpgroup();
    const int warp_row = 64 * consumer + thread / 32 * 16, lane = thread % 32;
    typename Ring::Position at;
    typename RingRows::Position rows_at;
    typename RingPairs::Position pairs_at;
    typename RingTiles::Position tile_at;
    const auto release = [&](auto& ring, auto& at) {
      if (lane == 0) ring.release(at);
      at.advance();
    };
    const auto release_panel = [&](auto& at) {  // to all who fill it
      if (lane < kCluster) {
        if constexpr (kCluster > 1) {
          rings.panels.release_of(lane, at);
        } else {
          rings.panels.release(at);
        }
      }
      at.advance();
    };

    Scores sums;
    sums.clear();
#pragma unroll 1
    for (;;) {
      rings.tiles.wait_full(tile_at);
      const Tile& tile = shared.tiles.at(tile_at.count());
      if (!tile.exists) break;
      const auto step = tile.step;
      const bool visible = tile.visible;
      if (visible) {
        Options here = options;
        here.enter(BatchedSequences::sequence(problem, step.batch), step.head);
        here.template look_at<kBlockM, kBlockN>(shared.pairs[pairs_at.stage()].memory, step.first_query(),
                                                first_key_of(step));
        const BiasPairs<Options> pairs = {here, band, problem.softmax_scale};
        const int first_query = step.first_query() + warp_row, first_key = first_key_of(step);
        const Range queries = {first_query, first_query + 16}, keys = {first_key, first_key + kBlockN};
        const bool masked = queries.end > band.seqlen_q || !band.all_visible(queries, keys);
        const Survivors<Options, kBlockN, false> survives(here, first_query, first_key);
        Scores scores, dweights;
        auto started = at;  // the next panel; those from `at` on are being read
        const auto multiply = [&](Scores& sum, int panel, bool first) {
          rings.panels.wait_full(started);
          const Panel& there = shared.panels[started.stage()];
          start_product_along<kPanel>(sum, there.rows[consumer], 0, there.cols, panel > 0);
          started.advance();
          if (first) return;
          ptx::wgmma_wait<1>();
          release_panel(at);
        };
#pragma unroll
        for (int panel = 0; panel < kPanelsQ; ++panel) multiply(scores, panel, panel == 0);
#pragma unroll
        for (int panel = 0; panel < kPanelsV; ++panel) multiply(dweights, panel, false);

        const Gradients gradients = {pairs, first_query + lane / 4, first_key + lane % 4 * 2};
        float lse[2], delta[2];
        rings.rows.wait_full(rows_at);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = warp_row + lane / 4 + 8 * r;
          lse[r] = RowStatistics::lse_of_value(shared.rows[rows_at.stage()].lse[row] * kLog2e);
          delta[r] = shared.rows[rows_at.stage()].delta[row];
        }
        __syncwarp();
        release(rings.rows, rows_at);
        rings.pairs.wait_full(pairs_at);
        gradients.weigh(scores, [&](int i) { return lse[row_of_element(i)]; });  // beside the last product
        ptx::wgmma_wait<0>();
        release_panel(at);
        gradients.subtract_delta(dweights, [&](int i) { return delta[row_of_element(i)]; }, survives);
        if (masked) gradients.hide_by_band(scores, dweights);
        gradients.hide_by_options(scores, dweights);
#pragma unroll
        for (int i = 0; i < Scores::kNumElements; ++i) sums.x[i] = fmaf(scores.x[i], dweights.x[i], sums.x[i]);
      }
      auto next_at = tile_at;
      next_at.advance();
      rings.tiles.wait_full(next_at);
      const Tile& next = shared.tiles.at(next_at.count());
      const bool last = next.first, keeps_pairs = next.same;
      __syncwarp();
      release(rings.tiles, tile_at);
      if (visible && !keeps_pairs) release(rings.pairs, pairs_at);
      if (last) {
        const Matrix<Bias> dbias(arrays.dbias, params.dbias, params.batch == 1 ? 0 : step.batch,
                                 params.heads == 1 ? 0 : step.head, 0, params.rows, params.cols);
        const float one[2] = {1.0f, 1.0f};
        store_rows(dbias, sums, one, step.first_query() + warp_row + lane / 4, first_key_of(step));
        sums.clear();
      }
    }
  }
};

}  // namespace cuflash
