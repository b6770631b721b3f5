// FlashAttention-2 forward (arXiv:2307.08691) on mma.sync, ldmatrix and cp.async: scores, weights and output stay in
// registers. docs/kernels.md draws it.
#pragma once

#include <cuflash/attention/careful_row.cuh>
#include <cuflash/attention/key_blocks.cuh>
#include <cuflash/attention/register_softmax.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/mma_product.cuh>
#include <cuflash/tile/row_store.cuh>

namespace cuflash {

// A block computes kBlockM rows of one head's output: it walks over the keys in tiles of kBlockN, from the last to the
// first. A warp owns kBlockM / kNumWarps rows, in tiles of 16: more than one read K and V less often. With kStages > 1
// the copies of a tile have the time of kStages - 1 others to arrive, and the block meets once a tile; with one stage
// V arrives during Q K^T, and the next K during P V. kKeepsQ holds the factors of Q in registers.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kNumWarps,
          int kStages, bool kKeepsQ>
struct FwdSm80 {
  using Element = typename Number::Element;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kWarpM = kBlockM / kNumWarps;
  static constexpr int kTilesM = kWarpM / 16;

  using Scores = WarpgroupTile<kBlockN>;  // the 16 rows of a warp lie in registers as after wgmma
  using Weights = WarpgroupFactor<Element, kBlockN>;
  using Output = WarpgroupTile<kHeadDimV>;
  using TileQ = LdmatrixTile<Element, kBlockM, kHeadDim>;
  using TileK = LdmatrixTile<Element, kBlockN, kHeadDim>;
  using TileV = LdmatrixTile<Element, kBlockN, kHeadDimV>;
  using Blocks = KeyBlocks<kBlockM, kBlockN>;
  using Careful = CarefulHead<Element, Options>;

  static constexpr int kPairBytes = Options::template kTileBytes<kBlockM, kBlockN>;
  struct alignas(16) TileOfArrays {
    unsigned char memory[larger(kPairBytes, 16)];
  };
  struct Shared {
    TileQ q;
    TileK k[kStages];
    TileV v[kStages];
    TileOfArrays pairs[kStages];
    typename Careful::Memory careful[kNumWarps];
  };
  // Without the padding at the end of the struct.
  static constexpr int kSharedBytes = sizeof(TileQ) + kStages * (sizeof(TileK) + sizeof(TileV) + sizeof(TileOfArrays)) +
                                      sizeof(Shared::careful);
  // Kernels multiply by the scale only after the maxima of products, as long as it is positive and not a denormal.
  static constexpr float kMinScale = 1.17549435e-38f;

  static_assert(kBlockM % (16 * kNumWarps) == 0 && kBlockN % 16 == 0 && kStages >= 1);

  struct Arrays {
    const Element *q, *k, *v;
    Element* out;
    float* lse;  // may be null
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const FwdParams& params, Options options) {
    const Problem& problem = params.problem;
    const Job job = options.template query_job<kBlockM>(problem, blockIdx.x);
    const Sequence& sequence = job.sequence;
    const int block_query = job.tile * kBlockM;
    if (block_query >= sequence.seqlen_q || job.tile < 0) return;
    const int batch = sequence.batch, head_kv = job.head / problem.group_size();
    const Band band = problem.band(sequence.seqlen_q, sequence.seqlen_k);
    options.enter(sequence, job.head);
    const Pairs<Options> pairs = {options, band, problem.softmax_scale};

    const Matrix<const Element> q(arrays.q, params.q, batch, job.head, sequence.first_query, sequence.seqlen_q,
                                  problem.head_dim);
    const Matrix<const Element> k(arrays.k, params.k, batch, head_kv, sequence.first_key, sequence.seqlen_k,
                                  problem.head_dim);
    const Matrix<const Element> v(arrays.v, params.v, batch, head_kv, sequence.first_key, sequence.seqlen_k,
                                  problem.head_dim_v);

    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    const int warp_query = block_query + warp * kWarpM;
    const int first_query = warp_query + lane / 4, first_col = lane % 4 * 2;
    const Blocks blocks(band, block_query, {block_query, block_query + kBlockM});
    const auto next = [&](int block) { return Blocks::visited(options, block_query, block - 1, blocks.begin); };

    const auto load_keys = [&](int stage, int block) {
      shared.k[stage].template load<kNumThreads>(k, block * kBlockN);
      options.template load<kBlockM, kBlockN, kNumThreads>(shared.pairs[stage].memory, block_query, block * kBlockN);
    };
    const auto load_values = [&](int stage, int block) {
      shared.v[stage].template load<kNumThreads>(v, block * kBlockN);
    };
    int block = next(blocks.end), ahead = block;  // at hand, and the next to be loaded
    int stage = 0, stage_ahead = 0;               // that hold them
    const auto advance = [](int& stage) { stage = stage + 1 == kStages ? 0 : stage + 1; };
    const auto load_ahead = [&] {
      if (ahead >= blocks.begin) {
        load_keys(stage_ahead, ahead);
        if (kStages > 1) load_values(stage_ahead, ahead);
        ahead = next(ahead);
        advance(stage_ahead);
      }
      ptx::cp_async_commit();
    };
    shared.q.template load<kNumThreads>(q, block_query);
#pragma unroll
    for (int i = 0; i < larger(1, kStages - 1); ++i) load_ahead();

    Scores scores[kTilesM];
    Weights weights[kTilesM];
    Output output[kTilesM];
    RowPair rows[kTilesM];
    float factor[kTilesM][2];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) output[m].clear();

