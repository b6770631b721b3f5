// FlashAttention-2 backward on nvcuda::wmma fragments: the gradient of Q.
#pragma once

#include <cuflash/attention/recompute.cuh>
#include <cuflash/attention/softmax.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/non_finite.cuh>

namespace cuflash {

// A block owns kBlockM queries of one head and walks over the keys they see, in tiles of kBlockN. Each warp owns
// kBlockM / kNumWarps rows. Apart from the gradients of K and V, so that no sum is spread over blocks and the result is
// bitwise the same in every run.
template <class Number, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kNumWarps, int kNumStages>
struct BwdWmmaDq {
  using Element = typename Number::Element;
  using Map = FragmentMap<Number>;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kWarpM = kBlockM / kNumWarps;
  static constexpr int kTilesM = kWarpM / 16;
  static constexpr int kTilesN = kBlockN / 16;

  static constexpr int kPitch = padded<Element>(kHeadDim);
  static constexpr int kPitchV = padded<Element>(kHeadDimV);
  static constexpr int kPitchS = padded<Element>(kBlockN);

  static constexpr int kSizeQ = kBlockM * kPitch * sizeof(Element);
  static constexpr int kSizeDout = kBlockM * kPitchV * sizeof(Element);
  static constexpr int kSizeS = kBlockM * kPitchS * sizeof(Element);
  static constexpr int kSizeRows = 2 * kBlockM * sizeof(float);
  static constexpr int kSizeK = kBlockN * kPitch * sizeof(Element);
  static constexpr int kSizeStage = kSizeK + kBlockN * kPitchV * sizeof(Element);
  static constexpr int kSharedBytes = kSizeQ + kSizeDout + kSizeS + kSizeRows + kNumStages * kSizeStage;

  static_assert(kBlockM % (16 * kNumWarps) == 0 && kBlockN % 16 == 0 && kHeadDim % 16 == 0 && kHeadDimV % 16 == 0);
  static_assert(kSharedBytes >= kNumWarps * Map::kScratchFloats * sizeof(float));

