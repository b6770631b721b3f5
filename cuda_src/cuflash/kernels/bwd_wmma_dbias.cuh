// The gradient of an additive bias on nvcuda::wmma fragments, summed over the axes along which it was broadcast.
#pragma once

#include <cuflash/attention/recompute.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/bit_tile.cuh>

namespace cuflash {

// A block owns a kBlockM x kBlockN tile of the gradient and walks over the tiles of pairs that share it: of other batch
// entries and heads, queries and keys, as the bias was broadcast. So no sum is spread over blocks, the result is
// bitwise the same in every run, and only the gradient itself takes memory. Each warp owns kBlockM / kNumWarps rows.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kNumWarps,
          int kNumStages>
struct BwdWmmaDbias {
  using Element = typename Number::Element;
  using Bias = typename Options::Bias;
  using Map = FragmentMap<Number>;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kWarpM = kBlockM / kNumWarps;
  static constexpr int kTilesM = kWarpM / 16;
  static constexpr int kTilesN = kBlockN / 16;

  static constexpr int kPitch = padded<Element>(kHeadDim);
  static constexpr int kPitchV = padded<Element>(kHeadDimV);
  static constexpr int kPitchSum = kBlockN + 1;  // floats

  static constexpr int kSizeQ = kBlockM * kPitch * sizeof(Element);
  static constexpr int kSizeDout = kBlockM * kPitchV * sizeof(Element);
  static constexpr int kSizeK = kBlockN * kPitch * sizeof(Element);
  static constexpr int kSizeV = kBlockN * kPitchV * sizeof(Element);
  static constexpr int kSizeRows = 2 * kBlockM * sizeof(float);
  static constexpr int kSizeStage =
      kSizeQ + kSizeDout + kSizeK + kSizeV + kSizeRows + Options::template kTileBytes<kBlockM, kBlockN>;
  static constexpr int kSharedBytes = larger(kNumStages * kSizeStage, kBlockM * kPitchSum * sizeof(float));

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

  // Walks over the tiles of pairs that share a tile of the gradient; the batch is the innermost axis.
  struct Walk {
    int batch, head, m_block, n_block;
    int first_batch, first_head, first_m_block, end_batch, end_head, end_m_block, end_n_block;

    __device__ __forceinline__ explicit Walk(const DbiasParams& params) {
      const Problem& problem = params.problem;
      const int m_blocks = ceil_div(params.rows, kBlockM), n_blocks = ceil_div(params.cols, kBlockN);
      n_block = blockIdx.x % n_blocks;
      m_block = first_m_block = blockIdx.x / n_blocks % m_blocks;
      head = first_head = blockIdx.x / n_blocks / m_blocks % params.heads;
      batch = first_batch = blockIdx.x / n_blocks / m_blocks / params.heads;
      end_batch = params.batch == 1 ? problem.batch : batch + 1;
      end_head = params.heads == 1 ? problem.num_heads : head + 1;
      end_m_block = params.rows == 1 ? ceil_div(problem.seqlen_q, kBlockM) : m_block + 1;
      end_n_block = params.cols == 1 ? ceil_div(problem.seqlen_k, kBlockN) : n_block + 1;
    }

    __device__ __forceinline__ void advance() {
      if (++batch < end_batch) return;
      batch = first_batch;
      if (++head < end_head) return;
      head = first_head;
      if (++m_block < end_m_block) return;
      m_block = first_m_block;
      ++n_block;
    }

