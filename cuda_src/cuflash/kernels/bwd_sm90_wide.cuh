// FlashAttention backward for Hopper with head dimensions beyond 128: dK and dV of 64 keys fill the registers of two
// warpgroups, so each computes one of them. docs/kernels.md draws it.
#pragma once

#include <cuflash/attention/backward_block.cuh>
#include <cuflash/attention/query_sums.cuh>
#include <cuflash/tile/wgmma_product.cuh>

namespace cuflash {

// Both consumers have the same 64 keys. The first computes scores, weights and dV, the second the gradients of weights
// and of scores, and dK; with kAddsDq each computes a part of the columns of dQ. Weights go from the first to the
// second, gradients of scores to both.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kStagesKv,
          int kStages, int kStagesPairs, bool kAddsDq>
struct BwdSm90Wide {
  using Element = typename Number::Element;
  using Block =
      BackwardBlock<Element, Options, kHeadDim, kHeadDimV, kBlockM, kBlockN, kStagesKv, kStages, kStagesPairs, 1>;
  using Arrays = typename Block::Arrays;

  using Gradients = ScoreGradients<Element, Options, kBlockM>;
  using Scores = typename Gradients::Scores;
  using Factor = typename Gradients::Factor;
  using Sums = QuerySums<Options, kHeadDim, kBlockM>;
  using GradQ = typename Sums::Layout::Part;
  // Parts of dQ of the first consumer; the others are those of the second.
  static constexpr int kPartsOfFirst = ceil_div(Sums::Layout::kParts, 2);

  // Additions take most of a step. These pieces of the first consumer's last part wait in registers, where there is
  // room, for the next dV: beside it the second computes gradients of scores, and adds nothing.
  static constexpr bool kHasRoom = !Options::kBendsScores && !Options::kHasDropout && !Options::kSkipsBlocks;
  static constexpr int kPiecesLate = kHasRoom ? Sums::Layout::kPieces / 2 : 0;

  // What the first consumer hands to the second: weights times slopes, where the thread with the same keys finds them.
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
  struct Shared {
    Slopes slopes;
    typename Block::Shared block;
  };
  static constexpr int kNumThreads = Block::kNumThreads;
  static constexpr int kSharedBytes = sizeof(Slopes) + Block::kSharedBytes;

  static_assert(kBlockN == 64 && kBlockM == 64 && kPartsOfFirst <= 2);

