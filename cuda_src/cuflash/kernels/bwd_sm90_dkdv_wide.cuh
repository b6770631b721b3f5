// FlashAttention backward for Hopper with head dimensions beyond 128: the gradients of K and V of 64 keys fill the
// registers of two warpgroups, so each computes one of them. docs/kernels.md draws it.
#pragma once

#include <cuflash/attention/backward_block.cuh>
#include <cuflash/tile/wgmma_product.cuh>

namespace cuflash {

// Weights times slopes, which the first of two consumers hands to the second, where the thread with the same keys finds
// them.
template <class Factor, int kBlockM>
struct Slopes {
  uint4 pieces[kBlockM / 16][128];

  __device__ __forceinline__ void store(const Factor& slopes, int thread) {
#pragma unroll
    for (int i = 0; i < kBlockM / 16; ++i) {
      pieces[i][thread] = make_uint4(slopes.x[i][0], slopes.x[i][1], slopes.x[i][2], slopes.x[i][3]);
    }
  }
  __device__ __forceinline__ Factor load(int thread) const {
    Factor slopes;
#pragma unroll
    for (int i = 0; i < kBlockM / 16; ++i) {
      const uint4 piece = pieces[i][thread];
      slopes.x[i][0] = piece.x;
      slopes.x[i][1] = piece.y;
      slopes.x[i][2] = piece.z;
      slopes.x[i][3] = piece.w;
    }
    return slopes;
  }
};

// Both consumers have the same 64 keys. The first computes scores, weights and dV, the second the gradients of weights
// and of scores, and dK. Each starts the next product of scores before its last one of a tile has ended.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kStagesKv,
          int kStages, int kStagesPairs>
struct BwdSm90DkDvWide {
  using Element = typename Number::Element;
  using Gradients = ScoreGradients<Element, Options, kBlockM>;
  using Scores = typename Gradients::Scores;
  using Factor = typename Gradients::Factor;
  using Block = BackwardBlock<Element, Options, kHeadDim, kHeadDimV, kBlockM, kBlockN, kStagesKv, kStages, kStagesPairs,
                              Slopes<Factor, kBlockM>>;
  using Arrays = typename Block::Arrays;
  using Shared = typename Block::Shared;
  static constexpr int kNumThreads = Block::kNumThreads, kSharedBytes = Block::kSharedBytes;

  static_assert(kBlockN == 64 && kBlockM == 64);

  // Barriers at which one consumer waits for the other.
  enum Barrier { kSlopesAreThere = 1, kSlopesAreRead };

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdSm90Params& params, Options options) {
    Block::run(arrays, params, options, Options::kHasDropout ? 8 : 4, [&](Shared& shared) {
      if (uniform(threadIdx.x / 128) == 1) {  // known to be the same for a warp, or nothing in there would be
        consume<true>(arrays, params.bwd, options, shared);
      } else {
        consume<false>(arrays, params.bwd, options, shared);
      }
    });
  }

