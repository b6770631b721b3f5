// FlashAttention-2 forward (arXiv:2307.08691) on mma.sync, ldmatrix and cp.async: scores, weights and output stay in
// registers. docs/kernels.md draws it.
#pragma once

#include <cuflash/attention/careful_row.cuh>
#include <cuflash/attention/hidden_pairs.cuh>
#include <cuflash/attention/key_blocks.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/mma_product.cuh>
#include <cuflash/tile/row_store.cuh>

namespace cuflash {

// A block computes kBlockM rows of one head's output: it walks over the keys in tiles of kBlockN, from the last to the
// first. A warp owns kBlockM / kNumWarps rows, in tiles of 16: more than one read K and V less often. With two stages
// the copies of a tile have the time of another to arrive, and the block meets once a tile; with one stage V arrives
// during Q K^T, and the next K during P V. The first kKeptQ columns of Q stay in registers.
// With kHasParts jobs are few, and the blocks of a job share its keys: each writes the result of its part, a float, as
// if there were that many times the heads, for merge_parts.cuh.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kNumWarps,
          int kStages, int kKeptQ, class Result = typename Number::Element, bool kHasParts = false>
struct FwdSm80 {
  using Element = typename Number::Element;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kWarpM = kBlockM / kNumWarps;
  static constexpr int kTilesM = kWarpM / 16;
  static constexpr bool kExact = sizeof(Element) == 4;  // as float32 has to be
  static constexpr int kUnrollScores = unroll_along<Number>(kTilesM, kBlockN, kHeadDim / 16);
  static constexpr int kUnrollOutput = unroll_across<Number>(kHeadDimV, kBlockN / 16);

  using Scores = WarpgroupTile<kBlockN>;  // the 16 rows of a warp lie in registers as after wgmma
  using Weights = WarpgroupFactor<Element, kBlockN>;
  using Output = WarpgroupTile<kHeadDimV>;
  using TileQ = LdmatrixTile<Number, kBlockM, kHeadDim>;
  using TileK = LdmatrixTile<Number, kBlockN, kHeadDim>;
  using TileV = LdmatrixTile<Number, kBlockN, kHeadDimV>;
  using Blocks = KeyBlocks<kBlockM, kBlockN>;
  using Careful = CarefulHead<Element, Options, Result>;

  struct Arrays {
    const Element *q, *k, *v;
    Result* out;
    float* lse;  // may be null; of parts a base and a sum for each row
  };

  // What a block knows of its job. In shared memory, since it is looked at once a tile and registers are few.
  struct alignas(16) Work {
    Matrix<const Element> q, k, v;
    Matrix<Result> out;
    Matrix<float> lse;
    Band band;
    Blocks blocks;
    int first_query;
    float sink;  // that of the head, in one part alone
    Options options;

    __device__ __forceinline__ Work(const Arrays& arrays, const FwdParams& params, const Options& options,
                                    const Job& job, const Part& part)
        : Work(arrays, params, job, job.sequence, job.head / params.problem.group_size(),
               part.number * params.problem.num_heads + job.head) {
      this->options = options;
      this->options.enter(job.sequence, job.head);
      sink = part.number == 0 ? this->options.sink() : -infinity();
      if constexpr (kHasParts) blocks.keep(part);
    }

   private:
    __device__ __forceinline__ Work(const Arrays& arrays, const FwdParams& params, const Job& job,
                                    const Sequence& sequence, int head_kv, int head_out)
        : q(arrays.q, params.q, sequence.batch, job.head, sequence.first_query, sequence.seqlen_q,
            params.problem.head_dim),
          k(arrays.k, params.k, sequence.batch, head_kv, sequence.first_key, sequence.seqlen_k,
            params.problem.head_dim),
          v(arrays.v, params.v, sequence.batch, head_kv, sequence.first_key, sequence.seqlen_k,
            params.problem.head_dim_v),
          out(arrays.out, params.out, sequence.batch, head_out, sequence.first_query, sequence.seqlen_q,
              params.problem.head_dim_v),
          lse(arrays.lse, params.lse, sequence.batch, head_out, sequence.first_query),
          band(params.problem.band(sequence.seqlen_q, sequence.seqlen_k)),
          blocks(band, job.tile * kBlockM, {job.tile * kBlockM, (job.tile + 1) * kBlockM}),
          first_query(job.tile * kBlockM) {}
  };

