// FlashAttention-2 backward on mma.sync: the gradient of Q.
#pragma once

#include <cuflash/attention/careful_gradients.cuh>
#include <cuflash/attention/register_gradient.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/mma_product.cuh>
#include <cuflash/tile/row_store.cuh>

namespace cuflash {

// A block owns kBlockM queries of one head and walks over the keys they see, in tiles of kBlockN. A warp has
// kBlockM / kNumWarps queries; its gradients of scores are in registers the first factor of dS K. Apart from the
// gradients of K and V, so that no sum is spread over blocks and the result is bitwise the same in every run.
// Where memory has room for few queries, kSplits warps share the same ones: each has scores of a part of the keys, and
// a part of the columns of dQ; gradients of scores go through shared memory.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kNumWarps,
          int kStages, int kSplits>
struct BwdSm80Dq {
  using Element = typename Number::Element;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kWarpM = kBlockM / (kNumWarps / kSplits);
  static constexpr int kTilesM = kWarpM / 16;
  static constexpr int kWarpN = kBlockN / kSplits;
  static constexpr int kCols = kHeadDim / kSplits;

  // As far as the registers hold the factors.
  static constexpr int kUnrollScores = unroll_along<Number>(kTilesM, kWarpN, kHeadDim / 16);
  static constexpr int kUnrollV = unroll_along<Number>(kTilesM, kWarpN, kHeadDimV / 16);
  static constexpr int kUnrollDq = unroll_across<Number>(kCols, kBlockN / 16);

  using Scores = WarpgroupTile<kWarpN>;
  using Dscores = WarpgroupFactor<Element, kWarpN>;
  using TileQ = LdmatrixTile<Number, kBlockM, kHeadDim>;
  using TileDout = LdmatrixTile<Number, kBlockM, kHeadDimV>;
  using TileK = LdmatrixTile<Number, kBlockN, kHeadDim>;
  using TileV = LdmatrixTile<Number, kBlockN, kHeadDimV>;
  using TileDs = TileIf<(kSplits > 1), LdmatrixTile<Number, kBlockM, larger(kBlockN, 32)>>;
  using Gradients = GradientTile<Options, false, sizeof(Element) == 4>;
  using Careful = CarefulGradients<Element, Options>;

  struct Arrays {
    const Element *q, *k, *v, *dout;
    const float *lse, *delta;
    Element* dq;
  };

  static constexpr int kPairBytes = Options::template kTileBytes<kBlockM, kBlockN>;
  struct alignas(16) TileOfArrays {
    unsigned char memory[larger(kPairBytes, 16)];
  };
  // What a block knows of its job. In shared memory, since it is looked at once a step and registers are few.
  struct alignas(16) Work {
    Matrix<const Element> q, k, v, dout;
    RowStatistics rows;
    Band band;
    int first_query, n_end;

    __device__ __forceinline__ Work(const Arrays& arrays, const BwdParams& params, const Job& job)
        : Work(arrays, params, job, job.sequence, job.head / params.problem.group_size()) {}

   private:
    __device__ __forceinline__ Work(const Arrays& arrays, const BwdParams& params, const Job& job,
                                    const Sequence& sequence, int head_kv)
        : q(arrays.q, params.q, sequence.batch, job.head, sequence.first_query, sequence.seqlen_q,
            params.problem.head_dim),
          k(arrays.k, params.k, sequence.batch, head_kv, sequence.first_key, sequence.seqlen_k,
            params.problem.head_dim),
          v(arrays.v, params.v, sequence.batch, head_kv, sequence.first_key, sequence.seqlen_k,
            params.problem.head_dim_v),
          dout(arrays.dout, params.dout, sequence.batch, job.head, sequence.first_query, sequence.seqlen_q,
               params.problem.head_dim_v),
          rows(arrays.lse, arrays.delta, params, sequence, job.head),
          band(params.problem.band(sequence.seqlen_q, sequence.seqlen_k)),
          first_query(job.tile * kBlockM),
          n_end(ceil_div(band.keys_of({first_query, first_query + kBlockM}).end, kBlockN)) {}
  };
  struct Shared {
    TileQ q;
    TileDout dout;
    TileK k[kStages];
    TileV v[kStages];
    TileDs ds;
    TileOfArrays pairs[kStages];
    typename Careful::Memory careful[kNumWarps];
    Work work;
  };
  // Without the padding at the end of the struct.
  static constexpr int kSharedBytes = sizeof(TileQ) + sizeof(TileDout) + sizeof(TileDs) +
                                      kStages * (sizeof(TileK) + sizeof(TileV) + sizeof(TileOfArrays)) +
                                      sizeof(Shared::careful) + sizeof(Work);

