// FlashAttention-2 backward on nvcuda::wmma fragments: the gradient of Q.
#pragma once

#include <cuflash/attention/fragment_survivors.cuh>
#include <cuflash/attention/recompute.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/non_finite.cuh>

namespace cuflash {

// A block owns kBlockM queries of one head and walks over the keys they see, in tiles of kBlockN. The warps form a
// grid: kWarpsM of them share the queries, kWarpsD the keys of a tile of scores, and then the columns of dQ. Apart from
// the gradients of K and V, so that no sum is spread over blocks and the result is bitwise the same in every run.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kWarpsM, int kWarpsD,
          int kNumStages>
struct BwdWmmaDq {
  using Element = typename Number::Element;
  using Map = FragmentMap<Number>;

  static constexpr int kNumThreads = 32 * kWarpsM * kWarpsD;
  static constexpr int kWarpM = kBlockM / kWarpsM;
  static constexpr int kTilesM = kWarpM / 16;
  // Where there are fewer tiles of keys than warps to share them, the other warps wait.
  static constexpr int kScoreWarps = smaller(kWarpsD, kBlockN / 16);
  static constexpr int kScoreN = kBlockN / kScoreWarps;
  static constexpr int kTilesN = kScoreN / 16;
  static constexpr int kWarpCols = kHeadDim / kWarpsD;

  static constexpr int kPitch = padded<Element>(kHeadDim);
  static constexpr int kPitchV = padded<Element>(kHeadDimV);
  static constexpr int kPitchS = padded<Element>(kBlockN);

  static constexpr int kSizeQ = kBlockM * kPitch * sizeof(Element);
  static constexpr int kSizeDout = kBlockM * kPitchV * sizeof(Element);
  static constexpr int kSizeS = kBlockM * kPitchS * sizeof(Element);
  static constexpr int kSizeRows = 2 * kBlockM * sizeof(float);
  static constexpr int kSizeK = kBlockN * kPitch * sizeof(Element);
  static constexpr int kSizeV = kBlockN * kPitchV * sizeof(Element);
  static constexpr int kSizeStage = kSizeK + kSizeV + Options::template kTileBytes<kBlockM, kBlockN>;
  static constexpr int kSharedBytes = kSizeQ + kSizeDout + kSizeS + kSizeRows + kNumStages * kSizeStage;

  static_assert(kBlockM % (16 * kWarpsM) == 0 && kBlockN % (16 * kScoreWarps) == 0);
  static_assert(kHeadDim % (16 * kWarpsD) == 0 && kHeadDimV % 16 == 0);
  static_assert(kSharedBytes >= kWarpsM * kWarpsD * Map::kScratchFloats * sizeof(float));

