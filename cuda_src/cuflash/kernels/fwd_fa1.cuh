// FlashAttention-1 forward (Dao et al. 2022, algorithm 1) on nvcuda::wmma fragments: to compare with its successor.
#pragma once

#include <cuflash/attention/params.cuh>
#include <cuflash/attention/softmax.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/tile/non_finite.cuh>

namespace cuflash {

// A block computes one head, all of it. It walks over K and V in tiles of kBlockN keys, and for each of them over all
// the queries that see it; each warp owns 16 rows of a tile of queries. So no row is finished before the last tile of
// keys: O and its softmax wait in global memory, and each visit reads, rescales and writes them.
template <class Number, int kHeadDim, int kHeadDimV, int kBlockN, int kNumWarps>
struct FwdFa1 {
  using Element = typename Number::Element;
  using Map = FragmentMap<Number>;

  static constexpr int kNumThreads = 32 * kNumWarps;
  static constexpr int kBlockM = 16 * kNumWarps;
  static constexpr int kTilesN = kBlockN / 16;
  static constexpr int kTilesV = kHeadDimV / 16;
  // O is in memory anyway: no more of its columns at a time than leave registers for the product.
  static constexpr int kTilesO = kTilesV <= 8 ? kTilesV : kTilesV / 2;

  static constexpr int kPitchK = padded<Element>(kHeadDim);
  static constexpr int kPitchV = padded<Element>(kHeadDimV);
  static constexpr int kPitchP = padded<Element>(kBlockN);

  static constexpr int kSizeQ = kBlockM * kPitchK * sizeof(Element);
  static constexpr int kSizeK = kBlockN * kPitchK * sizeof(Element);
  static constexpr int kSizeV = kBlockN * kPitchV * sizeof(Element);
  // A warp's P, and before it the scratch of row reductions.
  static constexpr int kSizeP = larger(16 * kPitchP * sizeof(Element), Map::kScratchFloats * sizeof(float));
  static constexpr int kSharedBytes = kSizeQ + kSizeK + kSizeV + kNumWarps * kSizeP;

  static_assert(kBlockN % 16 == 0 && kHeadDim % 16 == 0 && kTilesV % kTilesO == 0);

