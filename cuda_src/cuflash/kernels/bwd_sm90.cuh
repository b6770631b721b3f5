// FlashAttention backward for Hopper: the gradients of K and V, and sums for that of Q (FlashAttention-3,
// arXiv:2407.08608, appendix B). docs/kernels.md draws it.
#pragma once

#include <cuflash/attention/job_ring.cuh>
#include <cuflash/attention/query_gradient.cuh>
#include <cuflash/attention/query_walk.cuh>
#include <cuflash/attention/recompute.cuh>
#include <cuflash/attention/score_gradients.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/ptx/stmatrix.cuh>
#include <cuflash/ptx/store.cuh>
#include <cuflash/ptx/turn.cuh>
#include <cuflash/ptx/warpgroup.cuh>
#include <cuflash/tile/row_store.cuh>
#include <cuflash/tile/swizzled_tile.cuh>

namespace cuflash {

// Where TMA finds the inputs, and in boxes of which sizes.
struct BwdMaps {
  ptx::TensorMap q, k, v, dout;
};

// One struct, because each argument costs the host time (mirrored in cuflash/_params.py).
struct BwdSm90Params {
  BwdParams bwd;
  const void *q, *k, *v, *dout;  // where the host has filled in the maps
  BwdMaps maps;
};

// A block stays on its multiprocessor and takes one job after another: kBlockN keys of one key/value head. It walks
// over the queries that see them, in tiles of kBlockM, for every query head of the group. Warps of their own copy what
// is needed to shared memory, ahead of two consumers with 64 keys each. Scores are computed transposed (keys are rows):
// P and dS lie in registers as the first factors of dV and dK. dS also goes to shared memory, where it is the first
// factor of dQ, of which each consumer computes a half and adds it to sums in global memory. The next Q K^T starts
// before the last product of a tile has ended.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kStagesKv,
          int kStages, int kStagesPairs, bool kDeterministic>
struct BwdSm90 {
  using Element = typename Number::Element;

  static constexpr int kNumConsumers = kBlockN / 64;
  static constexpr int kNumThreads = 128 * (1 + kNumConsumers);
  // Of each thread. The kernel starts with as many for all as fit into the 64 K of a multiprocessor.
  static constexpr int kProducerRegisters = kHeadDim <= 64 && kBlockM == 64 ? 40 : 24;
  static constexpr int kConsumerRegisters = 256 - (kProducerRegisters + 8) / 2;

  using Gradients = ScoreGradients<Element, Options, kBlockM>;
  using Scores = typename Gradients::Scores;
  using Factor = typename Gradients::Factor;
  using GradK = WarpgroupTile<kHeadDim>;
  using GradV = WarpgroupTile<kHeadDimV>;
  using Sums = QueryGradient<kHeadDim, kBlockM>;
  using GradQ = typename Sums::Part;
  using Rows = RowsOfTile<kBlockM>;

  using TileQ = SwizzledTile<Element, kBlockM, kHeadDim>;
  using TileDout = SwizzledTile<Element, kBlockM, kHeadDimV>;
  using TileK = SwizzledTile<Element, kBlockN, kHeadDim>;
  using TileV = SwizzledTile<Element, kBlockN, kHeadDimV>;
  using TileDs = SwizzledTile<Element, kBlockN, kBlockM>;

  // Registers are few: rings in their compact form.
  using RingKv = Pipeline<kStagesKv, true>;
  using Ring = Pipeline<kStages, true>;
  using RingPairs = Pipeline<kStagesPairs, true>;
  using Jobs = JobRing<2 * kStagesKv, true>;
  // In a fixed order everybody waits for the turn of each tile: none may be left out.
  using Walk = QueryWalk<kBlockM, kBlockN, Options, Options::kSkipsBlocks && !kDeterministic>;
  // With all of dK, dV and float32 weights in registers there is no room for products that start ahead.
  static constexpr bool kStartsAhead = Gradients::kPlainWeights || kHeadDim <= 64;