  struct Arrays {
    const Element *q, *k, *v, *dout;
    const float *lse, *delta;
    Element* dq;
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params, Options options) {
    const Problem& problem = params.problem;
    const Job job = options.template query_job<kBlockM>(problem, blockIdx.x);
    const Sequence& sequence = job.sequence;
    const int block_row = job.tile * kBlockM;
    if (block_row >= sequence.seqlen_q || job.tile < 0) return;
    const int batch = sequence.batch, head = job.head, head_kv = head / problem.group_size();
    const Band band = problem.band(sequence.seqlen_q, sequence.seqlen_k);
    options.enter(sequence, head);

    const Matrix<const Element> q(arrays.q, params.q, batch, head, sequence.first_query, sequence.seqlen_q,
                                  problem.head_dim);
    const Matrix<const Element> k(arrays.k, params.k, batch, head_kv, sequence.first_key, sequence.seqlen_k,
                                  problem.head_dim);
    const Matrix<const Element> v(arrays.v, params.v, batch, head_kv, sequence.first_key, sequence.seqlen_k,
                                  problem.head_dim_v);
    const Matrix<const Element> dout(arrays.dout, params.dout, batch, head, sequence.first_query, sequence.seqlen_q,
                                     problem.head_dim_v);
    const RowStatistics rows(arrays.lse, arrays.delta, params, sequence, head);

    const int warp = threadIdx.x / 32, warp_m = warp / kWarpsD, warp_d = warp % kWarpsD;
    unsigned char* const shared = dynamic_shared_memory();
    Element* const smem_q = reinterpret_cast<Element*>(shared);
    Element* const smem_dout = reinterpret_cast<Element*>(shared + kSizeQ);
    Element* const smem_ds = reinterpret_cast<Element*>(shared + kSizeQ + kSizeDout);
    float* const smem_lse = reinterpret_cast<float*>(shared + kSizeQ + kSizeDout + kSizeS);
    float* const smem_delta = smem_lse + kBlockM;
    unsigned char* const stages = shared + kSizeQ + kSizeDout + kSizeS + kSizeRows;
    // The tiles of keys take turns with the stages.
    const auto stage_at = [&](int turn) { return stages + turn % kNumStages * kSizeStage; };
    const auto stage_k = [&](int turn) { return reinterpret_cast<Element*>(stage_at(turn)); };
    const auto stage_v = [&](int turn) { return reinterpret_cast<Element*>(stage_at(turn) + kSizeK); };
    const auto stage_pairs = [&](int turn) { return stage_at(turn) + kSizeK + kSizeV; };

    const int warp_row = block_row + warp_m * kWarpM;
    const Range warp_queries = {warp_row, warp_row + kWarpM};
    const Range keys = band.keys_of({block_row, block_row + kBlockM});
    const int n_end = ceil_div(keys.end, kBlockN);
    const auto skip_hidden = [&](int n_block) {
      if constexpr (Options::kSkipsBlocks) {
        for (Options there = options; n_block < n_end; ++n_block) {
          there.template look_at<kBlockM, kBlockN>(shared, block_row, n_block * kBlockN);
          if (!there.hides_all()) break;
        }
      }
      return n_block;
    };
    const int n_begin = skip_hidden(keys.begin / kBlockN);
    const Pairs<Options> pairs = {options, band, problem.softmax_scale};
    Element* const warp_q = smem_q + warp_m * kWarpM * kPitch;
    Element* const warp_dout = smem_dout + warp_m * kWarpM * kPitchV;
    Element* const warp_ds = smem_ds + warp_m * kWarpM * kPitchS;
    const float* const warp_lse = smem_lse + warp_m * kWarpM;
    const float* const warp_delta = smem_delta + warp_m * kWarpM;

    Map map(reinterpret_cast<float*>(shared) + warp * Map::kScratchFloats);
    __syncthreads();  // the map's scratch is no longer read

    const auto load = [&](int turn, int n_block) {
      load_tile<kBlockN, kHeadDim, kNumThreads>(stage_k(turn), k, n_block * kBlockN);
      load_tile<kBlockN, kHeadDimV, kNumThreads>(stage_v(turn), v, n_block * kBlockN);
      options.template load<kBlockM, kBlockN, kNumThreads>(stage_pairs(turn), block_row, n_block * kBlockN);
    };
    load_tile<kBlockM, kHeadDim, kNumThreads>(smem_q, q, block_row);
    load_tile<kBlockM, kHeadDimV, kNumThreads>(smem_dout, dout, block_row);
    for (int row = threadIdx.x; row < kBlockM; row += kNumThreads) {
      smem_lse[row] = rows.lse_of(block_row + row);
      smem_delta[row] = rows.delta_of(block_row + row);
    }

    WarpTile<Number, kTilesM, kWarpCols / 16> acc_dq;

    // Values that are not finite spoil rows that do not see them (tile/non_finite.cuh). Then the block starts again.
    for (bool careful = false;; careful = true) {
      if (n_begin < n_end) load(0, n_begin);
      ptx::cp_async_commit();
      acc_dq.clear();

      for (int n_block = n_begin, turn = 0, following; n_block < n_end; n_block = following, ++turn) {
        following = skip_hidden(n_block + 1);
        const int first_key = n_block * kBlockN;
        options.template look_at<kBlockM, kBlockN>(stage_pairs(turn), block_row, first_key);
        map.stay_packed();
        ptx::cp_async_wait<0>();
        __syncthreads();  // this stage has arrived, and the previous one and dS are no longer read
        if (kNumStages > 1 && following < n_end) load(turn + 1, following);
        ptx::cp_async_commit();

        if (warp_d < kScoreWarps) {
          const int col = warp_d * kScoreN, warp_key = first_key + col;
          WarpTile<Number, kTilesM, kTilesN> acc_s, acc_dp;
          acc_s.clear();
          acc_s.template add_product<kHeadDim, Stored::kTransposed>(warp_q, kPitch, stage_k(turn) + col * kPitch,
                                                                    kPitch);
          acc_dp.clear();
          acc_dp.template add_product<kHeadDimV, Stored::kTransposed>(warp_dout, kPitchV, stage_v(turn) + col * kPitchV,
                                                                      kPitchV);
          const FragmentSurvivors<Number, kTilesM, kTilesN, Options> survives(map, options, warp_row, warp_key);
          use_pairs(pairs, acc_s, [&](const auto& pairs) {
            acc_dp.for_each([&](float& x, int m, int n, int i) {
              const int row = 16 * m + map.row(i), key = warp_key + 16 * n + map.col(i);
              x = pair_gradient<sizeof(Element) == 4>(pairs, acc_s.tile[m][n].x[i], x, warp_lse[row], warp_delta[row],
                                                      warp_row + row, key, survives(m, n, i))
                      .dscore;
            });
          });
          pairs.each_mask(warp_queries, {warp_key, warp_key + kScoreN}, [&](const auto& visible) {
            acc_dp.for_each([&](float& x, int m, int n, int i) {
              if (!visible(warp_row + 16 * m + map.row(i), warp_key + 16 * n + map.col(i))) x = 0.0f;
            });
          });
          map.store(warp_ds + col, kPitchS, acc_dp);
        }
        if constexpr (kWarpsD == 1) {
          __syncwarp();  // dS is visible to the warp that wrote it
        } else {
          __syncthreads();
        }
        const Element* const cols_k = stage_k(turn) + warp_d * kWarpCols;
        if (careful) {
          add_non_finite<kBlockN>(acc_dq, map, warp_ds, kPitchS, cols_k, kPitch,
                                  [&](int row, int key) { return pairs.visible(warp_row + row, first_key + key); });
          clear_non_finite<kBlockN, kHeadDim, kNumThreads>(stage_k(turn));
        }
        acc_dq.template add_product<kBlockN, Stored::kByRows>(warp_ds, kPitchS, cols_k, kPitch);
        if (kNumStages == 1 && following < n_end) {
          __syncthreads();  // the only stage is no longer read
          load(turn + 1, following);
          ptx::cp_async_commit();
        }
      }
      ptx::cp_async_wait<0>();
      if (!__syncthreads_or(!careful && acc_dq.has_non_finite())) break;
    }

    // Q is no longer read: the result takes its place.

    acc_dq.for_each([&](float& x, int, int, int) { x *= problem.softmax_scale; });
    map.store(warp_q + warp_d * kWarpCols, kPitch, acc_dq);
    __syncthreads();
    const Matrix<Element> dq(arrays.dq, params.dq, batch, head, sequence.first_query, sequence.seqlen_q,
                             problem.head_dim);
    store_tile<kBlockM, kHeadDim, kNumThreads>(dq, block_row, smem_q, threadIdx.x);
  }
};

}  // namespace cuflash
