// FlashAttention-2 forward on nvcuda::wmma fragments.
#pragma once

#include <cuflash/attention/fragment_survivors.cuh>
#include <cuflash/attention/options.cuh>
#include <cuflash/attention/softmax.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/non_finite.cuh>

namespace cuflash {

// A block computes kBlockM rows of one head's output: it keeps their Q in shared memory, walks over K and V in tiles
// of kBlockN keys, and never holds more than one tile of scores. Each warp owns kBlockM / kNumWarps rows.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kNumWarps>
struct FwdWmma {
  using Element = typename Number::Element;
  using Map = FragmentMap<Number>;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kWarpM = kBlockM / kNumWarps;
  static constexpr int kTilesM = kWarpM / 16;
  static constexpr int kTilesN = kBlockN / 16;
  static constexpr int kTilesV = kHeadDimV / 16;

  static constexpr int kPitchK = padded<Element>(kHeadDim);
  static constexpr int kPitchV = padded<Element>(kHeadDimV);
  static constexpr int kPitchP = padded<Element>(kBlockN);

  static constexpr int kSizeQ = kBlockM * kPitchK * sizeof(Element);
  static constexpr int kSizeK = kBlockN * kPitchK * sizeof(Element);
  static constexpr int kSizeV = kBlockN * kPitchV * sizeof(Element);
  // A warp's P, and before it the scratch of row reductions.
  static constexpr int kSizeP = larger(kWarpM * kPitchP * sizeof(Element), Map::kScratchFloats * sizeof(float));
  static constexpr int kSizePairs = Options::template kTileBytes<kBlockM, kBlockN>;
  static constexpr int kSharedBytes = kSizeQ + kSizeK + kSizeV + kNumWarps * kSizeP + kSizePairs;

  static_assert(kHeadDimV <= kHeadDim, "the output takes the place of Q");
  static_assert(kBlockM % (16 * kNumWarps) == 0 && kBlockN % 16 == 0 && kHeadDim % 16 == 0 && kHeadDimV % 16 == 0);