  // Arrays of pairs, which two warps copy ahead of the consumers; and whether those have anything to do.
  static constexpr int kPairBytes = Options::template kTileBytes<kBlockM, kBlockN>;
  static constexpr bool kLoadsPairs = kPairBytes > 0;
  static constexpr bool kHelps = kLoadsPairs || Options::kPacked;

  struct alignas(16) TileOfArrays {
    unsigned char memory[larger(kPairBytes, 16)];
  };
  struct Rings {
    RingKv kv;
    Ring q, dout;  // statistics of rows come and go with Q
    Ring partial;  // queries of which only a part is kept
    RingPairs pairs;
    Jobs jobs;
  };
  struct Shared {
    TileK k[kStagesKv];
    TileV v[kStagesKv];
    TileQ q[kStages];
    TileDout dout[kStages];
    TileDs ds[2];
    TileOfArrays pairs[kStagesPairs];
    Rows rows[kStages];
    Rings rings;
  };
  // Without the padding that makes the struct a multiple of 1024.
  static constexpr int kSharedBytes = (sizeof(TileK) + sizeof(TileV)) * kStagesKv +
                                      (sizeof(TileQ) + sizeof(TileDout) + sizeof(Rows)) * kStages + sizeof(TileDs) * 2 +
                                      sizeof(TileOfArrays) * kStagesPairs + sizeof(Rings);

  static_assert(kNumConsumers == 2 && (kBlockM == 64 || kBlockM == 128));

  struct Arrays {
    const float *lse, *delta;
    float* dq_sums;
    unsigned* turns;    // of each part of the sums, how many blocks have added to it; used by kDeterministic alone
    unsigned* spoiled;  // of each tile of keys, whether its gradients must be computed once more
    Element *dk, *dv;
    unsigned* counter;  // 0 before and after the kernel
  };
  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdSm90Params& all, Options options) {
    const BwdParams& params = all.bwd;
    const BwdMaps& maps = all.maps;
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    if (threadIdx.x == 0) {
      ptx::tma_prefetch(&maps.q);
      ptx::tma_prefetch(&maps.k);
      ptx::tma_prefetch(&maps.v);
      ptx::tma_prefetch(&maps.dout);
      const int num_warps = 4 * kNumConsumers;  // wgmma ends warp by warp: each releases what it has read
      shared.rings.kv.init(num_warps);
      shared.rings.q.init(num_warps, 1 + 32);
      shared.rings.dout.init(num_warps);
      shared.rings.pairs.init(num_warps, 64);  // every lane copies
      shared.rings.partial.init(1);
      shared.rings.jobs.init(num_warps + (kHelps ? 3 : 1));
      ptx::barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      ptx::release_registers<kProducerRegisters>();
      if (threadIdx.x < 64) {
        if constexpr (kHelps) help(params, options, shared);
      } else if (threadIdx.x < 96) {
        load(arrays, maps, params, options, shared);
      } else {
        load_rows(arrays, params, options, shared);
      }
    } else {
      ptx::acquire_registers<kConsumerRegisters>();
      consume(arrays, params, options, shared);
    }
  }

  // ---- Loads

  // The coordinate along an axis: arrays that are broadcast along it have the stride 0, and one entry.
  static __device__ __forceinline__ int along(long long stride, int index) { return stride == 0 ? 0 : index; }

  static __device__ __forceinline__ Band band_of(const Problem& problem, const Job& job) {
    return problem.band(job.sequence.seqlen_q, job.sequence.seqlen_k);
  }

