// What the Hopper forward does besides computing, and the kernel for dQ alone: a block's jobs, its tiles in shared
// memory, and the warps that copy them there (sm_90a).
#pragma once

#include <cuflash/attention/careful_row.cuh>
#include <cuflash/attention/job_ring.cuh>
#include <cuflash/attention/key_blocks.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/ptx/warpgroup.cuh>
#include <cuflash/tile/swizzled_tile.cuh>
#include <cuflash/tile/turn.cuh>

namespace cuflash {

// What may come along with Q; none where there are no columns, since an empty base takes no place.
template <class Element, int kBlockM, int kCols, int kStages>
struct MoreQueries {
  SwizzledTile<Element, kBlockM, kCols> more[kStages];
};
template <class Element, int kBlockM, int kStages>
struct MoreQueries<Element, kBlockM, 0, kStages> {};

// A block stays on its multiprocessor and takes one job after another: kBlockM rows of one head's output. Two warps
// copy Q, K and V to shared memory, ahead of the consumers: kBlockM / 64 warpgroups with 64 rows each. Other arrays may
// have these parts: then more of the same queries may come along with Q, of so many columns.
template <class Element, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kStagesQ,
          int kStagesK, int kStagesV, int kStagesPairs, int kMoreCols = 0>
struct ForwardBlock {
  static constexpr int kNumConsumers = kBlockM / 64;
  static constexpr int kNumThreads = 128 * (1 + kNumConsumers);
  // Of each thread. The kernel starts with as many for all as fit into the 64 K of a multiprocessor.
  static constexpr int kProducerRegisters = kNumConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kNumConsumers == 3 ? 160 : 232;

  using TileQ = SwizzledTile<Element, kBlockM, kHeadDim>;
  using TileK = SwizzledTile<Element, kBlockN, kHeadDim>;
  using TileV = SwizzledTile<Element, kBlockN, kHeadDimV>;
  using Blocks = KeyBlocks<kBlockM, kBlockN>;
  // The registers of three consumers are few.
  static constexpr bool kCompact = kNumConsumers == 3;
  using RingQ = Pipeline<kStagesQ, kCompact>;
  using RingK = Pipeline<kStagesK, kCompact>;
  using RingV = Pipeline<kStagesV, kCompact>;
  using RingPairs = Pipeline<kStagesPairs>;
  using Jobs = JobRing<kStagesQ + 2, kCompact>;
  using Careful = CarefulHead<Element, Options>;
  using Turn = cuflash::Turn<kNumConsumers>;

  // Arrays of pairs, which two warps copy ahead of the consumers.
  static constexpr int kPairBytes = Options::template kTileBytes<kBlockM, kBlockN>;
  static constexpr bool kLoadsPairs = kPairBytes > 0;
  // Whether those two warps have anything to do.
  static constexpr bool kHelps = kLoadsPairs || Options::kPacked;
  // With a second place for Q, the next job begins before the epilogue of the one at hand.
  static constexpr bool kOverlapsJobs = kStagesQ > 1;

  struct alignas(16) TileOfArrays {
    unsigned char memory[larger(kPairBytes, 16)];
  };
  struct Rings {
    RingQ q;
    RingK k;
    RingV v;
    RingV partial;  // values of which only a part is kept
    RingPairs pairs;
    Jobs jobs;
  };
  struct Shared : MoreQueries<Element, kBlockM, kMoreCols, kStagesQ> {
    TileQ q[kStagesQ];
    TileK k[kStagesK];
    TileV v[kStagesV];
    TileOfArrays pairs[kStagesPairs];
    typename Careful::Memory careful[4 * kNumConsumers];
    typename Blocks::Visited visited[kStagesK];  // which block a stage of K is, where options skip some
    Rings rings;
  };
  // Without the padding that makes the struct a multiple of 1024.
  static constexpr int kQueryBytes = sizeof(TileQ) + kBlockM * kMoreCols * sizeof(Element);
  static constexpr int kSharedBytes = kQueryBytes * kStagesQ + sizeof(TileK) * kStagesK + sizeof(TileV) * kStagesV +
                                      sizeof(TileOfArrays) * kStagesPairs + sizeof(Shared::careful) +
                                      sizeof(Shared::visited) + sizeof(Rings);

  static_assert(kBlockM % 64 == 0 && kNumConsumers >= 1 && kNumConsumers <= 3 && kBlockN % 16 == 0);

  // An array, as TMA sees it.
  struct Input {
    const ptx::TensorMap* map;
    Strides strides;
  };
  struct Inputs {
    Input q, k, v;
    Input more;  // with kMoreCols
  };

  // Starts the rings, then each warp does its part: `consume` is that of the consumers. The counter is 0 before and
  // after the kernel.
  template <class Consume>
  static __device__ __forceinline__ void run(const Inputs& inputs, unsigned* counter, const Problem& problem,
                                             const Options& options, const Consume& consume) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    if (threadIdx.x == 0) {
      ptx::tma_prefetch(inputs.q.map);
      ptx::tma_prefetch(inputs.k.map);
      ptx::tma_prefetch(inputs.v.map);
      if constexpr (kMoreCols > 0) ptx::tma_prefetch(inputs.more.map);
      const int num_warps = 4 * kNumConsumers;  // wgmma ends warp by warp: each releases what it has read
      shared.rings.q.init(num_warps);
      shared.rings.k.init(num_warps);
      shared.rings.v.init(num_warps);
      shared.rings.pairs.init(num_warps, 2 * 64);  // every lane copies, and arrives twice
      shared.rings.partial.init(1);
      shared.rings.jobs.init(num_warps + (kHelps ? 3 : 1));
      ptx::barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      ptx::release_registers<kProducerRegisters>();
      if (threadIdx.x < 64) {
        if constexpr (kHelps) help(problem, options, shared);
      } else if (threadIdx.x < 96) {
        load_queries_and_keys(inputs, counter, problem, options, shared);
      } else {
        load_values(inputs.v, problem, options, shared);
      }
    } else {
      ptx::acquire_registers<kConsumerRegisters>();
      consume(shared);
    }
  }

