// FlashAttention-2 backward on mma.sync: the gradient of Q.
#pragma once

#include <cuflash/attention/careful_gradient.cuh>
#include <cuflash/attention/register_gradient.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/mma_product.cuh>
#include <cuflash/tile/row_store.cuh>

namespace cuflash {

// A block owns kBlockM queries of one head and walks over the keys they see, in tiles of kBlockN. A warp has
// kBlockM / kNumWarps queries; its gradients of scores are in registers the first factor of dS K. Apart from the
// gradients of K and V, so that no sum is spread over blocks and the result is bitwise the same in every run.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kNumWarps,
          int kStages>
struct BwdSm80Dq {
  using Element = typename Number::Element;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kWarpM = kBlockM / kNumWarps;
  static constexpr int kTilesM = kWarpM / 16;

  using Scores = WarpgroupTile<kBlockN>;
  using Dscores = WarpgroupFactor<Element, kBlockN>;
  using TileQ = LdmatrixTile<Element, kBlockM, kHeadDim>;
  using TileDout = LdmatrixTile<Element, kBlockM, kHeadDimV>;
  using TileK = LdmatrixTile<Element, kBlockN, kHeadDim>;
  using TileV = LdmatrixTile<Element, kBlockN, kHeadDimV>;
  using Gradients = GradientTile<Options, false>;
  using Careful = CarefulGradient<Element, Options>;

  struct Arrays {
    const Element *q, *k, *v, *dout;
    const float *lse, *delta;
    Element* dq;
  };

  static constexpr int kPairBytes = Options::template kTileBytes<kBlockM, kBlockN>;
  struct alignas(16) TileOfArrays {
    unsigned char memory[larger(kPairBytes, 16)];
  };
  struct Shared {
    TileQ q;
    TileDout dout;
    TileK k[kStages];
    TileV v[kStages];
    TileOfArrays pairs[kStages];
    typename Careful::Memory careful[kNumWarps];
  };
  // Without the padding at the end of the struct.
  static constexpr int kSharedBytes = sizeof(TileQ) + sizeof(TileDout) +
                                      kStages * (sizeof(TileK) + sizeof(TileV) + sizeof(TileOfArrays)) +
                                      sizeof(Shared::careful);

  static_assert(kBlockM % (16 * kNumWarps) == 0 && kBlockN % 16 == 0 && (kStages == 1 || kStages == 2));

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params, Options options) {
    const Problem& problem = params.problem;
    const Job job = options.template query_job<kBlockM>(problem, blockIdx.x);
    const Sequence& sequence = job.sequence;
    const int block_query = job.tile * kBlockM;
    if (block_query >= sequence.seqlen_q || job.tile < 0) return;
    const int batch = sequence.batch, head = job.head, head_kv = head / problem.group_size();
    const Band band = problem.band(sequence.seqlen_q, sequence.seqlen_k);
    options.enter(sequence, head);
    const Pairs<Options> pairs = {options, band, problem.softmax_scale};

    const Matrix<const Element> q(arrays.q, params.q, batch, head, sequence.first_query, sequence.seqlen_q,
                                  problem.head_dim);
    const Matrix<const Element> k(arrays.k, params.k, batch, head_kv, sequence.first_key, sequence.seqlen_k,
                                  problem.head_dim);
    const Matrix<const Element> v(arrays.v, params.v, batch, head_kv, sequence.first_key, sequence.seqlen_k,
                                  problem.head_dim_v);
    const Matrix<const Element> dout(arrays.dout, params.dout, batch, head, sequence.first_query, sequence.seqlen_q,
                                     problem.head_dim_v);
    const RowStatistics rows(arrays.lse, arrays.delta, params, sequence, head);

    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    const int warp = threadIdx.x / 32, warp_row = warp * kWarpM, warp_query = block_query + warp_row;
    const int lane_row = warp_query + threadIdx.x % 32 / 4;

    const Range keys = band.keys_of({block_query, block_query + kBlockM});
    const int n_end = ceil_div(keys.end, kBlockN);
    const auto skip_hidden = [&](int n_block) {
      if constexpr (Options::kSkipsBlocks) {
        for (Options there = options; n_block < n_end; ++n_block) {
          there.template look_at<kBlockM, kBlockN>(nullptr, block_query, n_block * kBlockN);
          if (!there.hides_all()) break;
        }
      }
      return n_block;
    };
    const auto load = [&](int stage, int n_block) {
      shared.k[stage].template load<kNumThreads>(k, n_block * kBlockN);
      shared.v[stage].template load<kNumThreads>(v, n_block * kBlockN);
      options.template load<kBlockM, kBlockN, kNumThreads>(shared.pairs[stage].memory, block_query, n_block * kBlockN);
    };

    float lse[kTilesM][2], delta[kTilesM][2];
    WarpgroupTile<kHeadDim> dq[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      dq[m].clear();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        lse[m][r] = rows.lse_of(lane_row + 16 * m + 8 * r) * Gradients::kLseUnit;
        delta[m][r] = rows.delta_of(lane_row + 16 * m + 8 * r);
      }
    }
    int n_block = skip_hidden(keys.begin / kBlockN);
    shared.q.template load<kNumThreads>(q, block_query);
    shared.dout.template load<kNumThreads>(dout, block_query);
    if (n_block < n_end) load(0, n_block);
    ptx::cp_async_commit();