  // Run by one warp, which also asks for jobs.
  static __device__ __forceinline__ void load(const Arrays& arrays, const BwdMaps& maps, const BwdParams& params,
                                              const Options& options, Shared& shared) {
    const Problem& problem = params.problem;
    const bool leader = threadIdx.x % 32 == 0;
    const JobCounter<KeyJobs<kBlockN, kDeterministic>, Options> jobs(options, problem, arrays.counter);
    typename Jobs::Position job_at;
    typename RingKv::Position kv_at;
    typename Ring::Position at;
    typename Ring::Position partial_at;
    for (Job job = jobs.job(blockIdx.x);;) {
      shared.rings.jobs.put(job_at, job);
      if (job.tile == Job::kNoTile) break;
      const unsigned index = jobs.ask();  // the answer comes while the tiles are loaded
      const Sequence& sequence = job.sequence;
      if (leader) {
        const int first_key = sequence.first_key + job.tile * kBlockN;
        shared.rings.kv.wait_empty(kv_at);
        ptx::Barrier* const arrived = shared.rings.kv.expect(kv_at, sizeof(TileK) + sizeof(TileV));
        shared.k[kv_at.stage()].load(&maps.k, arrived, first_key, along(params.k.head, job.head),
                                     along(params.k.batch, sequence.batch));
        shared.v[kv_at.stage()].load(&maps.v, arrived, first_key, along(params.v.head, job.head),
                                     along(params.v.batch, sequence.batch));
      }
      kv_at.advance();
#pragma unroll 1
      for (Walk walk(options, problem, job, band_of(problem, job)); !walk.done(); walk.advance()) {
        if (leader) {
          const int first_query = sequence.first_query + walk.block * kBlockM, stage = at.stage();
          const bool partial = is_partial(job, walk.block);
          shared.rings.q.wait_empty(at);
          shared.rings.dout.wait_empty(at);
          ptx::Barrier *q_arrived, *dout_arrived;
          if (partial) {
            q_arrived = dout_arrived = shared.rings.partial.expect(partial_at, sizeof(TileQ) + sizeof(TileDout));
          } else {
            q_arrived = shared.rings.q.expect(at, sizeof(TileQ));
            dout_arrived = shared.rings.dout.expect(at, sizeof(TileDout));
          }
          shared.q[stage].load(&maps.q, q_arrived, first_query, along(params.q.head, walk.head),
                               along(params.q.batch, sequence.batch));
          shared.dout[stage].load(&maps.dout, dout_arrived, first_query, along(params.dout.head, walk.head),
                                  along(params.dout.batch, sequence.batch));
        }
        at.advance();
        if (is_partial(job, walk.block)) partial_at.advance();
      }
      job = jobs.job(uniform(index));
    }
  }

  // Run by another warp.
  static __device__ __forceinline__ void load_rows(const Arrays& arrays, const BwdParams& params,
                                                   const Options& options, Shared& shared) {
    const Problem& problem = params.problem;
    typename Jobs::Position job_at;
    typename Ring::Position at;
    for (Job job; (job = shared.rings.jobs.template take<Options>(job_at, problem)).tile != Job::kNoTile;) {
      for (Walk walk(options, problem, job, band_of(problem, job)); !walk.done(); walk.advance()) {
        const RowStatistics statistics(arrays.lse, arrays.delta, params, job.sequence, walk.head);
        shared.rings.q.wait_empty(at);
        Rows& rows = shared.rows[at.stage()];
#pragma unroll
        for (int i = 0; i < kBlockM; i += 32) {
          const int row = i + threadIdx.x % 32;
          rows.lse_log2[row] = statistics.lse_of(walk.block * kBlockM + row) * kLog2e;
          rows.delta[row] = statistics.delta_of(walk.block * kBlockM + row);
        }
        shared.rings.q.fill(at);
        at.advance();
      }
    }
  }

  // Rows behind a packed sequence belong to others: a weight of 0 times what they hold may be NaN.
  static __device__ __forceinline__ bool is_partial(const Job& job, int block) {
    return Options::kPacked && job.sequence.seqlen_q < (block + 1) * kBlockM;
  }

