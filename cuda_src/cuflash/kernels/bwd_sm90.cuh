// FlashAttention backward for Hopper: the gradients of K and V, and sums for that of Q (FlashAttention-3,
// arXiv:2407.08608, appendix B). docs/kernels.md draws it.
#pragma once

#include <cuflash/attention/backward_block.cuh>
#include <cuflash/attention/query_sums.cuh>
#include <cuflash/tile/wgmma_product.cuh>

namespace cuflash {

// Each of two consumers has 64 keys of a job. Scores are computed transposed (keys are rows): P and dS lie in registers
// as the first factors of dV and dK. dS also goes to shared memory, where it is the first factor of dQ, of which each
// consumer computes a half and adds it to sums in global memory. The next Q K^T starts before the last product of a
// tile has ended.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kStagesKv,
          int kStages, int kStagesPairs>
struct BwdSm90 {
  using Element = typename Number::Element;
  struct Handed {
    SwizzledTile<Element, kBlockN, kBlockM> ds[2];  // of the tile at hand, and of the one before
  };
  using Block =
      BackwardBlock<Element, Options, kHeadDim, kHeadDimV, kBlockM, kBlockN, kStagesKv, kStages, kStagesPairs, Handed>;
  using Arrays = typename Block::Arrays;

  using Gradients = ScoreGradients<Element, Options, kBlockM>;
  using Scores = typename Gradients::Scores;
  using Factor = typename Gradients::Factor;
  using Sums = QuerySums<Options, kHeadDim, kBlockM>;
  using GradQ = typename Sums::Layout::Part;

  // The pieces of dQ that are added to the sums before the next scores start. Additions wait for each other: the rest
  // does so beside the product, but the product starts only when those before it are under way. Of 128 columns the
  // first half goes by way of the dS of the tile before, which nobody reads any more; but not where blocks keep step,
  // whose copy engines would add to the same sums at once.
  static constexpr int kPieces = Sums::Layout::kPieces;
  static constexpr int kPiecesStaged = kHeadDim > 64 && Block::kArrayBytes == 0 ? kPieces / 2 : 0;
  static constexpr int kPiecesFirst = kHeadDim <= 64 ? kPieces / 4 : kPieces / 4 * 3;

  using Shared = typename Block::Shared;
  static constexpr int kNumThreads = Block::kNumThreads, kSharedBytes = Block::kSharedBytes;

  enum Barrier { kDsIsThere = 1 };  // that of both consumers

  static_assert(kBlockN == 128 && (kBlockM == 64 || kBlockM == 128));
  static_assert(kPiecesStaged * 32 * sizeof(float4) <= 16 * 128, "a warp's rows of dS");

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdSm90Params& params, Options options) {
    Block::run(arrays, params, options, 8, [&](Shared& shared) { consume(arrays, params.bwd, options, shared); });
  }