  // Job after job, of which the first consumer or the second computes its part.
  template <bool kFirst>
  static __device__ __forceinline__ void consume(const Arrays& arrays, const BwdParams& params, const Options& options,
                                                 Shared& shared) {
    const Problem& problem = params.problem;
    typename Block::Rings& rings = shared.rings;
    constexpr bool kLooksAtPairs = Block::kLoadsPairs && (kFirst || Options::kHasDropout);
    const unsigned thread = thread_of_warpgroup();
    const int warp_row = thread / 32 * 16, lane = thread % 32;
    typename Block::Jobs::Position job_at;
    typename Block::RingKv::Position kv_at;
    typename Block::Ring::Position at;
    typename Block::RingPairs::Position pairs_at;
    const auto release = [&](auto& ring, const auto& at) {
      if (lane == 0) ring.release(at);
    };

    if constexpr (!kFirst) ptx::named_barrier_arrive(kSlopesAreRead, 256);  // there are none yet
    for (Job job; rings.jobs.template take<Options>(job, job_at, problem);) {
      const Sequence& sequence = job.sequence;
      const Band band = Block::band_of(problem, job);
      const int block_key = job.tile * kBlockN, first_key = block_key + warp_row + lane / 4, first_col = lane % 4 * 2;
      typename Block::TileK& k = shared.k[kv_at.stage()];
      typename Block::TileV& v = shared.v[kv_at.stage()];
      WarpgroupTile<kFirst ? kHeadDimV : kHeadDim> grad;  // dV or dK
      grad.clear();
      bool hides_pairs = false;

      Scores scores;  // or the gradients of weights
      const auto wait_for_scores = [&](const auto& at) { (kFirst ? rings.q : rings.dout).wait_full(at); };
      const auto start_scores = [&](const auto& at) {
        if constexpr (kFirst) {
          start_product_along<kHeadDim>(scores, k, 0, shared.q[at.stage()]);
        } else {
          start_product_along<kHeadDimV>(scores, v, 0, shared.dout[at.stage()]);
        }
      };
      rings.kv.wait_full(kv_at);
      if constexpr (kFirst) {
        Block::clear_keys(k, sequence, block_key + warp_row, warp_row);
      } else {
        Block::clear_keys(v, sequence, block_key + warp_row, warp_row);
      }
      typename Block::Walk walk(options, problem, job, band);
      if (!walk.done()) {
        wait_for_scores(at);
        start_scores(at);
      }
#pragma unroll 1
      while (!walk.done()) {
        const int first_query = walk.block * kBlockM, stage = at.stage();
        Options here = options;
        here.enter(sequence, walk.head);
        const Pairs<Options> pairs = {here, band, problem.softmax_scale};
        const Gradients gradients = {pairs, first_query + first_col, first_key, shared.rows[stage], first_col};
        if constexpr (kLooksAtPairs) rings.pairs.wait_full(pairs_at);
        here.template look_at<kBlockM, kBlockN>(shared.pairs[pairs_at.stage()].memory, first_query, block_key);
        const AllVisible all_visible =
            Block::all_visible(here, band, sequence.seqlen_q, first_query, {block_key, block_key + 64});
        hides_pairs |= !all_visible;
        const typename Gradients::Survivors survives = Block::survivors(shared.pairs[pairs_at.stage()], warp_row, lane);
        ptx::wgmma_wait<0>();
        if constexpr (kFirst) {
          Factor weights, slopes;
          gradients.weigh(scores, weights, slopes, all_visible, survives);
          if constexpr (kLooksAtPairs) Block::release_pairs(rings, pairs_at, lane);
          ptx::named_barrier_sync(kSlopesAreRead, 256);
          shared.handed.store(slopes, thread);
          ptx::named_barrier_arrive(kSlopesAreThere, 256);
          release(rings.q, at);  // with the statistics, which all lanes have read when they come to the barrier
          rings.dout.wait_full(at);
          start_adding_across(grad, weights, shared.dout[stage]);
        } else {
          if constexpr (kLooksAtPairs) Block::release_pairs(rings, pairs_at, lane);
          release(rings.dout, at);
          rings.q.wait_full(at);
          ptx::named_barrier_sync(kSlopesAreThere, 256);
          const Factor slopes = shared.handed.load(thread);
          ptx::named_barrier_arrive(kSlopesAreRead, 256);
          start_adding_across(grad, gradients.differentiate(scores, slopes, survives), shared.q[stage]);
        }
        auto next = at;
        next.advance();
        walk.advance();
        if (!walk.done()) wait_for_scores(next);
        start_scores(next);  // after the last tile nobody asks for them
        ptx::wgmma_wait<1>();
        release(kFirst ? rings.dout : rings.q, at);
        at = next;
      }
      ptx::wgmma_wait<0>();
      release(rings.kv, kv_at);
      kv_at.advance();

      bool finite;
      if constexpr (kFirst) {
        finite = Block::write_dv(arrays, params, options, job, grad, first_key);
      } else {
        finite = Block::write_dk(arrays, params, job, grad, first_key);
      }
      if (hides_pairs && !finite) Block::note_spoiled(arrays, problem, job);
    }
  }
};

}  // namespace cuflash