  // Run by two more warps: they copy arrays of pairs, and the first clears queries that do not belong to a sequence.
  static __device__ __forceinline__ void help(const BwdParams& params, const Options& options, Shared& shared) {
    const Problem& problem = params.problem;
    const bool first_warp = uniform(threadIdx.x / 32) == 0, leader = threadIdx.x % 32 == 0;
    typename Jobs::Position job_at;
    typename Ring::Position at;
    typename Ring::Position partial_at;
    typename RingPairs::Position pairs_at;
    for (Job job; (job = shared.rings.jobs.template take<Options>(job_at, problem)).tile != Job::kNoTile;) {
      for (Walk walk(options, problem, job, band_of(problem, job)); !walk.done(); walk.advance()) {
        if (first_warp && is_partial(job, walk.block)) {
          const int first_row = larger(0, job.sequence.seqlen_q - walk.block * kBlockM);
          shared.rings.partial.wait_full(partial_at);
          shared.q[at.stage()].clear(first_row, kBlockM);
          shared.dout[at.stage()].clear(first_row, kBlockM);
          ptx::async_proxy_fence();
          __syncwarp();
          if (leader) {
            shared.rings.q.fill(at);
            shared.rings.dout.fill(at);
          }
          partial_at.advance();
        }
        at.advance();
        if constexpr (kLoadsPairs) {
          shared.rings.pairs.wait_empty(pairs_at);
          Options here = options;
          here.enter(job.sequence, walk.head);
          here.template load<kBlockM, kBlockN, 64>(shared.pairs[pairs_at.stage()].memory, walk.block * kBlockM,
                                                   job.tile * kBlockN);
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
          shared.rings.pairs.fill(pairs_at);
          pairs_at.advance();
        }
      }
    }
  }

  // ---- Products

  // Scores, or their gradients: sum = a b^T over `kDepth` columns of both, of 64 rows of a.
  template <int kDepth, class TileA, class TileB>
  static __device__ __forceinline__ void multiply(Scores& sum, const TileA& a, int row, const TileB& b) {
    ptx::wgmma_fence();
#pragma unroll
    for (int col = 0; col < kDepth; col += 16) {
      ptx::Wgmma<Element, kBlockM>::template multiply<false, false>(sum.x, a.along(row, col), b.along(0, col), col > 0);
    }
    ptx::wgmma_commit();
  }

  // dK or dV: sum += a b, over the rows of b.
  template <class Sum, class Tile>
  static __device__ __forceinline__ void add(Sum& sum, const Factor& a, const Tile& b) {
    ptx::wgmma_fence();
#pragma unroll
    for (int row = 0; row < kBlockM; row += 16) {
      ptx::Wgmma<Element, 2 * Sum::kNumElements>::template multiply<true>(sum.x, a.x[row / 16], b.across(row), true);
    }
    ptx::wgmma_commit();
  }

  // dQ = dS K, as far as it is this consumer's part.
  static __device__ __forceinline__ void multiply_keys(GradQ& dq, const TileDs& ds, const TileK& k, int consumer) {
    ptx::wgmma_fence();
#pragma unroll
    for (int key = 0; key < kBlockN; key += 16) {
      ptx::Wgmma<Element, Sums::kCols>::template multiply<true, true>(
          dq.x, ds.across(key, Sums::first_query(consumer)), k.across(key, Sums::first_col(consumer)), key > 0);
    }
    ptx::wgmma_commit();
  }

  // ---- The algorithm

