// FlashAttention-2 backward on mma.sync: the gradients of K and V, and those of Q in the same pass.
#pragma once

#include <cuflash/attention/careful_gradients.cuh>
#include <cuflash/attention/register_gradient.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/global_sums.cuh>
#include <cuflash/tile/mma_product.cuh>
#include <cuflash/tile/row_store.cuh>

namespace cuflash {

// A block owns kBlockN keys of one key/value head and walks over the queries that see them, in tiles of kBlockM, for
// every query head of the group. Scores are computed transposed (keys are rows): so the weights and the gradients of
// scores that a warp has in registers are the first factors of P^T dO and dS^T Q. Where the registers do not hold all
// columns of dK and dV, kSplits warps share the same keys: each computes a part of the columns, and scores of a part of
// the queries, which they give to each other through shared memory. A warp takes its queries of a step in kParts.
// With kAddsDq the block also adds dS K to sums of dQ in global memory, which bwd_sm80_finish.cuh rounds: 5 products
// where two kernels take 7, but the order of the sums changes from run to run.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kNumWarps,
          int kSplits, int kParts, int kStages, bool kAddsDq>
struct BwdSm80DkDv {
  using Element = typename Number::Element;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kWarpN = kBlockN / (kNumWarps / kSplits);
  static constexpr int kTilesN = kWarpN / 16;
  static constexpr int kWarpM = kBlockM / (kSplits * kParts);
  static constexpr int kCols = kHeadDim / kSplits, kColsV = kHeadDimV / kSplits;

  // As far as the registers hold the factors.
  static constexpr int kUnroll = unroll_along<Number>(kTilesN, kWarpM, kHeadDim == 64 ? 2 : 4);
  static constexpr int kUnrollGradients = unroll_across<Number>(kHeadDim + kHeadDimV, kWarpM / 16);
  static constexpr int kUnrollShared = unroll_across<Number>(kCols + kColsV, 4);

  using Scores = WarpgroupTile<kWarpM>;
  using Weights = WarpgroupFactor<Element, kWarpM>;
  using TileK = LdmatrixTile<Number, kBlockN, kHeadDim>;
  using TileV = LdmatrixTile<Number, kBlockN, kHeadDimV>;
  using TileQ = LdmatrixTile<Number, kBlockM, kHeadDim>;
  using TileDout = LdmatrixTile<Number, kBlockM, kHeadDimV>;
  // Weights and gradients of scores, transposed as well.
  static constexpr bool kSharesWeights = kSplits > 1, kSharesDs = kSplits > 1 || kAddsDq;
  using TileWeights = LdmatrixTile<Number, kSharesWeights ? kBlockN : 16, kSharesWeights ? kBlockM : 32>;
  using TileDs = LdmatrixTile<Number, kSharesDs ? kBlockN : 16, kSharesDs ? kBlockM : 32>;
  using DqSums = GlobalSums<rows_of_sums(kBlockM, kHeadDim, kNumWarps), kHeadDim, kNumWarps>;
  using Gradients = GradientTile<Options, true, sizeof(Element) == 4>;
  using Careful = CarefulGradients<Element, Options>;

  struct Arrays {
    const Element *q, *k, *v, *dout;
    const float *lse, *delta;
    Element *dk, *dv;
    float* dq_sums;  // may be null without kAddsDq
  };

  static constexpr int kPairBytes = Options::template kTileBytes<kBlockM, kBlockN>;
  struct alignas(16) TileOfArrays {
    unsigned char memory[larger(kPairBytes, 16)];
  };
  struct alignas(16) Statistics {
    float lse[kBlockM], delta[kBlockM];
  };
  // A tile of queries of one head of the group.
  struct Step {
    int head, first_query;
  };
  // What a block knows of its job. In shared memory, since it is looked at once a step and registers are few.
  struct alignas(16) Work {
    Job job;
    Band band;
    int first_key, first_query, end_query, first_head, end_head;

