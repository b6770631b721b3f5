// FlashAttention-2 backward on nvcuda::wmma fragments: the gradients of K and V.
#pragma once

#include <cuflash/attention/fragment_survivors.cuh>
#include <cuflash/attention/recompute.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/non_finite.cuh>

namespace cuflash {

// A block owns kBlockN keys of one key/value head and walks over the queries that see them, in tiles of kBlockM, for
// every query head of the group. Scores are computed transposed (keys are rows), so that a query's lse and delta belong
// to a column, and P^T dO and dS^T Q are plain products. The warps form a grid: kWarpsN of them share the keys, kWarpsD
// the queries of a tile of scores, and then the columns of dK and dV.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kWarpsN, int kWarpsD,
          int kNumStages>
struct BwdWmmaDkDv {
  using Element = typename Number::Element;
  using Map = FragmentMap<Number>;

  static constexpr int kNumThreads = 32 * kWarpsN * kWarpsD;
  static constexpr int kWarpN = kBlockN / kWarpsN;
  static constexpr int kTilesN = kWarpN / 16;
  // Where there are fewer tiles of queries than warps to share them, the other warps wait.
  static constexpr int kScoreWarps = smaller(kWarpsD, kBlockM / 16);
  static constexpr int kScoreM = kBlockM / kScoreWarps;
  static constexpr int kTilesM = kScoreM / 16;
  static constexpr int kWarpCols = kHeadDim / kWarpsD, kWarpColsV = kHeadDimV / kWarpsD;

  static constexpr int kPitch = padded<Element>(kHeadDim);
  static constexpr int kPitchV = padded<Element>(kHeadDimV);
  static constexpr int kPitchP = padded<Element>(kBlockM);

  static constexpr int kSizeK = kBlockN * kPitch * sizeof(Element);
  static constexpr int kSizeV = kBlockN * kPitchV * sizeof(Element);
  static constexpr int kSizeQ = kBlockM * kPitch * sizeof(Element);
  static constexpr int kSizeDout = kBlockM * kPitchV * sizeof(Element);
  static constexpr int kSizeP = kBlockN * kPitchP * sizeof(Element);
  static constexpr int kSizeRows = 2 * kBlockM * sizeof(float);
  static constexpr int kSizeStage = kSizeQ + kSizeDout + kSizeRows + Options::template kTileBytes<kBlockM, kBlockN>;
  static constexpr int kSharedBytes = kSizeK + kSizeV + 2 * kSizeP + kNumStages * kSizeStage;

  static_assert(kBlockN % (16 * kWarpsN) == 0 && kBlockM % (16 * kScoreWarps) == 0);
  static_assert(kHeadDim % (16 * kWarpsD) == 0 && kHeadDimV % (16 * kWarpsD) == 0);
  static_assert(kSharedBytes >= kWarpsN * kWarpsD * Map::kScratchFloats * sizeof(float));
  static_assert(kBlockM <= kNumThreads, "one thread fetches the statistics of one row");

  struct Arrays {
    const Element *q, *k, *v, *dout;
    const float *lse, *delta;
    Element *dk, *dv;
  };

  // One tile of queries, as the block sees it in shared memory.
  struct Stage {
    Element *q, *dout;
    float *lse, *delta;
    unsigned char* pairs;

