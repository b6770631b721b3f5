// FlashAttention forward for Hopper: TMA copies, wgmma multiplies, and warpgroups share the work (FlashAttention-3,
// arXiv:2407.08608). docs/kernels.md draws it.
#pragma once

#include <cuflash/attention/careful_row.cuh>
#include <cuflash/attention/job_ring.cuh>
#include <cuflash/attention/key_blocks.cuh>
#include <cuflash/attention/register_softmax.cuh>
#include <cuflash/common/shared_memory.cuh>
#include <cuflash/ptx/warpgroup.cuh>
#include <cuflash/tile/row_store.cuh>
#include <cuflash/tile/swizzled_tile.cuh>

namespace cuflash {

// Where TMA finds the inputs, and in boxes of which sizes.
struct QkvMaps {
  ptx::TensorMap q, k, v;
};

// One struct, because each argument costs the host time (mirrored in cuflash/_params.py).
struct FwdSm90Params {
  FwdParams fwd;
  const void *q, *k, *v;
  QkvMaps maps;
};

// A block stays on its multiprocessor and takes one job after another: kBlockM rows of one head's output. Two warps
// copy Q, K and V to shared memory, ahead of the consumers: kBlockM / 64 warpgroups with 64 rows each. A consumer
// starts the next product Q K^T before the softmax of the one at hand, also across jobs; and consumers take turns, so
// that one multiplies while another exponentiates.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kStagesQ,
          int kStagesK, int kStagesV, int kStagesPairs>
struct FwdSm90 {
  using Element = typename Number::Element;

  static constexpr int kNumConsumers = kBlockM / 64;
  static constexpr int kNumThreads = 128 * (1 + kNumConsumers);
  // Of each thread. The kernel starts with as many for all as fit into the 64 K of a multiprocessor.
  static constexpr int kProducerRegisters = kNumConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kNumConsumers == 3 ? 160 : 232;

  using Scores = WarpgroupTile<kBlockN>;
  using Weights = WarpgroupFactor<Element, kBlockN>;
  using Output = WarpgroupTile<kHeadDimV>;
  using MultiplyK = ptx::Wgmma<Element, kBlockN>;
  using MultiplyV = ptx::Wgmma<Element, kHeadDimV>;
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
  struct Shared {
    TileQ q[kStagesQ];
    TileK k[kStagesK];
    TileV v[kStagesV];
    TileOfArrays pairs[kStagesPairs];
    typename Careful::Memory careful[4 * kNumConsumers];
    Rings rings;
  };
  // Without the padding that makes the struct a multiple of 1024.
  static constexpr int kSharedBytes = sizeof(TileQ) * kStagesQ + sizeof(TileK) * kStagesK + sizeof(TileV) * kStagesV +
                                      sizeof(TileOfArrays) * kStagesPairs + sizeof(Shared::careful) + sizeof(Rings);

  static_assert(kBlockM % 64 == 0 && kNumConsumers >= 1 && kNumConsumers <= 3 && kBlockN % 16 == 0);

  struct Results {
    Element* out;
    float* lse;         // may be null
    unsigned* counter;  // 0 before and after the kernel
  };
  struct Arrays : Results {
    const QkvMaps& maps;
    const Element *q, *k, *v;
  };

  static __device__ __forceinline__ void run(const Results& results, const FwdSm90Params& all, Options options) {
    const FwdParams& params = all.fwd;
    const Arrays arrays = {results, all.maps, static_cast<const Element*>(all.q), static_cast<const Element*>(all.k),
                           static_cast<const Element*>(all.v)};
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    if (threadIdx.x == 0) {
      ptx::tma_prefetch(&arrays.maps.q);
      ptx::tma_prefetch(&arrays.maps.k);
      ptx::tma_prefetch(&arrays.maps.v);
      const int num_warps = 4 * kNumConsumers;  // wgmma ends warp by warp: each releases what it has read
      shared.rings.q.init(num_warps);
      shared.rings.k.init(num_warps);
      shared.rings.v.init(num_warps);
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
        load_queries_and_keys(arrays, params, options, shared);
      } else {
        load_values(arrays, params, options, shared);
      }
    } else {
      ptx::acquire_registers<kConsumerRegisters>();
      consume(arrays, params, options, shared);
    }
  }

  // ---- Loads