    __device__ __forceinline__ Work(const Job& job, const Problem& problem)
        : job(job),
          band(problem.band(job.sequence.seqlen_q, job.sequence.seqlen_k)),
          first_key(job.tile * kBlockN),
          first_head(job.head * problem.group_size()) {
      const Range queries = band.queries_of({first_key, first_key + kBlockN});
      first_query = queries.begin / kBlockM * kBlockM;
      end_query = queries.end;
      end_head = first_head + (first_query < end_query ? problem.group_size() : 0);
    }

    __device__ __forceinline__ Step first() const { return {first_head, first_query}; }
    __device__ __forceinline__ Step after(const Step& step) const {
      if (step.first_query + kBlockM < end_query) return {step.head, step.first_query + kBlockM};
      return {step.head + 1, first_query};
    }
  };
  struct Shared {
    TileK k;
    TileV v;
    TileQ q[kStages];
    TileDout dout[kStages];
    TileWeights weights;
    TileDs ds;
    TileOfArrays pairs[kStages];
    Statistics rows[kStages];
    typename Careful::Memory careful[kNumWarps];
    Work work;
  };
  // Without the padding at the end of the struct.
  static constexpr int kSharedBytes = sizeof(TileK) + sizeof(TileV) + sizeof(TileWeights) + sizeof(TileDs) +
                                      kStages * (sizeof(TileQ) + sizeof(TileDout) + sizeof(TileOfArrays)) +
                                      sizeof(Shared::rows) + sizeof(Shared::careful) + sizeof(Work);

