// FlashAttention forward for Hopper: TMA copies, wgmma multiplies, and warpgroups share the work (FlashAttention-3,
// arXiv:2407.08608). docs/kernels.md draws it.
#pragma once

#include <cuflash/attention/forward_block.cuh>
#include <cuflash/attention/register_softmax.cuh>
#include <cuflash/tile/row_store.cuh>
#include <cuflash/tile/wgmma_product.cuh>

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

// A consumer starts the next product Q K^T before the softmax of the one at hand, also across jobs; and consumers take
// turns, so that one multiplies while another exponentiates.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kStagesQ,
          int kStagesK, int kStagesV, int kStagesPairs>
struct FwdSm90 {
  using Element = typename Number::Element;
  using Block =
      ForwardBlock<Element, Options, kHeadDim, kHeadDimV, kBlockM, kBlockN, kStagesQ, kStagesK, kStagesV, kStagesPairs>;
  using Turn = typename Block::Turn;
  using Shared = typename Block::Shared;
  static constexpr int kNumConsumers = Block::kNumConsumers, kNumThreads = Block::kNumThreads;
  static constexpr int kSharedBytes = Block::kSharedBytes;

  using Scores = WarpgroupTile<kBlockN>;
  using Weights = WarpgroupFactor<Element, kBlockN>;
  using Output = WarpgroupTile<kHeadDimV>;

  struct Results {
    Element* out;
    float* lse;  // may be null
    unsigned* counter;
  };
  struct Arrays : Results {
    const Element *q, *k, *v;
  };

  static __device__ __forceinline__ void run(const Results& results, const FwdSm90Params& all, Options options) {
    const FwdParams& params = all.fwd;
    const Arrays arrays = {results, static_cast<const Element*>(all.q), static_cast<const Element*>(all.k),
                           static_cast<const Element*>(all.v)};
    const typename Block::Inputs inputs = {
        {&all.maps.q, params.q}, {&all.maps.k, params.k}, {&all.maps.v, params.v}, {}};
    Block::run(inputs, arrays.counter, params.problem, options,
               [&](Shared& shared) { consume(arrays, params, options, shared); });
  }

  // ---- The algorithm

