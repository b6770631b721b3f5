// The gradient of an additive bias on nvcuda::wmma fragments, summed over the axes along which it was broadcast.
#pragma once

#include <cuflash/attention/bias_walk.cuh>
#include <cuflash/attention/fragment_survivors.cuh>
#include <cuflash/attention/recompute.cuh>
#include <cuflash/common/shared_memory.cuh>

namespace cuflash {

// A block owns a tile of the gradient (BiasWalk). Each warp owns kBlockM / kNumWarps of its rows.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kNumWarps,
          int kNumStages>
struct BwdWmmaDbias {
  using Element = typename Number::Element;
  using Bias = typename Options::Bias;
  using Map = FragmentMap<Number>;
  using Walk = BiasWalk<kBlockM, kBlockN>;
  using Step = typename Walk::Step;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kWarpM = kBlockM / kNumWarps;
  static constexpr int kTilesM = kWarpM / 16;
  static constexpr int kTilesN = kBlockN / 16;

  static constexpr int kPitch = padded<Element>(kHeadDim);
  static constexpr int kPitchV = padded<Element>(kHeadDimV);

  static constexpr int kSizeQ = kBlockM * kPitch * sizeof(Element);
  static constexpr int kSizeDout = kBlockM * kPitchV * sizeof(Element);
  static constexpr int kSizeK = kBlockN * kPitch * sizeof(Element);
  static constexpr int kSizeV = kBlockN * kPitchV * sizeof(Element);
  static constexpr int kSizeRows = 2 * kBlockM * sizeof(float);
  static constexpr int kSizeStage =
      kSizeQ + kSizeDout + kSizeK + kSizeV + kSizeRows + Options::template kTileBytes<kBlockM, kBlockN>;
  static constexpr int kSharedBytes = larger(kNumStages * kSizeStage, Walk::kSumBytes);

  static_assert(kBlockM % (16 * kNumWarps) == 0 && kBlockN % 16 == 0);
  static_assert(kSharedBytes >= kNumWarps * Map::kScratchFloats * sizeof(float));

  struct Arrays {
    const Element *q, *k, *v, *dout;
    const float *lse, *delta;
    Bias* dbias;
  };

  // One tile of pairs, as the block sees it in shared memory.
  struct Stage {
    Element *q, *dout, *k, *v;
    float *lse, *delta;
    unsigned char* pairs;