  struct Arrays {
    const Element *q, *k, *v;
    Element* out;
    float* lse;  // may be null
    // O, m and l of the paper: (batch * num_heads, rows[, kHeadDimV]), where rows are seqlen_q rounded up to kBlockM.
    // O does not wait in `out`: rounded to Element in each visit, its error would grow with the number of keys.
    float *acc_o, *row_max, *row_sum;
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const FwdParams& params) {
    const Problem& problem = params.problem;
    const Band band = problem.band(problem.seqlen_q, problem.seqlen_k);
    const int head = blockIdx.x % problem.num_heads, batch = blockIdx.x / problem.num_heads;
    const int head_kv = head / problem.group_size();

    const Matrix<const Element> q(arrays.q, params.q, batch, head, 0, problem.seqlen_q, problem.head_dim);
    const Matrix<const Element> k(arrays.k, params.k, batch, head_kv, 0, problem.seqlen_k, problem.head_dim);
    const Matrix<const Element> v(arrays.v, params.v, batch, head_kv, 0, problem.seqlen_k, problem.head_dim_v);
    const long long num_rows = ceil_div(problem.seqlen_q, kBlockM) * kBlockM;
    float* const head_o = arrays.acc_o + blockIdx.x * num_rows * kHeadDimV;
    float* const head_max = arrays.row_max + blockIdx.x * num_rows;
    float* const head_sum = arrays.row_sum + blockIdx.x * num_rows;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned char* const shared = dynamic_shared_memory();
    Element* const smem_q = reinterpret_cast<Element*>(shared);
    Element* const smem_k = reinterpret_cast<Element*>(shared + kSizeQ);
    Element* const smem_v = reinterpret_cast<Element*>(shared + kSizeQ + kSizeK);
    unsigned char* const warp_memory = shared + kSizeQ + kSizeK + kSizeV + warp * kSizeP;
    Element* const smem_p = reinterpret_cast<Element*>(warp_memory);
    float* const scratch = reinterpret_cast<float*>(warp_memory);
    Map map(scratch);

    for (long long i = threadIdx.x; i < num_rows * kHeadDimV; i += kNumThreads) head_o[i] = 0.0f;
    for (int row = threadIdx.x; row < num_rows; row += kNumThreads) {
      head_max[row] = -infinity();
      head_sum[row] = 0.0f;
    }

    const Range keys = band.keys_of({0, problem.seqlen_q});
    for (int n_block = keys.begin / kBlockN; n_block < ceil_div(keys.end, kBlockN); ++n_block) {
      const int first_key = n_block * kBlockN;
      const Range tile_keys = {first_key, first_key + kBlockN};
      const Range queries = band.queries_of(tile_keys);
      const int m_begin = queries.begin / kBlockM, m_end = ceil_div(queries.end, kBlockM);

      __syncthreads();  // O, m and l have begun, and the previous K and V are no longer read
      load_tile<kBlockN, kHeadDim, kNumThreads>(smem_k, k, first_key);
      load_tile<kBlockN, kHeadDimV, kNumThreads>(smem_v, v, first_key);
      load_tile<kBlockM, kHeadDim, kNumThreads>(smem_q, q, m_begin * kBlockM);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();  // K, V and Q have arrived
      // Values that are not finite would spoil the rows that do not see them (tile/non_finite.cuh).
      const bool careful = __syncthreads_or(holds_non_finite(smem_v));
      if (careful) clear_non_finite<kBlockN, kHeadDimV, kNumThreads>(smem_v);

      for (int m_block = m_begin; m_block < m_end; ++m_block) {
        const int warp_row = m_block * kBlockM + warp * 16, row = warp_row + lane / 2;
        map.stay_packed();
        ptx::cp_async_wait<0>();
        __syncthreads();  // Q has arrived

        WarpTile<Number, 1, kTilesN> acc_s;
        acc_s.clear();
        acc_s.template add_product<kHeadDim, Stored::kTransposed>(smem_q + warp * 16 * kPitchK, kPitchK, smem_k,
                                                                  kPitchK);
        __syncthreads();  // Q is no longer read
        if (m_block + 1 < m_end) load_tile<kBlockM, kHeadDim, kNumThreads>(smem_q, q, (m_block + 1) * kBlockM);
        ptx::cp_async_commit();

        acc_s.for_each([&](float& score, int, int, int) { score *= problem.softmax_scale; });
        if (!band.all_visible({warp_row, warp_row + 16}, tile_keys)) {
          acc_s.for_each([&](float& score, int, int n, int i) {
            if (!band.visible(warp_row + map.row(i), first_key + 16 * n + map.col(i))) score = -infinity();
          });
        }

        Accumulator<Number> maxima = acc_s.tile[0][0];
        acc_s.for_each([&](float& score, int, int, int i) { maxima.x[i] = fmaxf(maxima.x[i], score); });
        const float tile_max = map.reduce_rows(maxima, scratch, [](float x, float y) { return fmaxf(x, y); });
        OnlineSoftmax<> softmax = {head_max[row]};
        const float old_sum = softmax.rescale(tile_max) * head_sum[row], shift = softmax.shift();

        Accumulator<Number> sums;
        wmma::fill_fragment(sums, 0.0f);
#pragma unroll
        for (int i = 0; i < Map::kNumElements; ++i) {
          const float row_shift = map.of_row(shift, i);
#pragma unroll
          for (int n = 0; n < kTilesN; ++n) {
            float& weight = acc_s.tile[0][n].x[i];
            weight = softmax_weight(weight, row_shift);
            sums.x[i] += weight;
          }
        }
        const float sum = old_sum + map.reduce_rows(sums, scratch, [](float x, float y) { return x + y; });
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        if (lane % 2 == 0) {
          head_max[row] = softmax.base;
          head_sum[row] = sum;
        }
        map.store(smem_p, kPitchP, acc_s);
        __syncwarp();  // P is visible to its warp

        // O = (e^(m_old - m) l_old O + P V) / l
#pragma unroll 1  // or O comes all at once
        for (int d_tile = 0; d_tile < kTilesV; d_tile += kTilesO) {
          float4* const pieces = pieces_of(head_o, warp_row, d_tile, lane);
          map.stay_packed();
          WarpTile<Number, 1, kTilesO> acc_o;
          load(acc_o, pieces);
          scale_rows(acc_o, map, old_sum);
          if (careful) {
#pragma unroll 1
            for (int key = first_key; key < first_key + kBlockN; ++key) {
              map.stay_packed();
              acc_o.for_each([&](float& o, int, int d, int i) {
                const int col = 16 * (d_tile + d) + map.col(i);
                if (!band.visible(warp_row + map.row(i), key) || col >= v.cols) return;
                const float value = to_float(*v.at(key, col));
                if (!is_finite(value)) o += to_float(smem_p[map.row(i) * kPitchP + key - first_key]) * value;
              });
            }
          }
          acc_o.template add_product<kBlockN, Stored::kByRows>(smem_p, kPitchP, smem_v + 16 * d_tile, kPitchV);
          scale_rows(acc_o, map, inverse);
          store(pieces, acc_o);
        }
        __syncwarp();  // P is no longer read
      }
      ptx::cp_async_wait<0>();
    }
    __syncthreads();  // O, m and l are final

    const Matrix<Element> out(arrays.out, params.out, batch, head, 0, problem.seqlen_q, problem.head_dim_v);
    for (int warp_row = warp * 16; warp_row < problem.seqlen_q; warp_row += kBlockM) {
#pragma unroll 1
      for (int d_tile = 0; d_tile < kTilesV; d_tile += kTilesO) {
        WarpTile<Number, 1, kTilesO> acc_o;
        load(acc_o, pieces_of(head_o, warp_row, d_tile, lane));
        acc_o.for_each([&](float& o, int, int d, int i) {
          const int row = warp_row + map.row(i), col = 16 * (d_tile + d) + map.col(i);
          if (row < out.rows && col < out.cols) *out.at(row, col) = from_float<Element>(o);
        });
      }
    }
    if (arrays.lse == nullptr) return;
    const Matrix<float> lse(arrays.lse, params.lse, batch, head, 0, problem.seqlen_q, 1);
    for (int row = threadIdx.x; row < problem.seqlen_q; row += kNumThreads) {
      *lse.at(row, 0) = OnlineSoftmax<>{head_max[row]}.lse(head_sum[row]);
    }
  }