  static __device__ __forceinline__ void consume(const Arrays& arrays, const FwdParams& params, const Options& options,
                                                 Shared& shared) {
    const Problem& problem = params.problem;
    const int consumer = uniform(threadIdx.x / 128 - 1);
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const bool leader = lane == 0;
    const Turn turn = {consumer};
    typename Block::Jobs::Position job_at;
    typename Block::RingQ::Position q_at;
    typename Block::RingK::Position k_at;
    typename Block::RingV::Position v_at;
    typename Block::RingPairs::Position pairs_at;

    Scores scores;
    Weights weights;
    Output output;
    const auto start_scores = [&] {
      start_product_along<kHeadDim>(scores, shared.q[q_at.stage()], consumer * 64, shared.k[k_at.stage()]);
    };
    const auto start_output = [&] { start_adding_across(output, weights, shared.v[v_at.stage()]); };
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
      const typename Block::Blocks blocks(band, job_query, {warpgroup_query, warpgroup_query + 64});
      const int begin = uniform(blocks.begin);
      const int full_begin = uniform(blocks.full_begin), full_end = uniform(blocks.full_end);
      const bool hides_pairs = Options::kHidesPairs || full_begin > begin || full_end < blocks.end;
      const bool idle = uniform(warpgroup_query >= sequence.seqlen_q);
      Options here = options;
      here.enter(sequence, job.head);
      const Pairs<Options> pairs = {here, band, problem.softmax_scale};

      RowPair<Element, Options> rows;
      float factor[2];
      bool rescales;
      int block = uniform(blocks.end - 1);
      const auto release_pairs = [&] {
        if constexpr (Block::kLoadsPairs) {
          __syncwarp();
          release(shared.rings.pairs, pairs_at);
        }
      };

      // The scores of a block become weights.
      const auto weigh_block = [&](const auto& hide) {
        release(shared.rings.k, k_at);
        if constexpr (Block::kLoadsPairs) shared.rings.pairs.wait_full(pairs_at);
        here.template look_at<kBlockM, kBlockN>(shared.pairs[pairs_at.stage()].memory, job_query, block * kBlockN);
        const TileOfPairs<Options> tile = {pairs, first_query, block * kBlockN + first_col};
        const typename TileOfPairs<Options>::Rest rest = tile.change(scores);
        hide(tile);
        release_pairs();
        rescales = rows.follow(scores, rest, factor);
        rows.weigh(scores, rest);
      };
      const auto round_weights = [&] {
        weights.round(scores);
        drop(here, weights, warp_query, block * kBlockN);
      };
      const auto hide_by_options = [&](const auto& tile) { tile.hide_by_options(scores); };
      const auto hide_behind = [&](const auto& tile) {
        tile.template hide_by_band<Hidden::kBehind>(scores);
        hide_by_options(tile);
      };
      const auto hide_around = [&](const auto& tile) {
        tile.template hide_by_band<Hidden::kAround>(scores);
        hide_by_options(tile);
      };
      const auto hide_anywhere = [&](const auto& tile) {
        if (block < full_begin) {
          tile.template hide_by_band<Hidden::kAround>(scores);
        } else if (block >= full_end) {
          tile.template hide_by_band<Hidden::kBehind>(scores);
        }
        hide_by_options(tile);
      };
      // Where options skip blocks, who loads them tells which one it is, and whether all its pairs are visible.
      bool all_visible = false;
      const auto identify = [&] {
        if constexpr (Options::kSkipsBlocks) {
          const auto& visited = shared.visited[k_at.stage()];
          block = uniform(visited.block);
          all_visible = uniform(visited.shown) && full_begin <= block && block < full_end;
        }
      };
      const auto hide_if_any = [&](const auto& tile) {
        if (!all_visible) hide_anywhere(tile);
      };

      // The product with the values of one block runs beside the softmax of the next.
      const auto advance = [&](const auto& hide) {
        shared.rings.k.wait_full(k_at);
        turn.begin();
        start_scores();
        shared.rings.v.wait_full(v_at);
        start_output();
        turn.pass_on();
        identify();
        ptx::wgmma_wait<1>();
        weigh_block(hide);
        ptx::wgmma_wait<0>();
        release(shared.rings.v, v_at);
        round_weights();
        if (rescales) {
#pragma unroll
          for (int i = 0; i < Output::kNumElements; ++i) output.x[i] *= factor[row_of_element(i)];
        }
      };
      // Without a row inside the sequence nothing is to be done, but the others wait for this consumer.
      const auto pass_by = [&] {
        shared.rings.k.wait_full(k_at);
        shared.rings.v.wait_full(v_at);
        identify();
        turn.begin();
        turn.pass_on();
        release(shared.rings.k, k_at);
        release(shared.rings.v, v_at);
        if constexpr (Block::kLoadsPairs) shared.rings.pairs.wait_full(pairs_at);
        release_pairs();
        if constexpr (!Options::kSkipsBlocks) --block;
      };

      identify();
      ptx::wgmma_wait<0>();
      weigh_block(hide_if_any);
      round_weights();
      output.clear();
      if (idle) {
        while (block > begin) pass_by();
      } else if constexpr (Options::kSkipsBlocks) {
#pragma unroll 1
        while (block > begin) advance(hide_if_any);
      } else {
        // A loop for each kind of mask: one loop with branches has half the code, but takes up to 15 % longer.
#pragma unroll 1
        for (--block; block >= larger(full_begin, full_end); --block) advance(hide_behind);
#pragma unroll 1
        for (; block >= full_begin; --block) advance(hide_by_options);
#pragma unroll 1
        for (; block >= begin; --block) advance(hide_around);
      }
      release(shared.rings.q, q_at);

      // The last product of this job; and with Block::kOverlapsJobs the first of the next one, which runs beside the
      // epilogue.
      const Job next = shared.rings.jobs.template take<Options>(job_at, problem);
      const bool last = next.tile == Job::kNoTile;
      const auto await_next = [&] {
        shared.rings.q.wait_full(q_at);
        shared.rings.k.wait_full(k_at);
      };
      if (Block::kOverlapsJobs && !last) await_next();
      shared.rings.v.wait_full(v_at);
      turn.begin();
      start_output();
      if constexpr (Block::kOverlapsJobs) start_scores();
      turn.pass_on();

      float inverse[2], base[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = rows.total(r), survivors = here.survivor_factor();
        base[r] = rows.softmax[r].base;
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
      ptx::wgmma_wait<Block::kOverlapsJobs ? 1 : 0>();
      release(shared.rings.v, v_at);
      const bool finite = store_vectorized_rows<8>(out, output, inverse, first_query);
      // 0 * NaN is NaN: where pairs are hidden, values that others see may have spoiled all rows.
      if (hides_pairs && __any_sync(kFullMask, !finite)) {
        __syncwarp();  // others write again what this lane wrote
        mend(arrays, params, options, job, base, inverse, consumer * 64 + warp * 16,
             shared.careful[4 * consumer + warp]);
      }
      if (last) break;
      job = next;
      if constexpr (!Block::kOverlapsJobs) {
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
                                              const Job& job, const float (&base)[2], const float (&inverse)[2],
                                              int warp_row, typename Block::Careful::Memory& memory) {
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
    const typename Block::Careful head = {
        q, k, v, out, options, band, {0, sequence.seqlen_k}, problem.softmax_scale, memory};
    head.template write_rows<kHeadDimV>(job.tile * kBlockM + warp_row, base, inverse);
  }
};

}  // namespace cuflash