  // ---- Loads

  // Run by one warp, which also asks for jobs.
  static __device__ __forceinline__ void load_queries_and_keys(const Inputs& inputs, unsigned* counter,
                                                               const Problem& problem, const Options& options,
                                                               Shared& shared) {
    const bool leader = threadIdx.x % 32 == 0;
    const JobCounter<QueryJobs<kBlockM>, Options> jobs(options, problem, counter);
    typename Jobs::Position job_at;
    typename RingQ::Position q_at;
    typename RingK::Position k_at;

    const auto next_job = [&](int index) {
      const Job job = jobs.job(index);
      shared.rings.jobs.put(job_at, job);
      return job;
    };
    const auto load_queries = [&](const Job& job) {
      if (leader && job.tile != Job::kNoTile) {
        shared.rings.q.wait_empty(q_at);
        ptx::Barrier* const arrived = shared.rings.q.expect(q_at, kQueryBytes);
        const auto load = [&](auto& tile, const Input& input) {
          tile.load(input.map, arrived, input.strides, job.sequence.batch, job.head,
                    job.sequence.first_query + job.tile * kBlockM);
        };
        load(shared.q[q_at.stage()], inputs.q);
        if constexpr (kMoreCols > 0) load(shared.more[q_at.stage()], inputs.more);
      }
      q_at.advance();
    };

    Job job = next_job(blockIdx.x), next;
    load_queries(job);
    while (job.tile != Job::kNoTile) {
      const unsigned index = jobs.ask();  // the answer comes while keys are loaded
      const int head_kv = job.head / problem.group_size();
      Blocks::for_each(options, problem, job, [&](const Options&, const typename Blocks::Visited& visited, bool last) {
        if (last) {
          next = next_job(uniform(index));
          if (kOverlapsJobs) load_queries(next);
        }
        if (leader) {
          shared.rings.k.wait_empty(k_at);
          if constexpr (Options::kSkipsBlocks) shared.visited[k_at.stage()] = visited;
          shared.k[k_at.stage()].load(inputs.k.map, shared.rings.k.expect(k_at, sizeof(TileK)), inputs.k.strides,
                                      job.sequence.batch, head_kv, job.sequence.first_key + visited.block * kBlockN);
        }
        k_at.advance();
      });
      if (!kOverlapsJobs) load_queries(next);
      job = next;
    }
  }

  // Run by another warp.
  static __device__ __forceinline__ void load_values(const Input& input, const Problem& problem, const Options& options,
                                                     Shared& shared) {
    const bool leader = threadIdx.x % 32 == 0;
    typename Jobs::Position job_at;
    typename RingV::Position at, partial_at;
    for (Job job; shared.rings.jobs.template take<Options>(job, job_at, problem);) {
      const int head_kv = job.head / problem.group_size();
      Blocks::for_each(options, problem, job, [&](const Options&, const typename Blocks::Visited& visited, bool) {
        const int block = visited.block;
        const bool partial = is_partial(job, block);
        if (leader) {
          shared.rings.v.wait_empty(at);
          ptx::Barrier* const arrived = partial ? shared.rings.partial.expect(partial_at, sizeof(TileV))
                                                : shared.rings.v.expect(at, sizeof(TileV));
          shared.v[at.stage()].load(input.map, arrived, input.strides, job.sequence.batch, head_kv,
                                    job.sequence.first_key + block * kBlockN);
        }
        at.advance();
        if (partial) partial_at.advance();
      });
    }
  }

  // Rows behind a packed sequence belong to others: a weight of 0 times what they hold may be NaN.
  static __device__ __forceinline__ bool is_partial(const Job& job, int block) {
    return Options::kPacked && job.sequence.seqlen_k < (block + 1) * kBlockN;
  }

  // Run by two more warps: they copy arrays of pairs, and the first clears values that do not belong to a sequence.
  static __device__ __forceinline__ void help(const Problem& problem, const Options& options, Shared& shared) {
    const bool first_warp = uniform(threadIdx.x / 32) == 0, leader = threadIdx.x % 32 == 0;
    typename Jobs::Position job_at;
    typename RingV::Position v_at, partial_at;
    typename RingPairs::Position pairs_at;
    for (Job job; shared.rings.jobs.template take<Options>(job, job_at, problem);) {
      Blocks::for_each(options, problem, job, [&](const Options& here, const typename Blocks::Visited& visited, bool) {
        const int block = visited.block;
        if (first_warp && is_partial(job, block)) {
          shared.rings.partial.wait_full(partial_at);
          shared.v[v_at.stage()].clear(larger(0, job.sequence.seqlen_k - block * kBlockN), kBlockN);
          ptx::async_proxy_fence();
          __syncwarp();
          if (leader) shared.rings.v.fill(v_at);
          partial_at.advance();
        }
        v_at.advance();
        if constexpr (kLoadsPairs) {
          shared.rings.pairs.wait_empty(pairs_at);
          here.template load<kBlockM, kBlockN, 64>(shared.pairs[pairs_at.stage()].memory, job.tile * kBlockM,
                                                   block * kBlockN);
          shared.rings.pairs.fill_by_copies(pairs_at);
          pairs_at.advance();
        }
      });
    }
  }
};

}  // namespace cuflash
