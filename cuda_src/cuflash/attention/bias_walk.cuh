// The tiles of pairs that share a tile of the gradient of a bias, and that tile from their sums.
#pragma once

#include <cuflash/attention/sequence.cuh>

namespace cuflash {

// A block owns a kBlockM x kBlockN tile of the gradient and walks over the tiles of pairs that share it: of other batch
// entries and heads, queries and keys, as the bias was broadcast. So no sum is spread over blocks, the result is
// bitwise the same in every run, and only the gradient itself takes memory.
template <int kBlockM, int kBlockN>
struct BiasWalk {
  // A tile of pairs.
  struct Step {
    int batch, head, m_block, n_block;

    __device__ __forceinline__ int first_query() const { return m_block * kBlockM; }
    __device__ __forceinline__ int first_key() const { return n_block * kBlockN; }
  };

  Step gradient, pairs;  // how many tiles there are along each axis, of the gradient and of pairs
  Step first, end;       // where the walk goes along each axis

  __device__ __forceinline__ explicit BiasWalk(const DbiasParams& params)
      : gradient{params.batch, params.heads, ceil_div(params.rows, kBlockM), ceil_div(params.cols, kBlockN)},
        pairs{params.problem.batch, params.problem.num_heads, ceil_div(params.problem.seqlen_q, kBlockM),
              ceil_div(params.problem.seqlen_k, kBlockN)} {}

  // A tile of the gradient by its number: neighbours have the same rows.
  __device__ __forceinline__ Step tile(unsigned number) const {
    const unsigned row = number / gradient.n_block, head = row / gradient.m_block;
    return {static_cast<int>(head / gradient.head), static_cast<int>(head % gradient.head),
            static_cast<int>(row % gradient.m_block), static_cast<int>(number % gradient.n_block)};
  }
  // The one whose number is the sum of two others', found without a division. There is none behind the last batch
  // entry.
  __device__ __forceinline__ Step sum(const Step& x, const Step& y) const {
    Step sum = {x.batch + y.batch, x.head + y.head, x.m_block + y.m_block, x.n_block + y.n_block};
    if (sum.n_block >= gradient.n_block) {
      sum.n_block -= gradient.n_block;
      ++sum.m_block;
    }
    if (sum.m_block >= gradient.m_block) {
      sum.m_block -= gradient.m_block;
      ++sum.head;
    }
    if (sum.head >= gradient.head) {
      sum.head -= gradient.head;
      ++sum.batch;
    }
    return sum;
  }
  __device__ __forceinline__ bool exists(const Step& tile) const { return tile.batch < gradient.batch; }

  // Starts at a tile of the gradient. Where this is the only one along an axis, all pairs share it.
  __device__ __forceinline__ void begin(const Step& tile) {
    first = tile;
    end.batch = gradient.batch == 1 ? pairs.batch : first.batch + 1;
    end.head = gradient.head == 1 ? pairs.head : first.head + 1;
    end.m_block = gradient.m_block == 1 ? pairs.m_block : first.m_block + 1;
    end.n_block = gradient.n_block == 1 ? pairs.n_block : first.n_block + 1;
  }

  // The batch is the innermost axis.
  __device__ __forceinline__ Step after(Step step) const {
    if (++step.batch < end.batch) return step;
    step.batch = first.batch;
    if (++step.head < end.head) return step;
    step.head = first.head;
    if (++step.m_block < end.m_block) return step;
    step.m_block = first.m_block;
    ++step.n_block;
    return step;
  }
  __device__ __forceinline__ bool done(const Step& step) const { return step.n_block >= end.n_block; }

  // The first tile from this one on that is not hidden altogether.
  template <class Options>
  __device__ __forceinline__ Step visited(Step step, const Problem& problem, const Band& band,
                                          const Options& options) const {
    for (; !done(step); step = after(step)) {
      const int query = step.first_query(), key = step.first_key();
      if (!band.any_visible({query, query + kBlockM}, {key, key + kBlockN})) continue;
      if constexpr (!Options::kSkipsBlocks) break;
      Options there = options;
      there.enter(BatchedSequences::sequence(problem, step.batch), step.head);
      there.template look_at<kBlockM, kBlockN>(nullptr, query, key);
      if (!there.hides_all()) break;
    }
    return step;
  }

  // Sums of all pairs, as threads leave them in shared memory for write().
  static constexpr int kPitch = kBlockN + 1;  // floats
  static constexpr int kSumBytes = kBlockM * kPitch * static_cast<int>(sizeof(float));

  // Writes the tile of the gradient, by all warps of the block.
  template <int kNumWarps, class Bias>
  __device__ __forceinline__ void write(Bias* array, const DbiasParams& params, const float* sums) const {
    const int first_row = first.first_query(), first_col = first.first_key();
    const Matrix<Bias> dbias(array, params.dbias, first.batch, first.head, first_row);
    const int rows = min(kBlockM, params.rows - first_row), cols = min(kBlockN, params.cols - first_col);
    const int shared_rows = params.rows == 1 ? kBlockM : 1, shared_cols = params.cols == 1 ? kBlockN : 1;
    for (int row = threadIdx.x / 32; row < rows; row += kNumWarps) {
      for (int col = threadIdx.x % 32; col < cols; col += 32) {
        float sum = 0.0f;
        for (int i = 0; i < shared_rows; ++i) {
          for (int j = 0; j < shared_cols; ++j) sum += sums[(row + i) * kPitch + col + j];
        }
        *dbias.at(row, first_col + col) = from_float<Bias>(sum);
      }
    }
  }
};

}  // namespace cuflash