  struct Arrays {
    const Element *q, *k, *v;
    Element* out;
    float* lse;  // may be null
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const FwdParams& params, Options options) {
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

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned char* const shared = dynamic_shared_memory();
    Element* const smem_q = reinterpret_cast<Element*>(shared);
    Element* const smem_k = reinterpret_cast<Element*>(shared + kSizeQ);
    Element* const smem_v = reinterpret_cast<Element*>(shared + kSizeQ + kSizeK);
    unsigned char* const warp_memory = shared + kSizeQ + kSizeK + kSizeV + warp * kSizeP;
    Element* const smem_p = reinterpret_cast<Element*>(warp_memory);
    float* const scratch = reinterpret_cast<float*>(warp_memory);
    unsigned char* const smem_pairs = shared + kSizeQ + kSizeK + kSizeV + kNumWarps * kSizeP;
    Element* const warp_q = smem_q + warp * kWarpM * kPitchK;

    const int warp_row = block_row + warp * kWarpM;
    const Range warp_queries = {warp_row, warp_row + kWarpM};
    const Range keys = band.keys_of({block_row, block_row + kBlockM});
    const int n_end = ceil_div(keys.end, kBlockN);
    const auto keys_of = [](int n_block) { return Range{n_block * kBlockN, (n_block + 1) * kBlockN}; };
    const auto skip_hidden = [&](int n_block) {
      if constexpr (Options::kSkipsBlocks) {
        for (Options there = options; n_block < n_end; ++n_block) {
          there.template look_at<kBlockM, kBlockN>(smem_pairs, block_row, n_block * kBlockN);
          if (!there.hides_all()) break;
        }
      }
      return n_block;
    };
    const auto load_keys = [&](int n_block) {
      if (n_block >= n_end) return;
      load_tile<kBlockN, kHeadDim, kNumThreads>(smem_k, k, n_block * kBlockN);
      options.template load<kBlockM, kBlockN, kNumThreads>(smem_pairs, block_row, n_block * kBlockN);
    };
    const int n_begin = skip_hidden(keys.begin / kBlockN);
    const Pairs<Options> pairs = {options, band, problem.softmax_scale};

    load_tile<kBlockM, kHeadDim, kNumThreads>(smem_q, q, block_row);
    Map map(scratch);
    OnlineSoftmax<> softmax[kTilesM];      // of row lane / 2 of each tile
    WarpTile<Number, kTilesM, 1> row_sum;  // still to be summed along each row
    WarpTile<Number, kTilesM, kTilesV> acc_o;

    // Values that are not finite spoil rows that do not see them (tile/non_finite.cuh). Then the block starts again.
    for (bool careful = false;; careful = true) {
      load_keys(n_begin);
      ptx::cp_async_commit();
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) softmax[m] = OnlineSoftmax<>();
      row_sum.clear();
      acc_o.clear();

      for (int n_block = n_begin, following; n_block < n_end; n_block = following) {
        following = skip_hidden(n_block + 1);
        const int first_key = n_block * kBlockN;
        options.template look_at<kBlockM, kBlockN>(smem_pairs, block_row, first_key);
        map.stay_packed();
        ptx::cp_async_wait<0>();
        __syncthreads();  // K has arrived, and the previous V is no longer read
        load_tile<kBlockN, kHeadDimV, kNumThreads>(smem_v, v, first_key);
        ptx::cp_async_commit();

        WarpTile<Number, kTilesM, kTilesN> acc_s;
        acc_s.clear();
        acc_s.template add_product<kHeadDim, Stored::kTransposed>(warp_q, kPitchK, smem_k, kPitchK);

        float unit = 1.0f;  // of the scores of this tile, left to the softmax
        use_pairs(pairs, acc_s, [&](const auto& pairs) {
          acc_s.for_each([&](float& score, int m, int n, int i) {
            const int query = warp_row + 16 * m + map.row(i), key = first_key + 16 * n + map.col(i);
            score = pairs.score_over_factor(score, query, key).value;
          });
          unit = pairs.factor();
        });
        pairs.each_mask(warp_queries, keys_of(n_block), [&](const auto& visible) {
          acc_s.for_each([&](float& score, int m, int n, int i) {
            if (!visible(warp_row + 16 * m + map.row(i), first_key + 16 * n + map.col(i))) score = -infinity();
          });
        });

#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          Accumulator<Number> maxima = acc_s.tile[m][0];
#pragma unroll
          for (int n = 1; n < kTilesN; ++n) {
#pragma unroll
            for (int i = 0; i < Map::kNumElements; ++i) maxima.x[i] = fmaxf(maxima.x[i], acc_s.tile[m][n].x[i]);
          }
          const float tile_max = map.reduce_rows(maxima, scratch, [](float x, float y) { return fmaxf(x, y); });
          const float factor = softmax[m].rescale(tile_max * unit), shift = softmax[m].shift();
          if (__any_sync(kFullMask, factor != 1.0f)) {
#pragma unroll
            for (int i = 0; i < Map::kNumElements; ++i) {
              const float row_factor = map.of_row(factor, i);
              row_sum.tile[m][0].x[i] *= row_factor;
#pragma unroll
              for (int d = 0; d < kTilesV; ++d) acc_o.tile[m][d].x[i] *= row_factor;
            }
          }
#pragma unroll
          for (int i = 0; i < Map::kNumElements; ++i) {
            const float row_shift = map.of_row(shift, i);
#pragma unroll
            for (int n = 0; n < kTilesN; ++n) {
              float& weight = acc_s.tile[m][n].x[i];
              weight = softmax_weight(weight, row_shift, unit);
              row_sum.tile[m][0].x[i] += weight;
            }
          }
        }
        const FragmentSurvivors<Number, kTilesM, kTilesN, Options> survives(map, options, warp_row, first_key);
        acc_s.for_each([&](float& weight, int m, int n, int i) {
          if (!survives(m, n, i)) weight = 0.0f;
        });
        map.store(smem_p, kPitchP, acc_s);

        ptx::cp_async_wait<0>();
        __syncthreads();  // V has arrived, P is visible to its warp, and K is no longer read
        if (careful) {
          add_non_finite<kBlockN>(acc_o, map, smem_p, kPitchP, smem_v, kPitchV,
                                  [&](int row, int key) { return pairs.visible(warp_row + row, first_key + key); });
          clear_non_finite<kBlockN, kHeadDimV, kNumThreads>(smem_v);
        }
        load_keys(following);
        ptx::cp_async_commit();
        acc_o.template add_product<kBlockN, Stored::kByRows>(smem_p, kPitchP, smem_v, kPitchV);
        __syncwarp();  // P is no longer read
      }
      ptx::cp_async_wait<0>();  // without any key, Q is still on its way
      if (!__syncthreads_or(!careful && acc_o.has_non_finite())) break;
    }

#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      float sum = map.reduce_rows(row_sum.tile[m][0], scratch, [](float x, float y) { return x + y; });
      float factor = options.survivor_factor();
      if constexpr (Options::kHasSinks) factor *= softmax[m].join(options.sink(), sum);
      const float inverse = sum == 0.0f ? 0.0f : factor / sum;
#pragma unroll
      for (int i = 0; i < Map::kNumElements; ++i) {
        const float row_inverse = map.of_row(inverse, i);
#pragma unroll
        for (int d = 0; d < kTilesV; ++d) acc_o.tile[m][d].x[i] *= row_inverse;
      }
      const int row = warp_row + 16 * m + lane / 2;
      if (arrays.lse != nullptr && lane % 2 == 0 && row < sequence.seqlen_q) {
        *Matrix<float>(arrays.lse, params.lse, batch, head, sequence.first_query).at(row, 0) = softmax[m].lse(sum);
      }
    }
    const Matrix<Element> out(arrays.out, params.out, batch, head, sequence.first_query, sequence.seqlen_q,
                              problem.head_dim_v);
    // Through the place of Q, which no warp reads since the barrier above, to whole rows in memory.
    Element* const warp_o = smem_q + warp * kWarpM * kPitchV;
    map.store(warp_o, kPitchV, acc_o);
    __syncwarp();
    store_tile<kWarpM, kHeadDimV, 32>(out, warp_row, warp_o, lane);
  }
};

}  // namespace cuflash
