// What the kernels of the Hopper backward share: a block's jobs, its tiles in shared memory, the warps that copy them
// there, and the way out (sm_90a).
#pragma once

#include <cuflash/attention/backward_maps.cuh>
#include <cuflash/attention/job_ring.cuh>
#include <cuflash/attention/query_walk.cuh>
#include <cuflash/attention/recompute.cuh>
#include <cuflash/attention/score_gradients.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/ptx/warpgroup.cuh>
#include <cuflash/tile/row_store.cuh>
#include <cuflash/tile/swizzled_tile.cuh>

namespace cuflash {

// A block stays on its multiprocessor and takes one job after another: kBlockN keys of one key/value head, and the
// queries that see them, in tiles of kBlockM, of every query head of the group. Warps of their own copy what is needed
// to shared memory, ahead of two consumers.
template <class Element, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kStagesKv,
          int kStages, int kStagesPairs, class Handed>
struct BackwardBlock {
  static constexpr int kNumConsumers = 2, kNumThreads = 128 * (1 + kNumConsumers);
  static_assert(kStages > 1, "the next scores are started before a tile is released");

  using Rows = RowsOfTile<kBlockM>;
  using TileQ = SwizzledTile<Element, kBlockM, kHeadDim>;
  using TileDout = SwizzledTile<Element, kBlockM, kHeadDimV>;
  using TileK = SwizzledTile<Element, kBlockN, kHeadDim>;
  using TileV = SwizzledTile<Element, kBlockN, kHeadDimV>;

  // Registers are few: rings in their compact form.
  using RingKv = Pipeline<kStagesKv, true>;
  using Ring = Pipeline<kStages, true>;
  using RingPairs = Pipeline<kStagesPairs, true>;
  using Jobs = JobRing<2 * kStagesKv, true>;
  // What options know of pairs, which is brought ahead of the consumers: arrays by two warps, and which weights survive
  // by all four that do not compute; and whether those two have anything to do.
  using Survivors = SurvivorTile<kBlockM, kBlockN>;
  static constexpr int kArrayBytes = Options::template kTileBytes<kBlockM, kBlockN>;
  static constexpr int kPairBytes = kArrayBytes + (Options::kHasDropout ? sizeof(Survivors) : 0);
  static constexpr bool kLoadsPairs = kPairBytes > 0;
  static constexpr bool kHelps = kLoadsPairs || Options::kPacked;

  // Blocks that share arrays of pairs find them in L2 if they keep step.
  using Walk = QueryWalk<kBlockM, kBlockN, Options, kArrayBytes == 0>;

  // Of each thread. The kernel starts with as many for all as fit into the 64 K of a multiprocessor. Consumers that
  // have both dK and dV of 128 columns leave the fewest to the others.
  static constexpr bool kLeavesFew = kHeadDim > 64 && kBlockN == 128;
  static constexpr int kProducerRegisters = !kLeavesFew && (kHelps || (kHeadDim <= 64 && kBlockM == 64)) ? 40 : 24;
  static constexpr int kConsumerRegisters = 256 - (kProducerRegisters + 8) / 2;

  struct alignas(16) TileOfPairs {
    unsigned char memory[larger(kPairBytes, 16)];

    // Behind the arrays.
    __device__ __forceinline__ Survivors& survivors() { return *reinterpret_cast<Survivors*>(memory + kArrayBytes); }
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
    Handed handed;  // by consumers to each other; an empty struct takes 16 bytes
    TileOfPairs pairs[kStagesPairs];
    Rows rows[kStages];
    Rings rings;
  };
  // Without the padding that makes the struct a multiple of 1024.
  static constexpr int kSharedBytes = (sizeof(TileK) + sizeof(TileV)) * kStagesKv +
                                      (sizeof(TileQ) + sizeof(TileDout) + sizeof(Rows)) * kStages +
                                      larger(sizeof(Handed), 16) + sizeof(TileOfPairs) * kStagesPairs + sizeof(Rings);

  struct Arrays {
    const float *lse_log2, *delta;  // both with the strides of delta
    float* dq_sums;                 // of bwd_sm90 alone
    unsigned* spoiled;              // of each tile of keys, whether its gradients must be computed once more
    Element *dk, *dv;
    unsigned* counter;  // 0 before and after the kernel
  };