  // Run by one warp, which also asks for jobs.
  static __device__ __forceinline__ void load_queries_and_keys(const Arrays& arrays, const FwdParams& params,
                                                               const Options& options, Shared& shared) {
    const Problem& problem = params.problem;
    const bool leader = threadIdx.x % 32 == 0;
    const JobCounter<QueryJobs<kBlockM>, Options> jobs(options, problem, arrays.counter);
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
        shared.q[q_at.stage()].load(&arrays.maps.q, shared.rings.q.expect(q_at, sizeof(TileQ)), params.q,
                                    job.sequence.batch, job.head, job.sequence.first_query + job.tile * kBlockM);
      }
      q_at.advance();
    };

    Job job = next_job(blockIdx.x), next;
    load_queries(job);
    while (job.tile != Job::kNoTile) {
      const unsigned index = jobs.ask();  // the answer comes while keys are loaded
      const int head_kv = job.head / problem.group_size();
      Blocks::for_each(options, problem, job, [&](const Options&, int block, bool last) {
        if (last) {
          next = next_job(uniform(index));
          if (kOverlapsJobs) load_queries(next);
        }
        if (leader) {
          shared.rings.k.wait_empty(k_at);
          shared.k[k_at.stage()].load(&arrays.maps.k, shared.rings.k.expect(k_at, sizeof(TileK)), params.k,
                                      job.sequence.batch, head_kv, job.sequence.first_key + block * kBlockN);
        }
        k_at.advance();
      });
      if (!kOverlapsJobs) load_queries(next);
      job = next;
    }
  }

  // Run by another warp.
  static __device__ __forceinline__ void load_values(const Arrays& arrays, const FwdParams& params,
                                                     const Options& options, Shared& shared) {
    const Problem& problem = params.problem;
    const bool leader = threadIdx.x % 32 == 0;
    typename Jobs::Position job_at;
    typename RingV::Position at, partial_at;
    for (Job job; (job = shared.rings.jobs.template take<Options>(job_at, problem)).tile != Job::kNoTile;) {
      const int head_kv = job.head / problem.group_size();
      Blocks::for_each(options, problem, job, [&](const Options&, int block, bool) {
        const bool partial = is_partial(job, block);
        if (leader) {
          shared.rings.v.wait_empty(at);
          ptx::Barrier* const arrived = partial ? shared.rings.partial.expect(partial_at, sizeof(TileV))
                                                : shared.rings.v.expect(at, sizeof(TileV));
          shared.v[at.stage()].load(&arrays.maps.v, arrived, params.v, job.sequence.batch, head_kv,
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
  static __device__ __forceinline__ void help(const FwdParams& params, const Options& options, Shared& shared) {
    const Problem& problem = params.problem;
    const bool first_warp = uniform(threadIdx.x / 32) == 0, leader = threadIdx.x % 32 == 0;
    typename Jobs::Position job_at;
    typename RingV::Position v_at, partial_at;
    typename RingPairs::Position pairs_at;
    for (Job job; (job = shared.rings.jobs.template take<Options>(job_at, problem)).tile != Job::kNoTile;) {
      Blocks::for_each(options, problem, job, [&](const Options& here, int block, bool) {
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
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
          shared.rings.pairs.fill(pairs_at);
          pairs_at.advance();
        }
      });
    }
  }

  // ---- Products

  // A consumer's turn to start products: named barrier 1 + its number.
  struct Turn {
    int consumer;

    __device__ __forceinline__ void begin() const {
      if constexpr (kNumConsumers > 1) ptx::named_barrier_sync(1 + consumer, 256);
    }
    __device__ __forceinline__ void pass_on() const {
      if constexpr (kNumConsumers > 1) ptx::named_barrier_arrive(1 + (consumer + 1) % kNumConsumers, 256);
    }
  };

  static __device__ __forceinline__ void multiply_keys(Scores& scores, const TileQ& q, int row, const TileK& k) {
    ptx::wgmma_fence();
#pragma unroll
    for (int col = 0; col < kHeadDim; col += 16) {
      MultiplyK::template multiply<false, false>(scores.x, q.along(row, col), k.along(0, col), col > 0);
    }
    ptx::wgmma_commit();
  }

  static __device__ __forceinline__ void add_values(Output& output, const Weights& weights, const TileV& v) {
    ptx::wgmma_fence();
#pragma unroll
    for (int row = 0; row < kBlockN; row += 16) {
      MultiplyV::template multiply<true>(output.x, weights.x[row / 16], v.across(row), true);
    }
    ptx::wgmma_commit();
  }

  // ---- The algorithm

  static __device__ __forceinline__ void consume(const Arrays& arrays, const FwdParams& params, const Options& options,
                                                 Shared& shared) {
    const Problem& problem = params.problem;
    const int consumer = uniform(threadIdx.x / 128 - 1);
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const bool leader = lane == 0;
    const Turn turn = {consumer};
    typename Jobs::Position job_at;
    typename RingQ::Position q_at;
    typename RingK::Position k_at;
    typename RingV::Position v_at;
    typename RingPairs::Position pairs_at;

    Scores scores;
    Weights weights;
    Output output;
    const auto start_scores = [&] {
      multiply_keys(scores, shared.q[q_at.stage()], consumer * 64, shared.k[k_at.stage()]);
    };
    const auto start_output = [&] { add_values(output, weights, shared.v[v_at.stage()]); };
    const auto release = [&](auto& ring, auto& at) {
      if (leader) ring.release(at);
      at.advance();
    };

    if (consumer == kNumConsumers - 1) turn.pass_on();
    Job job = shared.rings.jobs.template take<Options>(job_at, problem);
    if (job.tile == Job::kNoTile) return;
    shared.rings.q.wait_full(q_at);
    shared.rings.k.wait_full(k_at);
    turn.begin();
    start_scores();
    turn.pass_on();

    for (;;) {
      const Sequence sequence = job.sequence;
      const Band band = problem.band(sequence.seqlen_q, sequence.seqlen_k);
      const int job_query = job.tile * kBlockM, warpgroup_query = job_query + consumer * 64;
      const int warp_query = warpgroup_query + warp * 16, first_query = warp_query + lane / 4, first_col = lane % 4 * 2;
      const Blocks blocks(band, job_query, {warpgroup_query, warpgroup_query + 64});
      const int begin = uniform(blocks.begin);
      const int full_begin = uniform(blocks.full_begin), full_end = uniform(blocks.full_end);
      const bool hides_pairs = Options::kHidesPairs || full_begin > begin || full_end < blocks.end;
      const bool idle = uniform(warpgroup_query >= sequence.seqlen_q);
      Options here = options;
      here.enter(sequence, job.head);
      const Pairs<Options> pairs = {here, band, problem.softmax_scale};

      RowPair rows;
      float factor[2];
      int block = Blocks::visited(here, job_query, uniform(blocks.end - 1), begin);
      const auto release_pairs = [&] {
        if constexpr (kLoadsPairs) {
          __syncwarp();
          release(shared.rings.pairs, pairs_at);
        }
      };

      // The scores of a block become weights.
      const auto weigh_block = [&](const auto& hide_by_band) {
        release(shared.rings.k, k_at);
        if constexpr (kLoadsPairs) shared.rings.pairs.wait_full(pairs_at);
        here.template look_at<kBlockM, kBlockN>(shared.pairs[pairs_at.stage()].memory, job_query, block * kBlockN);
        const TileOfPairs<Options> tile = {pairs, first_query, block * kBlockN + first_col};
        const Rest rest = tile.change(scores);
        hide_by_band(tile);
        tile.hide_by_options(scores);
        release_pairs();
        rows.weigh(scores, rest, factor);
        tile.drop(scores, warp_query, block * kBlockN);
      };
      const auto hide_anywhere = [&](const auto& tile) {
        if (block < full_begin) {
          tile.template hide_by_band<Hidden::kAround>(scores);
        } else if (block >= full_end) {
          tile.template hide_by_band<Hidden::kBehind>(scores);
        }
      };
      const auto hide_behind = [&](const auto& tile) { tile.template hide_by_band<Hidden::kBehind>(scores); };
      const auto hide_around = [&](const auto& tile) { tile.template hide_by_band<Hidden::kAround>(scores); };
      const auto hide_nothing = [](const auto&) {};

      // The product with the values of one block runs beside the softmax of the next.
      const auto advance = [&](const auto& hide_by_band, const auto& meanwhile) {
        shared.rings.k.wait_full(k_at);
        turn.begin();
        start_scores();
        shared.rings.v.wait_full(v_at);
        start_output();
        turn.pass_on();
        meanwhile();
        ptx::wgmma_wait<1>();
        weigh_block(hide_by_band);
        ptx::wgmma_wait<0>();
        release(shared.rings.v, v_at);
        weights.round(scores);
        if (__any_sync(kFullMask, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
          for (int i = 0; i < Output::kNumElements; ++i) output.x[i] *= factor[row_of_element(i)];
        }
      };
      // Without a row inside the sequence nothing is to be done, but the others wait for this consumer.
      const auto pass_by = [&] {
        shared.rings.k.wait_full(k_at);
        shared.rings.v.wait_full(v_at);
        turn.begin();
        turn.pass_on();
        release(shared.rings.k, k_at);
        release(shared.rings.v, v_at);
        if constexpr (kLoadsPairs) shared.rings.pairs.wait_full(pairs_at);
        release_pairs();
      };

      ptx::wgmma_wait<0>();
      weigh_block(hide_anywhere);
      weights.round(scores);
      output.clear();
      const auto next = [&](int block) { return Blocks::visited(here, job_query, block - 1, begin); };
      if (idle) {
        while ((block = next(block)) >= begin) pass_by();
      } else if constexpr (Options::kSkipsBlocks) {
        int following = next(block);
#pragma unroll 1
        while ((block = following) >= begin) advance(hide_anywhere, [&] { following = next(block); });
      } else {
        // A loop for each kind of mask: one loop with branches has half the code, but takes 5 to 12 % longer.
        const auto nothing = [] {};
#pragma unroll 1
        for (--block; block >= larger(full_begin, full_end); --block) advance(hide_behind, nothing);
#pragma unroll 1
        for (; block >= full_begin; --block) advance(hide_nothing, nothing);
#pragma unroll 1
        for (; block >= begin; --block) advance(hide_around, nothing);
      }
      release(shared.rings.q, q_at);

      // The last product of this job; and with kOverlapsJobs the first of the next one, which runs beside the epilogue.
      const bool last = shared.rings.jobs.is_over(job_at);
      const auto await_next = [&] {
        shared.rings.q.wait_full(q_at);
        shared.rings.k.wait_full(k_at);
      };
      if (kOverlapsJobs && !last) await_next();
      shared.rings.v.wait_full(v_at);
      turn.begin();
      start_output();
      if constexpr (kOverlapsJobs) start_scores();
      turn.pass_on();

      float inverse[2], shift[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = rows.total(r), survivors = here.survivor_factor();
        shift[r] = rows.softmax[r].shift();
        if constexpr (Options::kHasSinks) survivors *= rows.softmax[r].join(here.sink(), sum);
        inverse[r] = sum == 0.0f ? 0.0f : __fdividef(survivors, sum);
        const int row = first_query + 8 * r;
        if (arrays.lse != nullptr && lane % 4 == 0 && row < sequence.seqlen_q) {
          *Matrix<float>(arrays.lse, params.lse, sequence.batch, job.head, sequence.first_query).at(row, 0) =
              rows.softmax[r].lse(sum);
        }
      }
      const Matrix<Element> out(arrays.out, params.out, sequence.batch, job.head, sequence.first_query,
                                sequence.seqlen_q, problem.head_dim_v);
      ptx::wgmma_wait<kOverlapsJobs ? 1 : 0>();
      release(shared.rings.v, v_at);
      const bool finite = store_rows_16(out, output, inverse, first_query);
      // 0 * NaN is NaN: where pairs are hidden, values that others see may have spoiled all rows.
      if (hides_pairs && __any_sync(kFullMask, !finite)) {
        __syncwarp();  // others write again what this lane wrote
        mend(arrays, params, options, job, shift, inverse, consumer * 64 + warp * 16,
             shared.careful[4 * consumer + warp]);
      }
      if (last) break;
      job = shared.rings.jobs.template take<Options>(job_at, problem);
      if constexpr (!kOverlapsJobs) {
        await_next();
        turn.begin();
        start_scores();
        turn.pass_on();
      }
    }
    ptx::wgmma_wait<0>();  // of the product that nobody asked for
  }

  // ---- Epilogue

  // Cold. Computes the 16 rows of a warp once more. Each value meets all rows, if only with weight 0: so all are
  // spoiled where one is.
  static __device__ __forceinline__ void mend(const Arrays& arrays, const FwdParams& params, Options options,
                                              const Job& job, const float (&shift)[2], const float (&inverse)[2],
                                              int warp_row, typename Careful::Memory& memory) {
    const Problem& problem = params.problem;
    const Sequence& sequence = job.sequence;
    const Band band = problem.band(sequence.seqlen_q, sequence.seqlen_k);
    options.enter(sequence, job.head);
    const int head_kv = job.head / problem.group_size();
    const Matrix<const Element> q(arrays.q, params.q, sequence.batch, job.head, sequence.first_query, sequence.seqlen_q,
                                  problem.head_dim);
    const Matrix<const Element> k(arrays.k, params.k, sequence.batch, head_kv, sequence.first_key, sequence.seqlen_k,
                                  problem.head_dim);
    const Matrix<const Element> v(arrays.v, params.v, sequence.batch, head_kv, sequence.first_key, sequence.seqlen_k,
                                  problem.head_dim_v);
    const Matrix<Element> out(arrays.out, params.out, sequence.batch, job.head, sequence.first_query, sequence.seqlen_q,
                              problem.head_dim_v);
    const Careful head = {q, k, v, out, options, band, {0, sequence.seqlen_k}, problem.softmax_scale, memory};
    head.template write_rows<kHeadDimV>(job.tile * kBlockM + warp_row, shift, inverse);
  }
};

}  // namespace cuflash