  static __device__ __forceinline__ void consume(const Arrays& arrays, const BwdParams& params, const Options& options,
                                                 Shared& shared) {
    const Problem& problem = params.problem;
    typename Block::Rings& rings = shared.rings;
    const int consumer = uniform(threadIdx.x / 128 - 1);
    const unsigned thread = thread_of_warpgroup();
    const int warp = thread / 32, lane = thread % 32, warp_row = 64 * consumer + 16 * warp;
    typename Block::Jobs::Position job_at;
    typename Block::RingKv::Position kv_at;
    typename Block::Ring::Position at;
    typename Block::RingPairs::Position pairs_at;
    const auto release = [&](auto& ring, const auto& at) {
      if (lane == 0) ring.release(at);
    };

    for (Job job; rings.jobs.template take<Options>(job, job_at, problem);) {
      const Sequence& sequence = job.sequence;
      const Band band = Block::band_of(problem, job);
      const int warpgroup_key = job.tile * kBlockN + 64 * consumer, warp_key = warpgroup_key + 16 * warp;
      const int first_key = warp_key + lane / 4, first_col = lane % 4 * 2;
      typename Block::TileK& k = shared.k[kv_at.stage()];
      typename Block::TileV& v = shared.v[kv_at.stage()];
      WarpgroupTile<kHeadDim> dk;
      WarpgroupTile<kHeadDimV> dv;
      dk.clear();
      dv.clear();
      bool hides_pairs = false;

      Scores scores;
      const auto start_scores = [&](const auto& at) {
        start_product_along<kHeadDim>(scores, k, 64 * consumer, shared.q[at.stage()]);
      };
      rings.kv.wait_full(kv_at);
      Block::clear_keys(k, sequence, warp_key, warp_row);
      Block::clear_keys(v, sequence, warp_key, warp_row);
      typename Block::Walk walk(options, problem, job, band);
      if (!walk.done()) {
        rings.q.wait_full(at);
        start_scores(at);
      }
#pragma unroll 1
      while (!walk.done()) {
        const int first_query = walk.block * kBlockM, stage = at.stage();
        Options here = options;
        here.enter(sequence, walk.head);
        const Pairs<Options> pairs = {here, band, problem.softmax_scale};
        Scores dweights;
        Factor weights, slopes;
        GradQ dq;

        ptx::wgmma_wait<0>();
        rings.dout.wait_full(at);
        start_product_along<kHeadDimV>(dweights, v, 64 * consumer, shared.dout[stage]);
        if constexpr (Block::kLoadsPairs) rings.pairs.wait_full(pairs_at);
        here.template look_at<kBlockM, kBlockN>(shared.pairs[pairs_at.stage()].memory, first_query, job.tile * kBlockN);
        const AllVisible all_visible =
            Block::all_visible(here, band, sequence.seqlen_q, first_query, {warpgroup_key, warpgroup_key + 64});
        hides_pairs |= !all_visible;
        const Gradients gradients = {pairs, first_query + first_col, first_key, shared.rows[stage], first_col};
        const typename Gradients::Survivors survives = Block::survivors(shared.pairs[pairs_at.stage()], warp_row, lane);
        gradients.weigh(scores, weights, slopes, all_visible, survives);
        Block::release_pairs(rings, pairs_at, lane);
        start_adding_across(dv, weights, shared.dout[stage]);
        ptx::wgmma_wait<1>();
        const Factor dscores = gradients.differentiate(dweights, slopes, survives);
        auto &ds = shared.handed.ds[at.count() % 2], &before = shared.handed.ds[(at.count() + 1) % 2];
        if constexpr (kPiecesStaged > 0) {
          if (lane == 0) ptx::bulk_add_wait_read();
          __syncwarp();
        }
        ds.store(dscores, warp_row, lane);
        ptx::async_proxy_fence();
        ptx::named_barrier_sync(kDsIsThere, 256);
        start_product_across(dq, ds, Sums::Layout::first_query(consumer), k, Sums::Layout::first_col(consumer));
        start_adding_across(dk, dscores, shared.q[stage]);

        ptx::wgmma_wait<1>();
        release(rings.dout, at);
        const Sums sums(arrays.dq_sums, problem, job, walk, thread);
        if constexpr (kPiecesStaged > 0) {
          sums.template add_staged<kPiecesStaged>(before.piece(warp_row, 0), consumer, dq);
        }
        sums.template add<kPiecesStaged, kPiecesFirst>(consumer, dq);
        auto next = at;
        next.advance();
        walk.advance();
        if (!walk.done()) rings.q.wait_full(next);
        start_scores(next);  // after the last tile nobody asks for them
        sums.template add<kPiecesFirst>(consumer, dq);
        ptx::wgmma_wait<1>();
        release(rings.q, at);
        at = next;
      }
      ptx::wgmma_wait<0>();
      release(rings.kv, kv_at);
      kv_at.advance();

      const bool dk_finite = Block::write_dk(arrays, params, job, dk, first_key);
      const bool dv_finite = Block::write_dv(arrays, params, options, job, dv, first_key);
      if (hides_pairs && !(dk_finite && dv_finite)) Block::note_spoiled(arrays, problem, job);
    }
    if constexpr (kPiecesStaged > 0) {
      if (lane == 0) ptx::bulk_add_wait_read();  // shared memory is another block's when this one ends
    }
  }
};

}  // namespace cuflash