  static constexpr int kPairBytes = Options::template kTileBytes<kBlockM, kBlockN>;
  struct alignas(16) TileOfArrays {
    unsigned char memory[larger(kPairBytes, 16)];
  };
  struct Shared {
    TileQ q;
    TileK k[kStages];
    TileV v[kStages];
    TileOfArrays pairs[kStages];
    HiddenPairs<Options, kTilesM, kBlockN, kNumThreads> hidden;
    typename Careful::Memory careful[kNumWarps];
    Work work;
  };
  // Without the padding at the end of the struct.
  static constexpr int kSharedBytes = sizeof(TileQ) + kStages * (sizeof(TileK) + sizeof(TileV) + sizeof(TileOfArrays)) +
                                      sizeof(Shared::hidden) + sizeof(Shared::careful) + sizeof(Work);

  static_assert(kBlockM % (16 * kNumWarps) == 0 && kBlockN % 16 == 0 && (kStages == 1 || kStages == 2));

  static __device__ __forceinline__ void run(const Arrays& arrays, const FwdParams& params, Options options) {
    const int num_blocks = gridDim.x, block_index = blockIdx.x;
    const int num_parts = kHasParts ? num_blocks / Options::template num_query_jobs<kBlockM>(params.problem) : 1;
    const Part part = {block_index % num_parts, num_parts};
    const Job job = options.template query_job<kBlockM>(params.problem, block_index / num_parts);
    if (job.tile * kBlockM >= job.sequence.seqlen_q || job.tile < 0) return;

    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    if (threadIdx.x == 0) shared.work = Work(arrays, params, options, job, part);
    __syncthreads();
    const Work& work = shared.work;
    const float scale = params.problem.softmax_scale;
    const int warp_row = threadIdx.x / 32 * kWarpM;

    const auto next = [&](int block) {
      return Blocks::visited(work.options, work.first_query, block - 1, work.blocks.begin).block;
    };
    const auto load_keys = [&](int stage, int block) {
      shared.k[stage].template load<kNumThreads>(work.k, block * kBlockN);
      work.options.template load<kBlockM, kBlockN, kNumThreads>(shared.pairs[stage].memory, work.first_query,
                                                                block * kBlockN);
    };
    const auto load_values = [&](int stage, int block) {
      shared.v[stage].template load<kNumThreads>(work.v, block * kBlockN);
    };
    const auto load = [&](int stage, int block) {
      if (block >= work.blocks.begin) {
        load_keys(stage, block);
        if (kStages > 1) load_values(stage, block);
      }
      ptx::cp_async_commit();
    };
    int block = next(work.blocks.end);
    shared.q.template load<kNumThreads>(work.q, work.first_query);
    load(0, block);

    Scores scores[kTilesM];
    Weights weights[kTilesM];
    Output output[kTilesM];
    RowPair<Element, Options> rows[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) output[m].clear();

    constexpr int kDepth = kMmaDepth<Number>;
    WarpgroupFactor<Element, larger(kKeptQ, kDepth)> kept_q[kTilesM];
    if constexpr (kKeptQ > 0) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      const RowsOf rows_of_q(shared.q, warp_row);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int col = 0; col < kKeptQ; col += kDepth) rows_of_q(kept_q[m].x[col / kDepth], m, col);
      }
    }

    // Whether the rows of this warp see any key of a tile.
    const auto sees_any = [&](int first_key) {
      const int warp_query = work.first_query + warp_row;
      const Range keys = work.band.keys_of({warp_query, warp_query + kWarpM});
      return first_key < keys.end && keys.begin < first_key + kBlockN;
    };
    const auto has_rows = [&] { return work.first_query + warp_row < work.band.seqlen_q; };