    __device__ __forceinline__ explicit Stage(unsigned char* memory)
        : q(reinterpret_cast<Element*>(memory)),
          dout(reinterpret_cast<Element*>(memory + kSizeQ)),
          k(reinterpret_cast<Element*>(memory + kSizeQ + kSizeDout)),
          v(reinterpret_cast<Element*>(memory + kSizeQ + kSizeDout + kSizeK)),
          lse(reinterpret_cast<float*>(memory + kSizeQ + kSizeDout + kSizeK + kSizeV)),
          delta(lse + kBlockM),
          pairs(memory + kSizeQ + kSizeDout + kSizeK + kSizeV + kSizeRows) {}
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const DbiasParams& params, const Options& options) {
    const Problem& problem = params.problem;
    const Band band = problem.band(problem.seqlen_q, problem.seqlen_k);
    Walk walk(params);
    walk.begin(walk.tile(blockIdx.x));

    const int warp = threadIdx.x / 32;
    unsigned char* const shared = dynamic_shared_memory();
    Map map(reinterpret_cast<float*>(shared) + warp * Map::kScratchFloats);
    __syncthreads();  // the map's scratch is no longer read

    const auto load = [&](int turn, const Step& step) {
      if (walk.done(step)) return;
      const Stage stage(shared + turn % kNumStages * kSizeStage);
      const int batch = step.batch, head = step.head, head_kv = head / problem.group_size();
      const Sequence sequence = BatchedSequences::sequence(problem, batch);
      const Matrix<const Element> q(arrays.q, params.q, batch, head, 0, problem.seqlen_q, problem.head_dim);
      const Matrix<const Element> dout(arrays.dout, params.dout, batch, head, 0, problem.seqlen_q, problem.head_dim_v);
      const Matrix<const Element> k(arrays.k, params.k, batch, head_kv, 0, problem.seqlen_k, problem.head_dim);
      const Matrix<const Element> v(arrays.v, params.v, batch, head_kv, 0, problem.seqlen_k, problem.head_dim_v);
      load_tile<kBlockM, kHeadDim, kNumThreads>(stage.q, q, step.first_query());
      load_tile<kBlockM, kHeadDimV, kNumThreads>(stage.dout, dout, step.first_query());
      load_tile<kBlockN, kHeadDim, kNumThreads>(stage.k, k, step.first_key());
      load_tile<kBlockN, kHeadDimV, kNumThreads>(stage.v, v, step.first_key());
      Options there = options;
      there.enter(sequence, head);
      there.template load<kBlockM, kBlockN, kNumThreads>(stage.pairs, step.first_query(), step.first_key());
      const RowStatistics rows(arrays.lse, arrays.delta, params, sequence, head);
      for (int row = threadIdx.x; row < kBlockM; row += kNumThreads) {
        stage.lse[row] = rows.lse_of(step.first_query() + row);
        stage.delta[row] = rows.delta_of(step.first_query() + row);
      }
    };

    Step step = walk.visited(walk.first, problem, band, options);
    load(0, step);
    ptx::cp_async_commit();
    WarpTile<Number, kTilesM, kTilesN> acc_dbias;
    acc_dbias.clear();

    for (int turn = 0; !walk.done(step); ++turn) {
      const Step following = walk.visited(walk.after(step), problem, band, options);
      const Stage stage(shared + turn % kNumStages * kSizeStage);
      map.stay_packed();
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage has arrived, and the previous one is no longer read
      if (kNumStages > 1) load(turn + 1, following);
      ptx::cp_async_commit();

      Options here = options;
      here.enter(BatchedSequences::sequence(problem, step.batch), step.head);
      here.template look_at<kBlockM, kBlockN>(stage.pairs, step.first_query(), step.first_key());
      const BiasPairs<Options> pairs = {here, band, problem.softmax_scale};
      const int warp_row = warp * kWarpM, first_query = step.first_query() + warp_row, first_key = step.first_key();
      WarpTile<Number, kTilesM, kTilesN> acc_s, acc_dp;
      acc_s.clear();
      acc_s.template add_product<kHeadDim, Stored::kTransposed>(stage.q + warp_row * kPitch, kPitch, stage.k, kPitch);
      acc_dp.clear();
      acc_dp.template add_product<kHeadDimV, Stored::kTransposed>(stage.dout + warp_row * kPitchV, kPitchV, stage.v,
                                                                  kPitchV);
      const FragmentSurvivors<Number, kTilesM, kTilesN, Options> survives(map, here, first_query, first_key);
      acc_dbias.for_each([&](float& sum, int m, int n, int i) {
        const int row = 16 * m + map.row(i), query = first_query + row, key = first_key + 16 * n + map.col(i);
        const PairGradient pair = pair_gradient<sizeof(Element) == 4>(
            pairs, acc_s.tile[m][n].x[i], acc_dp.tile[m][n].x[i], stage.lse[warp_row + row],
            stage.delta[warp_row + row], query, key, survives(m, n, i));
        if (query < band.seqlen_q && pairs.visible(query, key)) sum += pair.dscore;
      });
      if (kNumStages == 1) {
        __syncthreads();  // the only stage is no longer read
        load(turn + 1, following);
        ptx::cp_async_commit();
      }
      step = following;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // no stage is read any more: the sums take their place

    float* const sums = reinterpret_cast<float*>(shared);
    acc_dbias.for_each([&](float& sum, int m, int n, int i) {
      sums[(warp * kWarpM + 16 * m + map.row(i)) * Walk::kPitch + 16 * n + map.col(i)] = sum;
    });
    __syncthreads();
    walk.template write<kNumWarps>(arrays.dbias, params, sums);
  }
};

}  // namespace cuflash