  static_assert(kNumWarps % kSplits == 0 && kBlockN % (16 * (kNumWarps / kSplits)) == 0);
  static_assert(kCols % 32 == 0 && kColsV % 32 == 0 && (kStages == 1 || kStages == 2));
  static_assert(kBlockM % (16 * kSplits * kParts) == 0);
  static_assert(kBlockM <= kNumThreads, "one thread fetches the statistics of one row");

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params, const Options& options) {
    const Problem& problem = params.problem;
    const Job job = options.template key_job<kBlockN>(problem, blockIdx.x);
    if (job.tile * kBlockN >= job.sequence.num_keys || job.tile < 0) return;
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    if (threadIdx.x == 0) shared.work = Work(job, problem);
    __syncthreads();
    const Work& work = shared.work;
    const Sequence& sequence = work.job.sequence;
    const int warp = threadIdx.x / 32, warp_row = warp / kSplits * kWarpN, split = warp % kSplits;
    const Corner keys_of_warp = {warp_row, 0};

    const auto skip_hidden = [&](Step step) {
      if constexpr (Options::kSkipsBlocks) {
        for (; step.head < work.end_head; step = work.after(step)) {
          Options there = options;
          there.enter(sequence, step.head);
          there.template look_at<kBlockM, kBlockN>(nullptr, step.first_query, work.first_key);
          if (!there.hides_all()) break;
        }
      }
      return step;
    };
    const auto queries_of = [&](const Element* array, const Strides& strides, int head, int cols) {
      return Matrix<const Element>(array, strides, sequence.batch, head, sequence.first_query, sequence.seqlen_q, cols);
    };
    const auto keys_of = [&](auto* array, const Strides& strides, int num_rows, int cols) {
      return Matrix(array, strides, sequence.batch, work.job.head, sequence.first_key, num_rows, cols);
    };
    const auto load = [&](int stage, const Step& step) {
      const auto [head, first_query] = step;
      shared.q[stage].template load<kNumThreads>(queries_of(arrays.q, params.q, head, problem.head_dim), first_query);
      shared.dout[stage].template load<kNumThreads>(queries_of(arrays.dout, params.dout, head, problem.head_dim_v),
                                                    first_query);
      Options there = options;
      there.enter(sequence, head);
      there.template load<kBlockM, kBlockN, kNumThreads>(shared.pairs[stage].memory, first_query, work.first_key);
      if (threadIdx.x < kBlockM) {
        const RowStatistics rows(arrays.lse, arrays.delta, params, sequence, head);
        rows.start_to_copy(first_query + threadIdx.x, shared.rows[stage].lse + threadIdx.x,
                           shared.rows[stage].delta + threadIdx.x);
      }
    };
    // What a thread has copied it sees before the others do.
    const auto finish_statistics = [&](int stage) {
      if (threadIdx.x < kBlockM) {
        float& lse = shared.rows[stage].lse[threadIdx.x];
        lse = RowStatistics::lse_of_value(lse) * Gradients::kLseUnit;
      }
    };

    WarpgroupTile<kCols> dk[kTilesN];
    WarpgroupTile<kColsV> dv[kTilesN];
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      dk[n].clear();
      dv[n].clear();
    }
    Step step = skip_hidden(work.first());
    shared.k.template load<kNumThreads>(keys_of(arrays.k, params.k, sequence.seqlen_k, problem.head_dim),
                                        work.first_key);
    shared.v.template load<kNumThreads>(keys_of(arrays.v, params.v, sequence.seqlen_k, problem.head_dim_v),
                                        work.first_key);
    if (step.head < work.end_head) load(0, step);
    ptx::cp_async_commit();

#pragma unroll 1
    for (int stage = 0; step.head < work.end_head; step = skip_hidden(work.after(step)), stage ^= kStages - 1) {
      const auto load_following = [&](int stage) {
        const Step following = skip_hidden(work.after(step));
        if (following.head < work.end_head) load(stage, following);
        ptx::cp_async_commit();
      };
      ptx::cp_async_wait<0>();
      finish_statistics(stage);
      __syncthreads();  // this stage has arrived, and the previous one is no longer read
      if (kStages > 1) load_following(stage ^ 1);

      Options here = options;
      here.enter(sequence, step.head);
      here.template look_at<kBlockM, kBlockN>(shared.pairs[stage].memory, step.first_query, work.first_key);
      const Pairs<Options> pairs = {here, work.band, problem.softmax_scale};

#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        const int warp_col = (split * kParts + part) * kWarpM;
        const int first_query = step.first_query + warp_col, first_key = work.first_key + warp_row;
        const TileWriter weights_writer(shared.weights, kSharesWeights ? warp_row : 0, kSharesWeights ? warp_col : 0);
        const TileWriter ds_writer(shared.ds, kSharesDs ? warp_row : 0, kSharesDs ? warp_col : 0);
        const auto share = [&](const Weights& weights, const Weights& dscores, int n) {
          if (kSharesWeights) weights_writer.store(weights, 16 * n);
          if (kSharesDs) ds_writer.store(dscores, 16 * n);
        };
        const Range queries = {first_query, first_query + kWarpM}, keys = {first_key, first_key + kWarpN};
        if (!work.band.any_visible(queries, keys)) {
#pragma unroll
          for (int n = 0; n < kTilesN; ++n) share(Weights{}, Weights{}, n);
          continue;
        }
        const bool masked = queries.end > work.band.seqlen_q || !work.band.all_visible(queries, keys);
        Scores scores[kTilesN], dweights[kTilesN];
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
          scores[n].clear();
          dweights[n].clear();
        }
        add_product_along<kHeadDim, kUnroll>(scores, RowsOf(shared.k, keys_of_warp), shared.q[stage],
                                             Corner{warp_col, 0});
        add_product_along<kHeadDimV, kUnroll>(dweights, RowsOf(shared.v, keys_of_warp), shared.dout[stage],
                                              Corner{warp_col, 0});