  // Barriers of both consumers: each also tells that the other has done with the array before.
  enum Barrier { kSlopesAreThere = 1, kDsIsThere };  // or, without dQ, slopes have been read

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdSm90Params& params, Options options) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    Block::run(arrays, params, options, shared.block, Options::kHasDropout ? 8 : 4, [&] {
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
    typename Block::Shared& tiles = shared.block;
    typename Block::Rings& rings = tiles.rings;
    constexpr bool kLooksAtPairs = Block::kLoadsPairs && (kFirst || Options::kHasDropout);
    constexpr int kFirstPart = kFirst ? 0 : kPartsOfFirst;
    constexpr int kNumParts = kFirst ? kPartsOfFirst : Sums::Layout::kParts - kPartsOfFirst;
    constexpr int kPieces = Sums::Layout::kPieces, kPiecesOnTime = kFirst ? kPieces - kPiecesLate : kPieces;
    unsigned thread = threadIdx.x % 128;
    ptx::make_opaque(thread);  // else the loop reads the special register, which is slow
    const int warp_row = thread / 32 * 16, lane = thread % 32;
    typename Block::Jobs::Position job_at;
    typename Block::RingKv::Position kv_at;
    typename Block::Ring::Position at;
    typename Block::RingPairs::Position pairs_at;
    const auto release = [&](auto& ring, const auto& at) {
      if (lane == 0) ring.release(at);
    };
    const auto release_pairs = [&] {
      __syncwarp();
      release(rings.pairs, pairs_at);
      pairs_at.advance();
    };

    for (Job job; (job = rings.jobs.template take<Options>(job_at, problem)).tile != Job::kNoTile;) {
      const Sequence& sequence = job.sequence;
      const Band band = Block::band_of(problem, job);
      const int block_key = job.tile * kBlockN, first_key = block_key + warp_row + lane / 4, first_col = lane % 4 * 2;
      typename Block::TileK& k = tiles.k[kv_at.stage()];
      typename Block::TileV& v = tiles.v[kv_at.stage()];
      WarpgroupTile<kFirst ? kHeadDimV : kHeadDim> grad;  // dV or dK
      grad.clear();
      bool hides_pairs = false;

      Scores scores;  // or the gradients of weights
      const auto wait_for_scores = [&](const auto& at) { (kFirst ? rings.q : rings.dout).wait_full(at); };
      const auto start_scores = [&](const auto& at) {
        if constexpr (kFirst) {
          start_product_along<kHeadDim>(scores, k, 0, tiles.q[at.stage()]);
        } else {
          start_product_along<kHeadDimV>(scores, v, 0, tiles.dout[at.stage()]);
        }
      };
      rings.kv.wait_full(kv_at);
      if constexpr (Options::kPacked && kFirst) Block::clear_keys(k, sequence, block_key + warp_row, warp_row);
      if constexpr (Options::kPacked && !kFirst) Block::clear_keys(v, sequence, block_key + warp_row, warp_row);
      typename Block::Walk walk(options, problem, job, band);
      const auto sums_here = [&] { return Sums(arrays.dq_sums, problem, job, walk, thread); };
      GradQ dq[kNumParts] = {};  // first late pieces of 0 are added
      Sums sums = sums_here();
      const auto add_late = [&] {
        if constexpr (kAddsDq) sums.template add<kPiecesOnTime, kPieces>(kFirstPart + kNumParts - 1, dq[kNumParts - 1]);
      };
      const bool empty = walk.done();
      if (empty) {
        release(rings.kv, kv_at);
      } else {
        wait_for_scores(at);
        start_scores(at);
      }
#pragma unroll 1
      while (!walk.done()) {
        const int first_query = walk.block * kBlockM, stage = at.stage();
        Options here = options;
        here.enter(sequence, walk.head);
        const Pairs<Options> pairs = {here, band, problem.softmax_scale};
        const Gradients gradients = {pairs, first_query + first_col, first_key, tiles.rows[stage], first_col};
        if constexpr (kLooksAtPairs) rings.pairs.wait_full(pairs_at);
        here.template look_at<kBlockM, kBlockN>(tiles.pairs[pairs_at.stage()].memory, first_query, block_key);
        const AllVisible all_visible = {
            band.all_visible({first_query, first_query + kBlockM}, {block_key, block_key + 64}) &&
                first_query + kBlockM <= sequence.seqlen_q,
            !Options::kHidesPairs || here.shows_all()};
        hides_pairs |= !all_visible;
        const typename Gradients::Survivors survives = Block::survivors(tiles.pairs[pairs_at.stage()], warp_row, lane);
        const auto start_dq = [&](int i) {
          start_product_across(dq[i], tiles.ds[0], 0, k, Sums::Layout::first_col(kFirstPart + i));
        };
        ptx::wgmma_wait<0>();
        if constexpr (kFirst) {
          Factor weights, slopes;
          gradients.weigh(scores, weights, slopes, all_visible, survives);
          if constexpr (kLooksAtPairs) release_pairs();
          shared.slopes.store(slopes, thread);
          ptx::named_barrier_arrive(kSlopesAreThere, 256);
          rings.dout.wait_full(at);
          start_adding_across(grad, weights, tiles.dout[stage]);
          __syncwarp();  // or ptxas puts additions before the products
          add_late();
          ptx::named_barrier_sync(kDsIsThere, 256);
          release(rings.q, at);  // with the statistics that its other lanes have read
          if constexpr (kAddsDq) start_dq(0);
        } else {
          if constexpr (kLooksAtPairs) release_pairs();
          release(rings.dout, at);
          rings.q.wait_full(at);
          ptx::named_barrier_sync(kSlopesAreThere, 256);
          const Factor slopes = shared.slopes.load(thread);
          if constexpr (!kAddsDq) ptx::named_barrier_arrive(kDsIsThere, 256);
          const Factor dscores = gradients.differentiate(scores, slopes, survives);
          if constexpr (kAddsDq) {
            tiles.ds[0].store(dscores, warp_row, lane);
            ptx::async_proxy_fence();
            ptx::named_barrier_sync(kDsIsThere, 256);
            start_dq(0);
          }
          start_adding_across(grad, dscores, tiles.q[stage]);
        }
        sums = sums_here();
        if constexpr (kAddsDq) {
          ptx::wgmma_wait<kFirst ? 0 : 1>();
          sums.template add<0, (kNumParts > 1 ? kPieces : kPiecesOnTime)>(kFirstPart, dq[0]);
        }
        ptx::wgmma_wait<0>();
        release(kFirst ? rings.dout : rings.q, at);
        at.advance();
        walk.advance();
        if constexpr (kAddsDq && kNumParts > 1) start_dq(1);
        if (!walk.done()) wait_for_scores(at);
        start_scores(at);  // after the last tile nobody asks for them, and K and V may change meanwhile
        ptx::wgmma_wait<1>();
        if (walk.done()) release(rings.kv, kv_at);
        if constexpr (kAddsDq && kNumParts > 1) sums.template add<0, kPiecesOnTime>(kFirstPart + 1, dq[1]);
      }
      if (!empty) add_late();
      ptx::wgmma_wait<0>();
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