  static_assert(kNumWarps % kSplits == 0 && kBlockM % (16 * (kNumWarps / kSplits)) == 0 && kWarpN % 16 == 0);
  static_assert(kCols % 32 == 0 && (kStages == 1 || kStages == 2));

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params, const Options& of_call) {
    const Problem& problem = params.problem;
    const Job job = of_call.template query_job<kBlockM>(problem, blockIdx.x);
    if (job.tile * kBlockM >= job.sequence.seqlen_q || job.tile < 0) return;
    Options options = of_call;
    options.enter(job.sequence, job.head);
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    if (threadIdx.x == 0) shared.work = Work(arrays, params, job);
    __syncthreads();
    const Work& work = shared.work;
    const Pairs<Options> pairs = {options, work.band, problem.softmax_scale};
    const int warp = threadIdx.x / 32, warp_row = warp / kSplits * kWarpM, split = warp % kSplits;
    const int warp_col = split * kWarpN;  // of scores

    const auto skip_hidden = [&](int n_block) {
      if constexpr (Options::kSkipsBlocks) {
        for (Options there = options; n_block < work.n_end; ++n_block) {
          there.template look_at<kBlockM, kBlockN>(nullptr, work.first_query, n_block * kBlockN);
          if (!there.hides_all()) break;
        }
      }
      return n_block;
    };
    const auto load = [&](int stage, int n_block) {
      shared.k[stage].template load<kNumThreads>(work.k, n_block * kBlockN);
      shared.v[stage].template load<kNumThreads>(work.v, n_block * kBlockN);
      unsigned thread = threadIdx.x;
      ptx::make_opaque(thread);  // as in LdmatrixTile::load
      options.template load<kBlockM, kBlockN, kNumThreads>(shared.pairs[stage].memory, work.first_query,
                                                           n_block * kBlockN, static_cast<int>(thread));
    };

    float lse[kTilesM][2], delta[kTilesM][2];
    WarpgroupTile<kCols> dq[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      dq[m].clear();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = work.first_query + warp_row + 16 * m + 8 * r + threadIdx.x % 32 / 4;
        lse[m][r] = work.rows.lse_of(row) * Gradients::kLseUnit;
        delta[m][r] = work.rows.delta_of(row);
      }
    }
    int n_block = skip_hidden(work.band.keys_of({work.first_query, work.first_query + kBlockM}).begin / kBlockN);
    shared.q.template load<kNumThreads>(work.q, work.first_query);
    shared.dout.template load<kNumThreads>(work.dout, work.first_query);
    if (n_block < work.n_end) load(0, n_block);
    ptx::cp_async_commit();

#pragma unroll 1
    for (int stage = 0; n_block < work.n_end; n_block = skip_hidden(n_block + 1), stage = (stage + 1) % kStages) {
      const auto load_following = [&](int stage) {
        const int following = skip_hidden(n_block + 1);
        if (following < work.n_end) load(stage, following);
        ptx::cp_async_commit();
      };
      const int first_key = n_block * kBlockN;
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage has arrived, and the previous one is no longer read
      if (kStages > 1) load_following(stage ^ 1);
      options.template look_at<kBlockM, kBlockN>(shared.pairs[stage].memory, work.first_query, first_key);
      const bool masked =
          work.first_query + kBlockM > work.band.seqlen_q ||
          !work.band.all_visible({work.first_query, work.first_query + kBlockM}, {first_key, first_key + kBlockN});

      Scores scores[kTilesM], dweights[kTilesM];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        scores[m].clear();
        dweights[m].clear();
      }
      add_product_along<kHeadDim, kUnrollScores>(scores, RowsOf(shared.q, warp_row), shared.k[stage], warp_col);
      add_product_along<kHeadDimV, kUnrollV>(dweights, RowsOf(shared.dout, warp_row), shared.v[stage], warp_col);
      Dscores dscores[kTilesM];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        unsigned lane = threadIdx.x % 32;
        ptx::make_opaque(lane);  // as in TileReader
        const int row = work.first_query + warp_row + 16 * m;
        const Gradients tile = {pairs, row + static_cast<int>(lane / 4),
                                first_key + warp_col + static_cast<int>(lane % 4 * 2)};
        const Survivors<Options, kWarpN, false> survives(options, row, first_key + warp_col);
        tile.differentiate(
            scores[m], dweights[m], [&](int i) { return lse[m][row_of_element(i)]; },
            [&](int i) { return delta[m][row_of_element(i)]; }, survives);
        if (masked) tile.hide_by_band(scores[m], dweights[m]);
        tile.hide_by_options(scores[m], dweights[m]);
        dscores[m].round(dweights[m]);
      }
      if constexpr (kSplits > 1) {
        const TileWriter writer(shared.ds, warp_row, warp_col);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) writer.store(dscores[m], 16 * m);
        __syncthreads();  // dS is there
        add_product_across<kBlockN, kUnrollDq>(dq, RowsOf(shared.ds, warp_row), shared.k[stage],
                                               Corner{0, split * kCols});
      } else {
        add_product_across<kBlockN, kUnrollDq>(dq, RegistersOf(dscores), shared.k[stage]);
      }
      if (kStages == 1) {
        __syncthreads();  // the only stage is no longer read
        load_following(0);
      }
    }
    ptx::cp_async_wait<0>();  // without any key, Q is still on its way

    const Sequence& sequence = job.sequence;
    const Matrix<Element> target(arrays.dq, params.dq, sequence.batch, job.head, sequence.first_query,
                                 sequence.seqlen_q, problem.head_dim);
    const bool hides_pairs =
        Options::kHidesPairs ||
        !work.band.all_visible({work.first_query, work.first_query + kBlockM}, {0, work.band.seqlen_k});
    const float scale[2] = {problem.softmax_scale, problem.softmax_scale};
    bool all_finite = true;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      const int first_row = work.first_query + warp_row + 16 * m;
      const bool finite = store_rows(target, dq[m], scale, first_row + threadIdx.x % 32 / 4, split * kCols);
      // 0 * NaN is NaN: each key meets all queries, if only with weight 0, and may have spoiled those that do not see
      // it.
      if (kSplits == 1 && hides_pairs && __any_sync(kFullMask, !finite)) {
        __syncwarp();  // others write again what this lane wrote
        Careful::template write_queries<kHeadDim>(arrays, params, of_call, job, {first_row, first_row + 16}, 1,
                                                  shared.careful[warp]);
      }
      all_finite = all_finite && finite;
    }
    if constexpr (kSplits > 1) {  // others have the same rows
      if (hides_pairs && __syncthreads_or(!all_finite) && split == 0) {
        const int first = work.first_query + warp_row;
        Careful::template write_queries<kHeadDim>(arrays, params, of_call, job, {first, first + kWarpM}, 1,
                                                  shared.careful[warp]);
      }
    }
  }
};

}  // namespace cuflash