    const TileReader<TileQ> reader_q;
    unsigned kept_q[kKeepsQ ? kHeadDim / 16 : 1][kTilesM][4];
    const auto load_q = [&](unsigned(&x)[4], int m, int col) {
      if constexpr (kKeepsQ) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = kept_q[col / 16][m][i];
      } else {
        reader_q.load(x, shared.q, warp * kWarpM + 16 * m, col);
      }
    };
    if constexpr (kKeepsQ) {
      ptx::cp_async_wait<0>();
      __syncthreads();
#pragma unroll
      for (int col = 0; col < kHeadDim; col += 16) {
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) reader_q.load(kept_q[col / 16][m], shared.q, warp * kWarpM + 16 * m, col);
      }
    }

    // One tile of keys. A warp whose rows see nothing of it only helps to load.
    const auto visit = [&](bool sees, const auto& hide_by_band) {
      ptx::cp_async_wait<larger(0, kStages - 2)>();
      __syncthreads();  // this stage has arrived, and the one before is no longer read
      if constexpr (kStages > 1) {
        load_ahead();
      } else {
        load_values(0, block);
        ptx::cp_async_commit();
      }
      float scale = pairs.scale;
      if (sees) {
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) scores[m].clear();
        add_product_along<kHeadDim>(scores, load_q, shared.k[stage]);
        options.template look_at<kBlockM, kBlockN>(shared.pairs[stage].memory, block_query, block * kBlockN);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          const TileOfPairs<Options> tile = {pairs, first_query + 16 * m, block * kBlockN + first_col};
          scale = tile.change(scores[m]);
          if (!Options::kChangesScores && pairs.scale < kMinScale) {
            scale = 1.0f;
#pragma unroll
            for (int i = 0; i < Scores::kNumElements; ++i) scores[m].x[i] *= pairs.scale;
          }
          hide_by_band(tile, scores[m]);
          tile.hide_by_options(scores[m]);
        }
      }
      if constexpr (kStages == 1) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // V has arrived, and K is no longer read
        load_ahead();
      }
      if (sees) {
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          rows[m].weigh(scores[m], scale, factor[m]);
          const TileOfPairs<Options> tile = {pairs, first_query + 16 * m, block * kBlockN + first_col};
          tile.drop(scores[m], warp_query + 16 * m, block * kBlockN);
          weights[m].round(scores[m]);
          if (__any_sync(kFullMask, factor[m][0] != 1.0f || factor[m][1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < Output::kNumElements; ++i) output[m].x[i] *= factor[m][row_of_element(i)];
          }
        }
        const auto weights_of = [&](unsigned(&x)[4], int m, int row) {
#pragma unroll
          for (int i = 0; i < 4; ++i) x[i] = weights[m].x[row / 16][i];
        };
        add_product_across<kBlockN>(output, weights_of, shared.v[stage]);
      }
      advance(stage);
    };

    const Range warp_keys = band.keys_of({warp_query, warp_query + kWarpM});
    const auto visit_with_mask = [&] {
      const int first_key = block * kBlockN;
      const bool sees = uniform(warp_query < sequence.seqlen_q && first_key < warp_keys.end &&
                                first_key + kBlockN > warp_keys.begin);
      visit(sees, [](const auto& tile, Scores& scores) { tile.template hide_by_band<Hidden::kAround>(scores); });
    };
    const auto visit_without_mask = [&] { visit(true, [](const auto&, Scores&) {}); };
#pragma unroll 1
    for (; block >= blocks.begin; block = next(block)) {
      if (block < blocks.full_begin || block >= blocks.full_end) {
        visit_with_mask();
      } else {
        visit_without_mask();
      }
    }
    ptx::cp_async_wait<0>();

    const Matrix<Element> out(arrays.out, params.out, batch, job.head, sequence.first_query, sequence.seqlen_q,
                              problem.head_dim_v);
    const bool hides_pairs =
        Options::kHidesPairs || blocks.full_begin > blocks.begin || blocks.full_end < blocks.end;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      float inverse[2], shift[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = rows[m].total(r), survivors = options.survivor_factor();
        shift[r] = rows[m].softmax[r].shift();
        if constexpr (Options::kHasSinks) survivors *= rows[m].softmax[r].join(options.sink(), sum);
        inverse[r] = sum == 0.0f ? 0.0f : __fdividef(survivors, sum);
        const int row = first_query + 16 * m + 8 * r;
        if (arrays.lse != nullptr && lane % 4 == 0 && row < sequence.seqlen_q) {
          *Matrix<float>(arrays.lse, params.lse, batch, job.head, sequence.first_query).at(row, 0) =
              rows[m].softmax[r].lse(sum);
        }
      }
      const bool finite = store_rows(out, output[m], inverse, first_query + 16 * m);
      // 0 * NaN is NaN: where pairs are hidden, values that others see may have spoiled all rows.
      if (hides_pairs && __any_sync(kFullMask, !finite)) {
        __syncwarp();  // others write again what this lane wrote
        const Careful head = {q, k, v, out, options, band, problem.softmax_scale, shared.careful[warp]};
        head.template write_rows<kHeadDimV>(warp_query + 16 * m, shift, inverse);
      }
    }
  }
};

}  // namespace cuflash