#pragma unroll 1
    for (int stage = 0, following; block >= work.blocks.begin; block = following, stage = (stage + 1) % kStages) {
      following = next(block);
      const int first_key = block * kBlockN;
      Options here = work.options;
      const Pairs<Options> pairs = {here, work.band, scale};
      const auto tile_at = [&](int m) {
        unsigned lane = threadIdx.x % 32;
        ptx::make_opaque(lane);  // as in TileReader
        return TileOfPairs<Options>{pairs, work.first_query + warp_row + 16 * m + static_cast<int>(lane / 4),
                                    first_key + static_cast<int>(lane % 4 * 2)};
      };
      const bool masked = block < work.blocks.full_begin || block >= work.blocks.full_end;
      // If not, the warp only helps to load.
      const bool sees = uniform(has_rows() && (!masked || sees_any(first_key)));

      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage has arrived, and the one before is no longer read
      if constexpr (kStages > 1) {
        load((stage + 1) % kStages, following);
      } else {
        load_values(0, block);
        ptx::cp_async_commit();
      }
      typename TileOfPairs<Options>::Rest rest[kTilesM];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) rest[m] = {pairs.scale, 0.0f};
      if (sees) {
        here.template look_at<kBlockM, kBlockN>(shared.pairs[stage].memory, work.first_query, first_key);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          shared.hidden.find(m, tile_at(m));
          scores[m].clear();
        }
        const RowsOf rows_of_q(shared.q, warp_row);
        if constexpr (kKeptQ > 0) {
          add_product_along<kHeadDim, kUnrollScores>(scores, FirstKept(kept_q, rows_of_q), shared.k[stage]);
        } else {
          add_product_along<kHeadDim, kUnrollScores>(scores, rows_of_q, shared.k[stage]);
        }
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          const TileOfPairs<Options> tile = tile_at(m);
          rest[m] = tile.change(scores[m]);
          shared.hidden.hide(m, tile, scores[m]);
          if (masked) tile.template hide_by_band<Hidden::kAround>(scores[m]);
        }
      }
      if constexpr (kStages == 1) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // V has arrived, and K is no longer read
        load(0, following);
      }
      if (sees) {
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          float factor[2];
          if (rows[m].follow(scores[m], rest[m], factor)) {
#pragma unroll
            for (int i = 0; i < Output::kNumElements; ++i) output[m].x[i] *= factor[row_of_element(i)];
          }
          rows[m].weigh(scores[m], rest[m]);
          weights[m].round(scores[m]);
          drop(work.options, weights[m], work.first_query + warp_row + 16 * m, first_key);
        }
        add_product_across<kBlockN, kUnrollOutput>(output, RegistersOf(weights), shared.v[stage]);
      }
    }

    const bool hides_pairs =
        Options::kHidesPairs || work.blocks.full_begin > work.blocks.begin || work.blocks.full_end < work.blocks.end;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      const int first_row = work.first_query + warp_row + 16 * m, lane_row = first_row + lane / 4;
      float inverse[2], base[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = rows[m].total(r), survivors = work.options.survivor_factor();
        base[r] = rows[m].softmax[r].base;
        if constexpr (Options::kHasSinks) survivors *= rows[m].softmax[r].join(work.sink, sum);
        inverse[r] = sum == 0.0f ? 0.0f : kExact ? survivors / sum : __fdividef(survivors, sum);
        const int row = lane_row + 8 * r;
        if (arrays.lse != nullptr && lane % 4 == 0 && row < work.out.rows) {
          if constexpr (kHasParts) {
            const auto natural = rows[m].softmax[r].natural(sum);
            *work.lse.at(row, 0) = natural.base;
            *work.lse.at(row, 1) = natural.sum;
          } else {
            *work.lse.at(row, 0) = rows[m].softmax[r].lse(sum);
          }
        }
      }
      const Matrix<Result> out = work.out;
      const bool finite = store_rows(out, output[m], inverse, lane_row);
      // 0 * NaN is NaN: each value meets all rows, if only with weight 0, and may have spoiled rows that do not see it.
      if (hides_pairs && __any_sync(kFullMask, !finite)) {
        __syncwarp();  // others write again what this lane wrote
        const Range keys = {work.blocks.begin * kBlockN, work.blocks.end * kBlockN};
        const Careful head = {
            work.q, work.k, work.v, work.out, work.options, work.band, keys, scale, shared.careful[threadIdx.x / 32]};
        head.template write_rows<kHeadDimV>(first_row, base, inverse);
      }
    }
  }
};

}  // namespace cuflash