  struct Arrays {
    const Element *q, *k, *v, *dout;
    const float *lse, *delta;
    Element* dq;
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdParams& params) {
    const Problem& problem = params.problem;
    const Band band = problem.band();
    const int num_m_blocks = ceil_div(problem.seqlen_q, kBlockM);
    // Under a causal mask the last rows see the most keys: they start first.
    const int m_block = num_m_blocks - 1 - blockIdx.x % num_m_blocks;
    const int head = blockIdx.x / num_m_blocks % problem.num_heads;
    const int batch = blockIdx.x / num_m_blocks / problem.num_heads;
    const int head_kv = head / problem.group_size();

    const Matrix<const Element> q(arrays.q, params.q, batch, head, problem.seqlen_q, problem.head_dim);
    const Matrix<const Element> k(arrays.k, params.k, batch, head_kv, problem.seqlen_k, problem.head_dim);
    const Matrix<const Element> v(arrays.v, params.v, batch, head_kv, problem.seqlen_k, problem.head_dim_v);
    const Matrix<const Element> dout(arrays.dout, params.dout, batch, head, problem.seqlen_q, problem.head_dim_v);
    const RowStatistics rows(arrays.lse, arrays.delta, params, batch, head);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned char* const shared = dynamic_shared_memory();
    Element* const smem_q = reinterpret_cast<Element*>(shared);
    Element* const smem_dout = reinterpret_cast<Element*>(shared + kSizeQ);
    Element* const smem_ds = reinterpret_cast<Element*>(shared + kSizeQ + kSizeDout);
    float* const smem_lse = reinterpret_cast<float*>(shared + kSizeQ + kSizeDout + kSizeS);
    float* const smem_delta = smem_lse + kBlockM;
    unsigned char* const stages = shared + kSizeQ + kSizeDout + kSizeS + kSizeRows;
    const auto stage_k = [&](int n) { return reinterpret_cast<Element*>(stages + n % kNumStages * kSizeStage); };
    const auto stage_v = [&](int n) {
      return reinterpret_cast<Element*>(stages + n % kNumStages * kSizeStage + kSizeK);
    };

    const int block_row = m_block * kBlockM;
    const int warp_row = block_row + warp * kWarpM;
    const Range keys = band.keys_of({block_row, block_row + kBlockM});
    const int n_begin = keys.begin / kBlockN, n_end = ceil_div(keys.end, kBlockN);
    Element* const warp_q = smem_q + warp * kWarpM * kPitch;
    Element* const warp_dout = smem_dout + warp * kWarpM * kPitchV;
    Element* const warp_ds = smem_ds + warp * kWarpM * kPitchS;
    const float* const warp_lse = smem_lse + warp * kWarpM;
    const float* const warp_delta = smem_delta + warp * kWarpM;

    Map map(reinterpret_cast<float*>(shared) + warp * Map::kScratchFloats);
    __syncthreads();  // the map's scratch is no longer read

    const auto load = [&](int n) {
      load_tile<kBlockN, kHeadDim, kNumThreads>(stage_k(n), k, n * kBlockN);
      load_tile<kBlockN, kHeadDimV, kNumThreads>(stage_v(n), v, n * kBlockN);
    };
    load_tile<kBlockM, kHeadDim, kNumThreads>(smem_q, q, block_row);
    load_tile<kBlockM, kHeadDimV, kNumThreads>(smem_dout, dout, block_row);
    for (int row = threadIdx.x; row < kBlockM; row += kNumThreads) {
      smem_lse[row] = rows.lse_of(block_row + row);
      smem_delta[row] = rows.delta_of(block_row + row);
    }

    WarpTile<Number, kTilesM, kHeadDim / 16> acc_dq;

    // Values that are not finite spoil rows that do not see them (tile/non_finite.cuh). Then the block starts again.
    for (bool careful = false;; careful = true) {
      if (n_begin < n_end) load(n_begin);
      ptx::cp_async_commit();
      acc_dq.clear();

      for (int n_block = n_begin; n_block < n_end; ++n_block) {
        const int first_key = n_block * kBlockN;
        map.stay_packed();
        ptx::cp_async_wait<0>();
        __syncthreads();  // this stage has arrived, and the previous one is no longer read
        if (kNumStages > 1 && n_block + 1 < n_end) load(n_block + 1);
        ptx::cp_async_commit();

        const bool masked = !band.all_visible({warp_row, warp_row + kWarpM}, {first_key, first_key + kBlockN});
        const auto hide = [&](float& x, int m, int n, int i) {
          if (!band.visible(warp_row + 16 * m + map.row(i), first_key + 16 * n + map.col(i))) x = 0.0f;
        };
        WarpTile<Number, kTilesM, kTilesN> acc_s, acc_dp;
        acc_s.clear();
        acc_s.template add_product<kHeadDim, Stored::kTransposed>(warp_q, kPitch, stage_k(n_block), kPitch);
        acc_s.for_each([&](float& x, int m, int, int i) {
          x = softmax_weight(x * problem.softmax_scale, warp_lse[16 * m + map.row(i)]);
        });
        if (masked) acc_s.for_each(hide);
        acc_dp.clear();
        acc_dp.template add_product<kHeadDimV, Stored::kTransposed>(warp_dout, kPitchV, stage_v(n_block), kPitchV);
        acc_dp.for_each([&](float& x, int m, int n, int i) {
          x = score_gradient(acc_s.tile[m][n].x[i], x, warp_delta[16 * m + map.row(i)]);
        });
        if (masked) acc_dp.for_each(hide);
        map.store(warp_ds, kPitchS, acc_dp);
        __syncwarp();  // dS is visible to its warp
        if (careful) {
          add_non_finite<kBlockN>(acc_dq, map, warp_ds, kPitchS, stage_k(n_block), kPitch,
                                  [&](int row, int key) { return band.visible(warp_row + row, first_key + key); });
          clear_non_finite<kBlockN, kHeadDim, kNumThreads>(stage_k(n_block));
        }
        acc_dq.template add_product<kBlockN, Stored::kByRows>(warp_ds, kPitchS, stage_k(n_block), kPitch);
        __syncwarp();  // dS is no longer read

        if (kNumStages == 1 && n_block + 1 < n_end) {
          __syncthreads();  // the only stage is no longer read
          load(n_block + 1);
          ptx::cp_async_commit();
        }
      }
      ptx::cp_async_wait<0>();
      if (!__syncthreads_or(!careful && acc_dq.has_non_finite())) break;
    }

    // Q is no longer read: the result takes its place.

    acc_dq.for_each([&](float& x, int, int, int) { x *= problem.softmax_scale; });
    map.store(warp_q, kPitch, acc_dq);
    __syncwarp();
    const Matrix<Element> dq(arrays.dq, params.dq, batch, head, problem.seqlen_q, problem.head_dim);
    store_tile<kWarpM, kHeadDim, 32>(dq, warp_row, warp_q, lane);
  }
};

}  // namespace cuflash
