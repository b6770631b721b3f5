// FlashAttention backward for Hopper: the gradients of K and V alone, beside bwd_sm90_dq.cuh, for gradients that are
// the same bits in every run. docs/kernels.md says how they go together.
#pragma once

#include <cuflash/attention/backward_block.cuh>
#include <cuflash/tile/turn.cuh>
#include <cuflash/tile/wgmma_product.cuh>

namespace cuflash {

// Each of two consumers has 64 keys of a job. Scores are computed transposed (keys are rows): P and dS lie in registers
// as the first factors of dV and dK, and nobody waits for what another one computes. So consumers take turns: one
// starts the last two products of a tile and the first two of the next, while the other computes gradients of scores.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kStagesKv,
          int kStages, int kStagesPairs>
struct BwdSm90DkDv {
  using Element = typename Number::Element;
  struct Nothing {};
  using Block =
      BackwardBlock<Element, Options, kHeadDim, kHeadDimV, kBlockM, kBlockN, kStagesKv, kStages, kStagesPairs, Nothing>;
  using Arrays = typename Block::Arrays;
  using Shared = typename Block::Shared;
  static constexpr int kNumThreads = Block::kNumThreads, kSharedBytes = Block::kSharedBytes;

  using Gradients = ScoreGradients<Element, Options, kBlockM>;
  using Scores = typename Gradients::Scores;
  using Factor = typename Gradients::Factor;

  static_assert(kBlockN == 128 && (kBlockM == 64 || kBlockM == 128));

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdSm90Params& params, Options options) {
    Block::run(arrays, params, options, 8, [&](Shared& shared) { consume(arrays, params.bwd, options, shared); });
  }

  static __device__ __forceinline__ void consume(const Arrays& arrays, const BwdParams& params, const Options& options,
                                                 Shared& shared) {
    const Problem& problem = params.problem;
    typename Block::Rings& rings = shared.rings;
    const int consumer = uniform(threadIdx.x / 128 - 1);
    const unsigned thread = thread_of_warpgroup();
    const int lane = thread % 32, warp_row = 64 * consumer + thread / 32 * 16;
    const Turn<Block::kNumConsumers> turn = {consumer};
    typename Block::Jobs::Position job_at;
    typename Block::RingKv::Position kv_at;
    typename Block::Ring::Position at;
    typename Block::RingPairs::Position pairs_at;
    const auto release = [&](auto& ring, const auto& at) {
      if (lane == 0) ring.release(at);
    };

    if (consumer == Block::kNumConsumers - 1) turn.pass_on();
    for (Job job; rings.jobs.template take<Options>(job, job_at, problem);) {
      const Sequence& sequence = job.sequence;
      const Band band = Block::band_of(problem, job);
      const int job_key = job.tile * kBlockN, first_key = job_key + warp_row + lane / 4, first_col = lane % 4 * 2;
      const Range keys = {job_key + 64 * consumer, job_key + 64 * consumer + 64};
      typename Block::TileK& k = shared.k[kv_at.stage()];
      typename Block::TileV& v = shared.v[kv_at.stage()];
      WarpgroupTile<kHeadDim> dk;
      WarpgroupTile<kHeadDimV> dv;
      dk.clear();
      dv.clear();
      bool hides_pairs = false;

      Scores scores, dweights;
      const auto start_scores = [&] {
        start_product_along<kHeadDim>(scores, k, first_row_of(consumer), shared.q[at.stage()]);
      };
      const auto start_dweights = [&] {
        start_product_along<kHeadDimV>(dweights, v, first_row_of(consumer), shared.dout[at.stage()]);
      };

      rings.kv.wait_full(kv_at);
      Block::clear_keys(k, sequence, job_key + warp_row, warp_row);
      Block::clear_keys(v, sequence, job_key + warp_row, warp_row);
      typename Block::Walk walk(options, problem, job, band);
      if (!walk.done()) {
        rings.q.wait_full(at);
        rings.dout.wait_full(at);
        turn.begin();
        start_scores();
        start_dweights();
        turn.pass_on();
#pragma unroll 1
        for (;;) {
          const int first_query = walk.block * kBlockM, stage = at.stage();
          Options here = options;
          here.enter(sequence, walk.head);
          const Pairs<Options> pairs = {here, band, problem.softmax_scale};
          if constexpr (Block::kLoadsPairs) rings.pairs.wait_full(pairs_at);
          here.template look_at<kBlockM, kBlockN>(shared.pairs[pairs_at.stage()].memory, first_query, job_key);
          const AllVisible all_visible = Block::all_visible(here, band, sequence.seqlen_q, first_query, keys);
          hides_pairs |= !all_visible;
          const Gradients gradients = {pairs, first_query + first_col, first_key, shared.rows[stage], first_col};
          const typename Gradients::Survivors survives =
              Block::survivors(shared.pairs[pairs_at.stage()], warp_row, lane);
          Factor weights, slopes;
          ptx::wgmma_wait<1>();
          gradients.weigh(scores, weights, slopes, all_visible, survives);
          Block::release_pairs(rings, pairs_at, lane);
          ptx::wgmma_wait<0>();
          const Factor dscores = gradients.differentiate(dweights, slopes, survives);

          turn.begin();
          start_adding_across(dv, weights, shared.dout[stage]);
          start_adding_across(dk, dscores, shared.q[stage]);
          walk.advance();
          if (walk.done()) break;
          const auto before = at;
          at.advance();
          rings.q.wait_full(at);
          if constexpr (kBlockM == 128) ptx::wgmma_wait<1>();  // 64 queries more take the registers of P, then of dS
          start_scores();
          ptx::wgmma_wait<1>();
          release(rings.dout, before);
          release(rings.q, before);
          rings.dout.wait_full(at);
          start_dweights();
          turn.pass_on();
        }
        turn.pass_on();
        ptx::wgmma_wait<0>();
        release(rings.dout, at);
        release(rings.q, at);
        at.advance();
      }
      ptx::wgmma_wait<0>();  // without queries too the lanes of a warp come together before one of them tells
      release(rings.kv, kv_at);
      kv_at.advance();

      const bool dk_finite = Block::write_dk(arrays, params, job, dk, first_key);
      const bool dv_finite = Block::write_dv(arrays, params, options, job, dv, first_key);
      if (hides_pairs && !(dk_finite && dv_finite)) Block::note_spoiled(arrays, problem, job);
    }
  }
};

}  // namespace cuflash