 private:
  // Whether this thread's share of a tile of V holds NaN or infinity.
  static __device__ __forceinline__ bool holds_non_finite(const Element* smem_v) {
    bool found = false;
#pragma unroll 1
    for (int index = threadIdx.x; index < kBlockN * kHeadDimV; index += kNumThreads) {
      found = found || !is_finite(to_float(smem_v[index / kHeadDimV * kPitchV + index % kHeadDimV]));
    }
    return found;
  }

  // Multiplies each row with the factor that lanes 2r and 2r + 1 hold for row r.
  static __device__ __forceinline__ void scale_rows(WarpTile<Number, 1, kTilesO>& acc_o, const Map& map, float factor) {
#pragma unroll
    for (int i = 0; i < Map::kNumElements; ++i) {
      const float row_factor = map.of_row(factor, i);
#pragma unroll
      for (int d = 0; d < kTilesO; ++d) acc_o.tile[0][d].x[i] *= row_factor;
    }
  }

  // O waits in the order in which the lanes hold it: each lane reads what it has written, in pieces of 16 bytes.
  static constexpr int kPieces = Map::kNumElements / 4;

  static __device__ __forceinline__ float4* pieces_of(float* head_o, int warp_row, int d_tile, int lane) {
    return reinterpret_cast<float4*>(head_o + static_cast<long long>(warp_row) * kHeadDimV) + d_tile * kPieces * 32 +
           lane;
  }

  static __device__ __forceinline__ void load(WarpTile<Number, 1, kTilesO>& acc_o, const float4* pieces) {
#pragma unroll
    for (int index = 0; index < kTilesO * kPieces; ++index) {
      const float4 piece = pieces[32 * index];
      float* const x = acc_o.tile[0][index / kPieces].x + index % kPieces * 4;
      x[0] = piece.x, x[1] = piece.y, x[2] = piece.z, x[3] = piece.w;
    }
  }

  static __device__ __forceinline__ void store(float4* pieces, const WarpTile<Number, 1, kTilesO>& acc_o) {
#pragma unroll
    for (int index = 0; index < kTilesO * kPieces; ++index) {
      const float* const x = acc_o.tile[0][index / kPieces].x + index % kPieces * 4;
      pieces[32 * index] = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
};

}  // namespace cuflash