    bool hides_pairs = Options::kHidesPairs;
#pragma unroll 1
    for (int stage = 0, following; n_block < n_end; n_block = following, stage = (stage + 1) % kStages) {
      following = skip_hidden(n_block + 1);
      const int first_key = n_block * kBlockN;
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage has arrived, and the previous one is no longer read
      if (kStages > 1 && following < n_end) load(stage ^ 1, following);
      ptx::cp_async_commit();
      options.template look_at<kBlockM, kBlockN>(shared.pairs[stage].memory, block_query, first_key);
      const bool masked = block_query + kBlockM > band.seqlen_q ||
                          !band.all_visible({block_query, block_query + kBlockM}, {first_key, first_key + kBlockN});
      hides_pairs = hides_pairs || masked;

      Scores scores[kTilesM], dweights[kTilesM];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        scores[m].clear();
        dweights[m].clear();
      }
      add_product_along<kHeadDim>(scores, RowsOf(shared.q, warp_row), shared.k[stage]);
      add_product_along<kHeadDimV>(dweights, RowsOf(shared.dout, warp_row), shared.v[stage]);
      Dscores dscores[kTilesM];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        const Gradients tile = {pairs, lane_row + 16 * m, first_key + static_cast<int>(threadIdx.x % 4 * 2)};
        const Survivors<Options, kBlockN, false> survives(options, warp_query + 16 * m, first_key);
        tile.differentiate(
            scores[m], dweights[m], [&](int i) { return lse[m][row_of_element(i)]; },
            [&](int i) { return delta[m][row_of_element(i)]; }, survives);
        if (masked) tile.hide_by_band(scores[m], dweights[m]);
        tile.hide_by_options(scores[m], dweights[m]);
        dscores[m].round(dweights[m]);
      }
      add_product_across<kBlockN>(dq, registers_of(dscores), shared.k[stage]);
      if (kStages == 1 && following < n_end) {
        __syncthreads();  // the only stage is no longer read
        load(0, following);
        ptx::cp_async_commit();
      }
    }
    ptx::cp_async_wait<0>();  // without any key, Q is still on its way

    const Matrix<Element> target(arrays.dq, params.dq, batch, head, sequence.first_query, sequence.seqlen_q,
                                 problem.head_dim);
    const float scale[2] = {problem.softmax_scale, problem.softmax_scale};
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      const bool finite = store_rows(target, dq[m], scale, lane_row + 16 * m);
      // 0 * NaN is NaN: each key meets all queries, if only with weight 0, and may have spoiled those that do not see
      // it.
      if (hides_pairs && __any_sync(kFullMask, !finite)) {
        __syncwarp();  // others write again what this lane wrote
        const Careful careful = {q, k, v, dout, options, band, problem.softmax_scale, rows, shared.careful[warp]};
#pragma unroll 1
        for (int row = warp_query + 16 * m; row < min(warp_query + 16 * m + 16, sequence.seqlen_q); ++row) {
          typename Careful::template Row<kHeadDim> sum;
          careful.add_query(sum, row);
          sum.write(target, row, problem.softmax_scale);
        }
      }
    }
  }
};

}  // namespace cuflash