  static __device__ __forceinline__ void consume(const Arrays& arrays, const BwdParams& params, const Options& options,
                                                 Shared& shared) {
    const Problem& problem = params.problem;
    const int consumer = uniform(threadIdx.x / 128 - 1);
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const bool leader = lane == 0;
    typename Jobs::Position job_at;
    typename RingKv::Position kv_at;
    typename Ring::Position at;
    typename RingPairs::Position pairs_at;
    const auto release = [&](auto& ring, const auto& at) {
      if (leader) ring.release(at);
    };

    for (Job job; (job = shared.rings.jobs.template take<Options>(job_at, problem)).tile != Job::kNoTile;) {
      const Sequence& sequence = job.sequence;
      const Band band = band_of(problem, job);
      const int warpgroup_key = job.tile * kBlockN + 64 * consumer, warp_key = warpgroup_key + 16 * warp;
      const int first_key = warp_key + lane / 4, first_col = lane % 4 * 2;
      TileK& k = shared.k[kv_at.stage()];
      const TileV& v = shared.v[kv_at.stage()];
      GradK dk;
      GradV dv;
      dk.clear();
      dv.clear();
      bool hides_pairs = false;

      Scores scores;
      const auto start_scores = [&](const auto& at) {
        multiply<kHeadDim>(scores, k, 64 * consumer, shared.q[at.stage()]);
      };
      shared.rings.kv.wait_full(kv_at);
      if (Options::kPacked) clear_keys(k, sequence, warp_key, 64 * consumer + 16 * warp);
      Walk walk(options, problem, job, band);
      if (kStartsAhead && !walk.done()) {
        shared.rings.q.wait_full(at);
        start_scores(at);
      }
#pragma unroll 1
      while (!walk.done()) {
        const int first_query = walk.block * kBlockM, stage = at.stage();
        Options here = options;
        here.enter(sequence, walk.head);
        const Pairs<Options> pairs = {here, band, problem.softmax_scale};
        Scores dscores;  // at first the gradients of the weights
        Factor weights, factor;
        GradQ dq;
        unsigned survivors[Gradients::kSurvivorWords];

        if constexpr (!kStartsAhead) {
          shared.rings.q.wait_full(at);
          start_scores(at);
        }
        ptx::wgmma_wait<0>();
        shared.rings.dout.wait_full(at);
        multiply<kHeadDimV>(dscores, v, 64 * consumer, shared.dout[stage]);
        if constexpr (kLoadsPairs) shared.rings.pairs.wait_full(pairs_at);
        here.template look_at<kBlockM, kBlockN>(shared.pairs[pairs_at.stage()].memory, first_query, job.tile * kBlockN);
        const bool all_visible =
            band.all_visible({first_query, first_query + kBlockM}, {warpgroup_key, warpgroup_key + 64}) &&
            first_query + kBlockM <= sequence.seqlen_q && (!Options::kHidesPairs || here.shows_all());
        hides_pairs |= !all_visible;
        const Gradients gradients = {pairs, first_query + first_col, first_key, shared.rows[stage], first_col};
        gradients.weigh(scores, weights, all_visible, survivors);
        if constexpr (kLoadsPairs) {
          __syncwarp();
          release(shared.rings.pairs, pairs_at);
          pairs_at.advance();
        }
        add(dv, weights, shared.dout[stage]);
        ptx::wgmma_wait<1>();
        gradients.differentiate(dscores, scores, weights, survivors);
        factor.round(dscores);
        store(shared.ds[at.count() % 2], factor, 64 * consumer + 16 * warp);
        ptx::async_proxy_fence();
        ptx::named_barrier_sync(1, 128 * kNumConsumers);  // dS of both consumers is there
        multiply_keys(dq, shared.ds[at.count() % 2], k, consumer);
        add(dk, factor, shared.q[stage]);
        if constexpr (kDeterministic) QuerySums(arrays, problem, job, band, walk, consumer).await_turn();

        ptx::wgmma_wait<1>();
        release(shared.rings.dout, at);
        const QuerySums sums(arrays, problem, job, band, walk, consumer);
        sums.add(dq);
        auto next = at;
        next.advance();
        walk.advance();
        if constexpr (kStartsAhead) {
          if (!walk.done()) shared.rings.q.wait_full(next);
          start_scores(next);  // after the last tile nobody asks for them
        }
        if constexpr (kDeterministic) sums.pass_turn();
        ptx::wgmma_wait<kStartsAhead ? 1 : 0>();
        release(shared.rings.q, at);
        at = next;
      }
      ptx::wgmma_wait<0>();
      release(shared.rings.kv, kv_at);
      kv_at.advance();

      const Matrix<Element> dk_out(arrays.dk, params.dk, sequence.batch, job.head, sequence.first_key,
                                   sequence.num_keys, problem.head_dim);
      const Matrix<Element> dv_out(arrays.dv, params.dv, sequence.batch, job.head, sequence.first_key,
                                   sequence.num_keys, problem.head_dim_v);
      const float scale[2] = {problem.softmax_scale, problem.softmax_scale}, one[2] = {1.0f, 1.0f};
      const bool dk_finite = store_rows_16<true>(dk_out, dk, scale, first_key);
      const bool dv_finite = store_rows_16(dv_out, dv, one, first_key);
      // 0 * NaN is NaN: where pairs are hidden, queries that others see may have spoiled all keys, and values their
      // own.
      if (hides_pairs && !(dk_finite && dv_finite)) {
        arrays.spoiled[Options::template key_tile<kBlockN>(problem, sequence, job.head, job.tile)] = 1;
      }
    }
  }