  // Starts the rings, then each warp does its part: `consume` is that of two warpgroups, of which so many warps ask for
  // pairs.
  template <class Consume>
  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdSm90Params& all, const Options& options,
                                             int num_warps_of_pairs, const Consume& consume) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    const BwdParams& params = all.bwd;
    const BwdMaps& maps = all.maps;
    if (threadIdx.x == 0) {
      ptx::tma_prefetch(&maps.q);
      ptx::tma_prefetch(&maps.k);
      ptx::tma_prefetch(&maps.v);
      ptx::tma_prefetch(&maps.dout);
      const int num_warps = 4 * kNumConsumers;  // wgmma ends warp by warp: each releases what it has read
      shared.rings.kv.init(num_warps);
      shared.rings.q.init(num_warps, 1 + 64);  // every lane copies rows
      shared.rings.dout.init(num_warps);
      // Every lane copies, and arrives twice; and the warps that load draw.
      shared.rings.pairs.init(num_warps_of_pairs, 2 * 64 + (Options::kHasDropout ? 2 : 0));
      shared.rings.partial.init(1);
      shared.rings.jobs.init(num_warps + (kHelps ? 3 : 1));
      if constexpr (Options::kHasDropout) {
        Dropout dropout = options.dropout;
        dropout.enter({}, 0);
        for (TileOfPairs& tile : shared.pairs) tile.survivors().keys.fill(dropout.key_of_seed());
      }
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
      consume(shared);
    }
  }

  // ---- Loads

  static __device__ __forceinline__ Band band_of(const Problem& problem, const Job& job) {
    return problem.band(job.sequence.seqlen_q, job.sequence.seqlen_k);
  }

  // Run by one warp, which also asks for jobs.
  static __device__ __forceinline__ void load(const Arrays& arrays, const BwdMaps& maps, const BwdParams& params,
                                              const Options& options, Shared& shared) {
    const Problem& problem = params.problem;
    const bool leader = threadIdx.x % 32 == 0;
    const JobCounter<KeyJobs<kBlockN>, Options> jobs(options, problem, arrays.counter);
    typename Jobs::Position job_at;
    typename RingKv::Position kv_at;
    typename Ring::Position at;
    typename Ring::Position partial_at;
    typename RingPairs::Position pairs_at;
    for (Job job = jobs.job(blockIdx.x);;) {
      shared.rings.jobs.put(job_at, job);
      if (job.tile == Job::kNoTile) break;
      const unsigned index = jobs.ask();  // the answer comes while the tiles are loaded
      const Sequence& sequence = job.sequence;
      if (leader) {
        const int first_key = sequence.first_key + job.tile * kBlockN;
        shared.rings.kv.wait_empty(kv_at);
        ptx::Barrier* const arrived = shared.rings.kv.expect(kv_at, sizeof(TileK) + sizeof(TileV));
        shared.k[kv_at.stage()].load(&maps.k, arrived, params.k, sequence.batch, job.head, first_key);
        shared.v[kv_at.stage()].load(&maps.v, arrived, params.v, sequence.batch, job.head, first_key);
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
          shared.q[stage].load(&maps.q, q_arrived, params.q, sequence.batch, walk.head, first_query);
          shared.dout[stage].load(&maps.dout, dout_arrived, params.dout, sequence.batch, walk.head, first_query);
        }
        at.advance();
        if (is_partial(job, walk.block)) partial_at.advance();
        draw_survivors_too(options, job, walk, shared, pairs_at);
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
    typename RingPairs::Position pairs_at;
    const auto copy = [](float* to, const float* from, bool inside) {
      if constexpr (Options::kSkipsBlocks) {  // else ptxas keeps positions of all warps out of uniform registers
        *to = inside ? *from : 0.0f;
      } else {
        ptx::cp_async_4(to, from, inside);
      }
    };
    for (Job job; shared.rings.jobs.template take<Options>(job, job_at, problem);) {
      for (Walk walk(options, problem, job, band_of(problem, job)); !walk.done(); walk.advance()) {
        const Sequence& sequence = job.sequence;
        shared.rings.q.wait_empty(at);
        Rows& rows = shared.rows[at.stage()];
        const long long first =
            sequence.batch * params.delta.batch + walk.head * params.delta.head + sequence.first_query;
#pragma unroll
        for (int i = 0; i < kBlockM; i += 32) {  // rows behind the end are hidden: zeros will do
          const int to = i + threadIdx.x % 32, row = walk.block * kBlockM + to;
          copy(rows.lse_log2 + to, arrays.lse_log2 + first + row, row < sequence.seqlen_q);
          copy(rows.delta + to, arrays.delta + first + row, row < sequence.seqlen_q);
        }
        shared.rings.q.fill_by_copies(at);
        at.advance();
        draw_survivors_too(options, job, walk, shared, pairs_at);
      }
    }
  }

  // Rows behind a packed sequence belong to others: a weight of 0 times what they hold may be NaN.
  static __device__ __forceinline__ bool is_partial(const Job& job, int block) {
    return Options::kPacked && job.sequence.seqlen_q < (block + 1) * kBlockM;
  }

  // Run by two more warps: they bring what options know of pairs, and the first clears queries that do not belong to a
  // sequence.
  static __device__ __forceinline__ void help(const BwdParams& params, const Options& options, Shared& shared) {
    const Problem& problem = params.problem;
    const bool first_warp = uniform(threadIdx.x / 32) == 0, leader = threadIdx.x % 32 == 0;
    typename Jobs::Position job_at;
    typename Ring::Position at;
    typename Ring::Position partial_at;
    typename RingPairs::Position pairs_at;
    for (Job job; shared.rings.jobs.template take<Options>(job, job_at, problem);) {
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
          TileOfPairs& tile = shared.pairs[pairs_at.stage()];
          const int first_query = walk.block * kBlockM, first_key = job.tile * kBlockN;
          here.template load<kBlockM, kBlockN, 64>(tile.memory, first_query, first_key);
          if constexpr (Options::kHasDropout) {
            draw_survivors(options, job, walk, shared, pairs_at);
          }
          shared.rings.pairs.fill_by_copies(pairs_at);
          pairs_at.advance();
        }
      }
    }
  }

  // Which weights survive: the part of one of four warps.
  static __device__ __forceinline__ void draw_survivors(const Options& options, const Job& job, const Walk& walk,
                                                        Shared& shared, const typename RingPairs::Position& at) {
    Dropout dropout = options.dropout;
    dropout.batch = job.sequence.batch;
    dropout.head = walk.head;
    shared.pairs[at.stage()].survivors().template draw<4>(dropout, walk.block * kBlockM, job.tile * kBlockN,
                                                          uniform(threadIdx.x / 32));
  }

  // The same for a warp that loads: each has time for it while the copies it started are under way.
  static __device__ __forceinline__ void draw_survivors_too(const Options& options, const Job& job, const Walk& walk,
                                                            Shared& shared, typename RingPairs::Position& at) {
    if constexpr (Options::kHasDropout) {
      shared.rings.pairs.wait_empty(at);
      draw_survivors(options, job, walk, shared, at);
      __syncwarp();
      if (threadIdx.x % 32 == 0) shared.rings.pairs.fill(at);
      at.advance();
    }
  }

  // ---- For the consumers

  // Of a tile of queries and some keys. Queries behind the end are hidden.
  static __device__ __forceinline__ AllVisible all_visible(const Options& options, const Band& band, int seqlen_q,
                                                           int first_query, const Range& keys) {
    const Range queries = {first_query, first_query + kBlockM};
    return {band.all_visible(queries, keys) && queries.end <= seqlen_q, !Options::kHidesPairs || options.shows_all()};
  }

  // Which weights survive of the pairs of a warp's 16 keys, of the tile at hand.
  static __device__ __forceinline__ KeptElements<kBlockM> survivors(TileOfPairs& pairs, int warp_row, int lane) {
    if constexpr (Options::kHasDropout) {
      return pairs.survivors().of_keys(warp_row, lane);
    } else {
      return {};
    }
  }

  // A warp has looked at what options know of the pairs of a tile.
  static __device__ __forceinline__ void release_pairs(Rings& rings, typename RingPairs::Position& at, int lane) {
    if constexpr (kLoadsPairs) {
      __syncwarp();
      if (lane == 0) rings.pairs.release(at);
      at.advance();
    }
  }

  // Keys behind those in use of a packed sequence are hidden, but 0 times what they and their values hold may be NaN.
  // Each warp clears its own.
  template <class Tile>
  static __device__ __forceinline__ void clear_keys(Tile& tile, const Sequence& sequence, int warp_key, int row) {
    if constexpr (Options::kPacked) {
      const int num_keys = sequence.seqlen_k - warp_key;
      if (num_keys >= 16) return;
      tile.clear(row + max(num_keys, 0), row + 16);
      ptx::async_proxy_fence();
    }
  }

  // Writes rows of dK, times the scale of scores, and of dV, times the factor of weights that survive; false if this
  // lane's part is not finite.
  static __device__ __forceinline__ bool write_dk(const Arrays& arrays, const BwdParams& params, const Job& job,
                                                  const WarpgroupTile<kHeadDim>& dk, int first_key) {
    const Problem& problem = params.problem;
    const Matrix<Element> out(arrays.dk, params.dk, job.sequence.batch, job.head, job.sequence.first_key,
                              job.sequence.num_keys, problem.head_dim);
    const float scale[2] = {problem.softmax_scale, problem.softmax_scale};
    return store_vectorized_rows<16, true>(out, dk, scale, first_key);
  }
  static __device__ __forceinline__ bool write_dv(const Arrays& arrays, const BwdParams& params, const Options& options,
                                                  const Job& job, const WarpgroupTile<kHeadDimV>& dv, int first_key) {
    const Matrix<Element> out(arrays.dv, params.dv, job.sequence.batch, job.head, job.sequence.first_key,
                              job.sequence.num_keys, params.problem.head_dim_v);
    const float factor = options.survivor_factor(), factors[2] = {factor, factor};
    return store_vectorized_rows<16>(out, dv, factors, first_key);
  }

  // Gradients that are not finite must be computed once more where pairs are hidden: 0 * NaN is NaN, so queries that
  // others see may have spoiled all keys, and values their own.
  static __device__ __forceinline__ void note_spoiled(const Arrays& arrays, const Problem& problem, const Job& job) {
    arrays.spoiled[Options::template key_tile<kBlockN>(problem, job.sequence, job.head, job.tile)] = 1;
  }
};

}  // namespace cuflash