    __device__ __forceinline__ bool done() const { return n_block >= end_n_block; }
    __device__ __forceinline__ int first_query() const { return m_block * kBlockM; }
    __device__ __forceinline__ int first_key() const { return n_block * kBlockN; }
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const DbiasParams& params, const Options& options) {
    const Problem& problem = params.problem;
    const Band band = problem.band(problem.seqlen_q, problem.seqlen_k);
    const Walk start(params);

    const int warp = threadIdx.x / 32;
    unsigned char* const shared = dynamic_shared_memory();
    Map map(reinterpret_cast<float*>(shared) + warp * Map::kScratchFloats);
    __syncthreads();  // the map's scratch is no longer read

    const auto skip_hidden = [&](Walk walk) {
      for (; !walk.done(); walk.advance()) {
        const Range keys = band.keys_of({walk.first_query(), walk.first_query() + kBlockM});
        if (keys.begin >= walk.first_key() + kBlockN || walk.first_key() >= keys.end) continue;
        if constexpr (!Options::kSkipsBlocks) break;
        Options there = options;
        there.enter(BatchedSequences::sequence(problem, walk.batch), walk.head);
        there.template look_at<kBlockM, kBlockN>(shared, walk.first_query(), walk.first_key());
        if (!there.hides_all()) break;
      }
      return walk;
    };
    const auto load = [&](int turn, const Walk& walk) {
      if (walk.done()) return;
      const Stage stage(shared + turn % kNumStages * kSizeStage);
      const int batch = walk.batch, head = walk.head, head_kv = head / problem.group_size();
      const Sequence sequence = BatchedSequences::sequence(problem, batch);
      const Matrix<const Element> q(arrays.q, params.q, batch, head, 0, problem.seqlen_q, problem.head_dim);
      const Matrix<const Element> dout(arrays.dout, params.dout, batch, head, 0, problem.seqlen_q, problem.head_dim_v);
      const Matrix<const Element> k(arrays.k, params.k, batch, head_kv, 0, problem.seqlen_k, problem.head_dim);
      const Matrix<const Element> v(arrays.v, params.v, batch, head_kv, 0, problem.seqlen_k, problem.head_dim_v);
      load_tile<kBlockM, kHeadDim, kNumThreads>(stage.q, q, walk.first_query());
      load_tile<kBlockM, kHeadDimV, kNumThreads>(stage.dout, dout, walk.first_query());
      load_tile<kBlockN, kHeadDim, kNumThreads>(stage.k, k, walk.first_key());
      load_tile<kBlockN, kHeadDimV, kNumThreads>(stage.v, v, walk.first_key());
      Options there = options;
      there.enter(sequence, head);
      there.template load<kBlockM, kBlockN, kNumThreads>(stage.pairs, walk.first_query(), walk.first_key());
      const RowStatistics rows(arrays.lse, arrays.delta, params, sequence, head);
      for (int row = threadIdx.x; row < kBlockM; row += kNumThreads) {
        stage.lse[row] = rows.lse_of(walk.first_query() + row);
        stage.delta[row] = rows.delta_of(walk.first_query() + row);
      }
    };

    Walk walk = skip_hidden(start);
    load(0, walk);
    ptx::cp_async_commit();
    WarpTile<Number, kTilesM, kTilesN> acc_dbias;
    acc_dbias.clear();

    for (int turn = 0; !walk.done(); ++turn) {
      Walk following = walk;
      following.advance();
      following = skip_hidden(following);
      const Stage stage(shared + turn % kNumStages * kSizeStage);
      map.stay_packed();
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage has arrived, and the previous one is no longer read
      if (kNumStages > 1) load(turn + 1, following);
      ptx::cp_async_commit();

      Options here = options;
      here.enter(BatchedSequences::sequence(problem, walk.batch), walk.head);
      here.template look_at<kBlockM, kBlockN>(stage.pairs, walk.first_query(), walk.first_key());
      const BiasPairs<Options> pairs = {here, band, problem.softmax_scale};
      const int warp_row = warp * kWarpM, first_query = walk.first_query() + warp_row, first_key = walk.first_key();
      WarpTile<Number, kTilesM, kTilesN> acc_s, acc_dp;
      acc_s.clear();
      acc_s.template add_product<kHeadDim, Stored::kTransposed>(stage.q + warp_row * kPitch, kPitch, stage.k, kPitch);
      acc_dp.clear();
      acc_dp.template add_product<kHeadDimV, Stored::kTransposed>(stage.dout + warp_row * kPitchV, kPitchV, stage.v,
                                                                  kPitchV);
      const BitTile<Number, kTilesM, kTilesN, Options::kHasDropout> survives(
          map, [&](int m, int n) { return here.draw(first_query + 16 * m, first_key + 16 * n).survivors(); });
      acc_dbias.for_each([&](float& sum, int m, int n, int i) {
        const int row = 16 * m + map.row(i), query = first_query + row, key = first_key + 16 * n + map.col(i);
        const PairGradient pair =
            pair_gradient(pairs, acc_s.tile[m][n].x[i], acc_dp.tile[m][n].x[i], stage.lse[warp_row + row],
                          stage.delta[warp_row + row], query, key, survives(m, n, i));
        if (query < band.seqlen_q && pairs.visible(query, key)) sum += pair.dscore;
      });
      if (kNumStages == 1) {
        __syncthreads();  // the only stage is no longer read
        load(turn + 1, following);
        ptx::cp_async_commit();
      }
      walk = following;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // no stage is read any more: the sums take their place

    float* const sums = reinterpret_cast<float*>(shared);
    acc_dbias.for_each([&](float& sum, int m, int n, int i) {
      sums[(warp * kWarpM + 16 * m + map.row(i)) * kPitchSum + 16 * n + map.col(i)] = sum;
    });
    __syncthreads();
    const int first_row = start.first_query(), first_col = start.first_key();
    const Matrix<Bias> dbias(arrays.dbias, params.dbias, start.batch, start.head, first_row);
    const int rows = min(kBlockM, params.rows - first_row), cols = min(kBlockN, params.cols - first_col);
    const int shared_rows = params.rows == 1 ? kBlockM : 1, shared_cols = params.cols == 1 ? kBlockN : 1;
    for (int row = warp; row < rows; row += kNumWarps) {
      for (int col = threadIdx.x % 32; col < cols; col += 32) {
        float sum = 0.0f;
        for (int i = 0; i < shared_rows; ++i) {
          for (int j = 0; j < shared_cols; ++j) sum += sums[(row + i) * kPitchSum + col + j];
        }
        *dbias.at(row, first_col + col) = from_float<Bias>(sum);
      }
    }
  }
};

}  // namespace cuflash