  // Keys behind those in use are hidden, but a gradient of 0 times what they hold may be NaN. Each warp clears its own.
  static __device__ __forceinline__ void clear_keys(TileK& k, const Sequence& sequence, int warp_key, int row) {
    const int first = clamp(sequence.seqlen_k - warp_key, 0, 16);
    if (first == 16) return;
    k.clear(row + first, row + 16);
    ptx::async_proxy_fence();
  }

  // A warp's 16 rows of dS, with the swizzle of the tile.
  static __device__ __forceinline__ void store(TileDs& tile, const Factor& ds, int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane % 16;
#pragma unroll
    for (int i = 0; i < kBlockM / 16; ++i) ptx::stmatrix(tile.piece(row, 16 * i + lane / 16 * 8), ds.x[i]);
  }

  // Where the sums of a part of dQ are, and whose turn it is to add to them. In a fixed order, if need be: the last
  // keys first. They begin with the latest queries, so that blocks seldom wait, and only for jobs that were taken
  // before.
  struct QuerySums {
    float4* pieces;  // of this thread
    unsigned* turn;
    unsigned before;  // blocks that add earlier
    int consumer;

    __device__ __forceinline__ QuerySums(const Arrays& arrays, const Problem& problem, const Job& job, const Band& band,
                                         const Walk& walk, int consumer)
        : consumer(consumer) {
      const long long tile = Options::template query_tile<kBlockM>(problem, job.sequence, walk.head, walk.block);
      pieces = Sums::pieces(arrays.dq_sums, tile, consumer, threadIdx.x % 128);
      turn = arrays.turns + tile * 2 + consumer;
      before = (band.keys_of({walk.block * kBlockM, (walk.block + 1) * kBlockM}).end - 1) / kBlockN - job.tile;
    }

    __device__ __forceinline__ void await_turn() const {
      while (threadIdx.x % 128 == 0 && ptx::load_acquire(turn) != before) {
      }
      ptx::named_barrier_sync(2 + consumer, 128);
    }

    __device__ __forceinline__ void add(const GradQ& dq) const {
#pragma unroll
      for (int i = 0; i < Sums::kPieces; ++i) {
        ptx::add_16(pieces + i * 128, dq.x[4 * i], dq.x[4 * i + 1], dq.x[4 * i + 2], dq.x[4 * i + 3]);
      }
    }

    __device__ __forceinline__ void pass_turn() const {
      ptx::named_barrier_sync(2 + consumer, 128);  // all have added
      if (threadIdx.x % 128 == 0) ptx::add_release(turn, 1);
    }
  };
};

}  // namespace cuflash