        Weights weights[kTilesN], dscores[kTilesN];
        const Statistics& rows = shared.rows[stage];
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
          unsigned lane = threadIdx.x % 32;
          ptx::make_opaque(lane);  // as in TileReader
          const int lane_row = 16 * n + static_cast<int>(lane / 4), lane_col = lane % 4 * 2;
          const Gradients tile = {pairs, first_query + lane_col, first_key + lane_row};
          const Survivors<Options, kWarpM, true> survives(here, first_query, first_key + 16 * n);
          tile.differentiate(
              scores[n], dweights[n], [&](int i) { return rows.lse[warp_col + lane_col + col_of_element(i)]; },
              [&](int i) { return rows.delta[warp_col + lane_col + col_of_element(i)]; }, survives);
          if (masked) tile.hide_by_band(scores[n], dweights[n]);
          tile.hide_by_options(scores[n], dweights[n]);
          weights[n].round(scores[n]);
          dscores[n].round(dweights[n]);
          share(weights[n], dscores[n], n);
        }
        if (kSplits == 1) {
          add_product_across<kWarpM, kUnrollGradients>(dv, RegistersOf(weights), shared.dout[stage],
                                                       Corner{warp_col, 0});
          add_product_across<kWarpM, kUnrollGradients>(dk, RegistersOf(dscores), shared.q[stage], Corner{warp_col, 0});
        }
      }
      if constexpr (kSplits > 1) {
        __syncthreads();  // P and dS are there
        add_product_across<kBlockM, kUnrollShared>(dv, RowsOf(shared.weights, keys_of_warp), shared.dout[stage],
                                                   Corner{0, split * kColsV});
        add_product_across<kBlockM, kUnrollShared>(dk, RowsOf(shared.ds, keys_of_warp), shared.q[stage],
                                                   Corner{0, split * kCols});
      }
      if (kStages == 1 || (kAddsDq && kSplits == 1)) {
        __syncthreads();  // dS is there, and the only stage is no longer read
      }
      if (kStages == 1) load_following(0);
      if constexpr (kAddsDq) {
#pragma unroll 1
        for (int row = 0; row < kBlockM && step.first_query + row < sequence.seqlen_q; row += DqSums::kRowsOfSums) {
          const DqSums sums;
          typename DqSums::Tile dq[DqSums::kTilesM];
#pragma unroll
          for (int m = 0; m < DqSums::kTilesM; ++m) dq[m].clear();
          add_product_across<kBlockN, 2>(dq, ColumnsOf(shared.ds, row + sums.row), shared.k, Corner{0, sums.col});
          const long long tile = Options::template query_tile<DqSums::kRowsOfSums>(
              problem, sequence, step.head, (step.first_query + row) / DqSums::kRowsOfSums);
          sums.add(arrays.dq_sums + tile * (DqSums::kRowsOfSums * kHeadDim), dq);
        }
      }
    }

    const float scale[2] = {problem.softmax_scale, problem.softmax_scale}, one[2] = {1.0f, 1.0f};
    auto target_k = keys_of(arrays.dk, params.dk, sequence.num_keys, problem.head_dim);
    auto target_v = keys_of(arrays.dv, params.dv, sequence.num_keys, problem.head_dim_v);
    bool finite = true;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      const int row = work.first_key + warp_row + 16 * n + threadIdx.x % 32 / 4;
      finite = store_rows(target_k, dk[n], scale, row, split * kCols) && finite;
      finite = store_rows(target_v, dv[n], one, row, split * kColsV) && finite;
    }
    // 0 * NaN is NaN: each query meets all keys, if only with weight 0, and may have spoiled those that do not
    // see it.
    const bool hides_pairs = Options::kHidesPairs || !work.band.all_visible({0, work.band.seqlen_q},
                                                                            {work.first_key, work.first_key + kBlockN});
    if (hides_pairs && __syncthreads_or(!finite)) {
      const int first = work.first_key + warp_row;
      if (split == 0) {
        Careful::template write_keys<kHeadDim, kHeadDimV>(arrays, params, options, work.job, {first, first + kWarpN}, 1,
                                                          shared.careful[warp]);
      }
    }
  }
};

}  // namespace cuflash