    __device__ __forceinline__ explicit Stage(unsigned char* memory)
        : q(reinterpret_cast<Element*>(memory)),
          dout(reinterpret_cast<Element*>(memory + kSizeQ)),
          lse(reinterpret_cast<float*>(memory + kSizeQ + kSizeDout)),
          delta(lse + kBlockM),
          pairs(memory + kSizeQ + kSizeDout + kSizeRows) {}
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params, Options options) {
    const Problem& problem = params.problem;
    const Job job = options.template key_job<kBlockN>(problem, blockIdx.x);
    const Sequence& sequence = job.sequence;
    const int first_key = job.tile * kBlockN;
    if (first_key >= sequence.num_keys || job.tile < 0) return;
    const int batch = sequence.batch, head_kv = job.head;
    const Band band = problem.band(sequence.seqlen_q, sequence.seqlen_k);

    const Matrix<const Element> k(arrays.k, params.k, batch, head_kv, sequence.first_key, sequence.seqlen_k,
                                  problem.head_dim);
    const Matrix<const Element> v(arrays.v, params.v, batch, head_kv, sequence.first_key, sequence.seqlen_k,
                                  problem.head_dim_v);

    const int warp = threadIdx.x / 32, warp_n = warp / kWarpsD, warp_d = warp % kWarpsD;
    unsigned char* const shared = dynamic_shared_memory();
    Element* const smem_k = reinterpret_cast<Element*>(shared);
    Element* const smem_v = reinterpret_cast<Element*>(shared + kSizeK);
    Element* const smem_p = reinterpret_cast<Element*>(shared + kSizeK + kSizeV);
    Element* const smem_ds = reinterpret_cast<Element*>(shared + kSizeK + kSizeV + kSizeP);
    unsigned char* const stages = shared + kSizeK + kSizeV + 2 * kSizeP;

    const int warp_key = first_key + warp_n * kWarpN;
    const Range queries = band.queries_of({first_key, first_key + kBlockN});
    const int m_begin = queries.begin / kBlockM;
    const int num_m_blocks = larger(0, ceil_div(queries.end, kBlockM) - m_begin);
    const int num_steps = num_m_blocks * problem.group_size();
    const Range warp_keys = {warp_key, warp_key + kWarpN};

    Map map(reinterpret_cast<float*>(shared) + warp * Map::kScratchFloats);
    __syncthreads();  // the map's scratch is no longer read

    // A step is one tile of queries of one head of the group.
    const auto head_of = [&](int step) { return head_kv * problem.group_size() + step / num_m_blocks; };
    const auto first_query_of = [&](int step) { return (m_begin + step % num_m_blocks) * kBlockM; };
    const auto queries_of = [&](int step) { return Range{first_query_of(step), first_query_of(step) + kBlockM}; };
    const auto skip_hidden = [&](int step) {
      if constexpr (Options::kSkipsBlocks) {
        for (; step < num_steps; ++step) {
          Options there = options;
          there.enter(sequence, head_of(step));
          there.template look_at<kBlockM, kBlockN>(shared, first_query_of(step), first_key);
          if (!there.hides_all()) break;
        }
      }
      return step;
    };
    // The tiles take turns with the stages.
    const auto load = [&](int turn, int step) {
      const Stage stage(stages + turn % kNumStages * kSizeStage);
      const int head = head_of(step), first_query = first_query_of(step);
      const Matrix<const Element> q(arrays.q, params.q, batch, head, sequence.first_query, sequence.seqlen_q,
                                    problem.head_dim);
      const Matrix<const Element> dout(arrays.dout, params.dout, batch, head, sequence.first_query, sequence.seqlen_q,
                                       problem.head_dim_v);
      load_tile<kBlockM, kHeadDim, kNumThreads>(stage.q, q, first_query);
      load_tile<kBlockM, kHeadDimV, kNumThreads>(stage.dout, dout, first_query);
      Options there = options;
      there.enter(sequence, head);
      there.template load<kBlockM, kBlockN, kNumThreads>(stage.pairs, first_query, first_key);
      if (threadIdx.x < kBlockM) {
        const RowStatistics rows(arrays.lse, arrays.delta, params, sequence, head);
        stage.lse[threadIdx.x] = rows.lse_of(first_query + threadIdx.x);
        stage.delta[threadIdx.x] = rows.delta_of(first_query + threadIdx.x);
      }
    };

    const int first_step = skip_hidden(0);

    load_tile<kBlockN, kHeadDim, kNumThreads>(smem_k, k, first_key);
    load_tile<kBlockN, kHeadDimV, kNumThreads>(smem_v, v, first_key);
    WarpTile<Number, kTilesN, kWarpCols / 16> acc_dk;
    WarpTile<Number, kTilesN, kWarpColsV / 16> acc_dv;

    // Values that are not finite spoil keys that do not see them (tile/non_finite.cuh). Then the block starts again.
    for (bool careful = false;; careful = true) {
      if (first_step < num_steps) load(0, first_step);
      ptx::cp_async_commit();
      acc_dk.clear();
      acc_dv.clear();

      for (int step = first_step, turn = 0, following; step < num_steps; step = following, ++turn) {
        following = skip_hidden(step + 1);
        const Stage stage(stages + turn % kNumStages * kSizeStage);
        map.stay_packed();
        ptx::cp_async_wait<0>();
        __syncthreads();  // this stage has arrived, and the previous one, P and dS are no longer read
        if (kNumStages > 1 && following < num_steps) load(turn + 1, following);
        ptx::cp_async_commit();

        const int first_query = first_query_of(step);
        Options here = options;
        here.enter(sequence, head_of(step));
        here.template look_at<kBlockM, kBlockN>(stage.pairs, first_query, first_key);
        const Pairs<Options> pairs = {here, band, problem.softmax_scale};
        if (warp_d < kScoreWarps) {
          const int row = warp_n * kWarpN, col = warp_d * kScoreM;
          WarpTile<Number, kTilesN, kTilesM> acc_s, acc_dp;
          acc_s.clear();
          acc_s.template add_product<kHeadDim, Stored::kTransposed>(smem_k + row * kPitch, kPitch,
                                                                    stage.q + col * kPitch, kPitch);
          acc_dp.clear();
          acc_dp.template add_product<kHeadDimV, Stored::kTransposed>(smem_v + row * kPitchV, kPitchV,
                                                                      stage.dout + col * kPitchV, kPitchV);
          const FragmentSurvivors<Number, kTilesN, kTilesM, Options, true> survives(map, here, first_query + col,
                                                                                    warp_key);
          use_pairs(pairs, acc_s, [&](const auto& pairs) {
            acc_s.for_each([&](float& x, int n, int m, int i) {
              float& dp = acc_dp.tile[n][m].x[i];
              const int key = warp_key + 16 * n + map.row(i), query = col + 16 * m + map.col(i);
              const PairGradient pair = pair_gradient<sizeof(Element) == 4>(
                  pairs, x, dp, stage.lse[query], stage.delta[query], first_query + query, key, survives(n, m, i));
              x = pair.weight;
              dp = pair.dscore;
            });
          });
          const auto hide = [&](const auto& visible) {
            acc_s.for_each([&](float& x, int n, int m, int i) {
              if (visible(first_query + col + 16 * m + map.col(i), warp_key + 16 * n + map.row(i))) return;
              x = 0.0f;
              acc_dp.tile[n][m].x[i] = 0.0f;
            });
          };
          if (first_query + kBlockM > band.seqlen_q) hide([&](int query, int) { return query < band.seqlen_q; });
          pairs.each_mask(queries_of(step), warp_keys, hide);
          map.store(smem_p + row * kPitchP + col, kPitchP, acc_s);
          map.store(smem_ds + row * kPitchP + col, kPitchP, acc_dp);
        }
        if constexpr (kWarpsD == 1) {
          __syncwarp();  // P and dS are visible to the warp that wrote them
        } else {
          __syncthreads();
        }
        const Element* const warp_p = smem_p + warp_n * kWarpN * kPitchP;
        const Element* const warp_ds = smem_ds + warp_n * kWarpN * kPitchP;
        const Element* const cols_dout = stage.dout + warp_d * kWarpColsV;
        const Element* const cols_q = stage.q + warp_d * kWarpCols;
        if (careful) {
          const auto visible = [&](int key, int query) {
            return first_query + query < band.seqlen_q && pairs.visible(first_query + query, warp_key + key);
          };
          add_non_finite<kBlockM>(acc_dv, map, warp_p, kPitchP, cols_dout, kPitchV, visible);
          add_non_finite<kBlockM>(acc_dk, map, warp_ds, kPitchP, cols_q, kPitch, visible);
          clear_non_finite<kBlockM, kHeadDimV, kNumThreads>(stage.dout);
          clear_non_finite<kBlockM, kHeadDim, kNumThreads>(stage.q);
        }
        acc_dv.template add_product<kBlockM, Stored::kByRows>(warp_p, kPitchP, cols_dout, kPitchV);
        acc_dk.template add_product<kBlockM, Stored::kByRows>(warp_ds, kPitchP, cols_q, kPitch);
        if (kNumStages == 1 && following < num_steps) {
          __syncthreads();  // the only stage is no longer read
          load(turn + 1, following);
          ptx::cp_async_commit();
        }
      }
      ptx::cp_async_wait<0>();
      if (!__syncthreads_or(!careful && (acc_dk.has_non_finite() || acc_dv.has_non_finite()))) break;
    }

    // K and V are no longer read: the results take their places.

    acc_dk.for_each([&](float& x, int, int, int) { x *= problem.softmax_scale; });
    map.store(smem_k + warp_n * kWarpN * kPitch + warp_d * kWarpCols, kPitch, acc_dk);
    map.store(smem_v + warp_n * kWarpN * kPitchV + warp_d * kWarpColsV, kPitchV, acc_dv);
    __syncthreads();
    const Matrix<Element> dk(arrays.dk, params.dk, batch, head_kv, sequence.first_key, sequence.num_keys,
                             problem.head_dim);
    const Matrix<Element> dv(arrays.dv, params.dv, batch, head_kv, sequence.first_key, sequence.num_keys,
                             problem.head_dim_v);
    store_tile<kBlockN, kHeadDim, kNumThreads>(dk, first_key, smem_k, threadIdx.x);
    store_tile<kBlockN, kHeadDimV, kNumThreads>(dv, first_key, smem_v, threadIdx.x);
  }
};

}  // namespace cuflash
