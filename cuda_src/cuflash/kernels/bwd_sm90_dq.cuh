// FlashAttention backward for Hopper: the gradient of Q alone, for gradients that are the same bits in every run, and
// beyond 128 columns. docs/kernels.md says how it goes with the others.
#pragma once

#include <cuflash/attention/backward_maps.cuh>
#include <cuflash/attention/forward_block.cuh>
#include <cuflash/attention/register_gradient.cuh>
#include <cuflash/tile/row_store.cuh>
#include <cuflash/tile/wgmma_product.cuh>

namespace cuflash {

// A job is kBlockM queries of one head, which go through the keys they see: so dQ stays in registers, and no sum is
// spread over blocks. The gradients of scores are in registers the first factor of dQ = dS K. Consumers take turns as
// in the forward: one multiplies while another computes gradients of scores.
template <class Number, class Options, int kHeadDim, int kHeadDimV, int kBlockM, int kBlockN, int kStagesQ,
          int kStagesV, int kStagesK, int kStagesPairs>
struct BwdSm90Dq {
  using Element = typename Number::Element;
  // dP = dO V^T and dQ = dS K come of tiles as S = Q K^T and O = P V do: what the block calls queries, keys and values
  // are dO, V and K here, and Q comes along with dO.
  using Block = ForwardBlock<Element, Options, kHeadDimV, kHeadDim, kBlockM, kBlockN, kStagesQ, kStagesV, kStagesK,
                             kStagesPairs, kHeadDim>;
  using Shared = typename Block::Shared;
  static constexpr int kNumThreads = Block::kNumThreads, kSharedBytes = Block::kSharedBytes;

  using Scores = WarpgroupTile<kBlockN>;
  using Factor = WarpgroupFactor<Element, kBlockN>;
  using Gradients = GradientTile<Options, false>;

  static_assert(kStagesK > 1, "the next S is started before dQ has read its K");

  struct Arrays {
    const float *lse, *delta;
    unsigned* spoiled;  // of each tile of queries, whether dQ must be computed once more
    Element* dq;
    unsigned* counter;  // 0 before and after the kernel
  };

  static __device__ __forceinline__ void run(const Arrays& arrays, const BwdSm90Params& all, Options options) {
    const BwdParams& params = all.bwd;
    const typename Block::Inputs inputs = {
        {&all.maps.dout, params.dout}, {&all.maps.v, params.v}, {&all.maps.k, params.k}, {&all.maps.q, params.q}};
    Block::run(inputs, arrays.counter, params.problem, options,
               [&](Shared& shared) { consume(arrays, params, options, shared); });
  }

  static __device__ __forceinline__ void consume(const Arrays& arrays, const BwdParams& params, const Options& options,
                                                 Shared& shared) {
    const Problem& problem = params.problem;
    typename Block::Rings& rings = shared.rings;
    auto& dout = shared.q;
    auto& q = shared.more;
    auto& v = shared.k;
    auto& k = shared.v;
    auto& dout_ring = rings.q;
    auto& v_ring = rings.k;
    auto& k_ring = rings.v;
    const int consumer = uniform(threadIdx.x / 128 - 1);
    const unsigned thread = thread_of_warpgroup();
    const int lane = thread % 32;
    const typename Block::Turn turn = {consumer};
    typename Block::Jobs::Position job_at;
    typename Block::RingQ::Position dout_at;
    typename Block::RingK::Position v_at;
    typename Block::RingV::Position k_at;
    typename Block::RingPairs::Position pairs_at;

    Scores scores, dweights;
    const auto start_scores = [&] {
      start_product_along<kHeadDim>(scores, q[dout_at.stage()], first_row_of(consumer), k[k_at.stage()]);
    };
    const auto start_dweights = [&] {
      start_product_along<kHeadDimV>(dweights, dout[dout_at.stage()], first_row_of(consumer), v[v_at.stage()]);
    };
    const auto release = [&](auto& ring, auto& at) {
      if (lane == 0) ring.release(at);
      at.advance();
    };

    if (consumer == Block::kNumConsumers - 1) turn.pass_on();
    for (Job job; rings.jobs.template take<Options>(job, job_at, problem);) {
      const Sequence& sequence = job.sequence;
      const Band band = problem.band(sequence.seqlen_q, sequence.seqlen_k);
      const int job_query = job.tile * kBlockM, warpgroup_query = job_query + 64 * consumer;
      const Range queries = {warpgroup_query, warpgroup_query + 64};
      const int warp_query = warpgroup_query + thread / 32 * 16;
      const int first_query = warp_query + lane / 4, first_col = lane % 4 * 2;
      const typename Block::Blocks blocks(band, job_query, queries);
      const int begin = uniform(blocks.begin);
      Options here = options;
      here.enter(sequence, job.head);
      const Pairs<Options> pairs = {here, band, problem.softmax_scale};
      const RowStatistics rows(arrays.lse, arrays.delta, params, sequence, job.head);
      float lse[2], delta[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        lse[r] = rows.lse_of(first_query + 8 * r) * Gradients::kLseUnit;
        delta[r] = rows.delta_of(first_query + 8 * r);
      }
      Factor dscores;
      WarpgroupTile<kHeadDim> dq;
      dq.clear();

      dout_ring.wait_full(dout_at);
      k_ring.wait_full(k_at);
      turn.begin();
      start_scores();
      v_ring.wait_full(v_at);
      start_dweights();
      turn.pass_on();
#pragma unroll 1
      for (int block = uniform(blocks.end - 1);; --block) {
        bool shown = !Options::kHidesPairs;
        if constexpr (Options::kSkipsBlocks) {
          const auto& visited = shared.visited[v_at.stage()];
          block = uniform(visited.block);
          shown = uniform(visited.shown);
        }
        ptx::wgmma_wait<0>();
        release(v_ring, v_at);
        const int first_key = block * kBlockN;
        if constexpr (Block::kLoadsPairs) rings.pairs.wait_full(pairs_at);
        here.template look_at<kBlockM, kBlockN>(shared.pairs[pairs_at.stage()].memory, job_query, first_key);
        const Gradients tile = {pairs, first_query, first_key + first_col};
        const Survivors<Options, kBlockN, false> survives(here, warp_query, first_key);
        tile.differentiate(
            scores, dweights, [&](int i) { return lse[row_of_element(i)]; },
            [&](int i) { return delta[row_of_element(i)]; }, survives);
        if (queries.end > band.seqlen_q || !band.all_visible(queries, {first_key, first_key + kBlockN})) {
          tile.hide_by_band(scores, dweights);
        }
        if (!shown) tile.hide_by_options(scores, dweights);
        if constexpr (Block::kLoadsPairs) {
          __syncwarp();
          release(rings.pairs, pairs_at);
        }
        dscores.round(dweights);

        turn.begin();
        start_adding_across(dq, dscores, k[k_at.stage()]);
        if (block == begin) break;
        auto k_before = k_at;
        k_at.advance();
        k_ring.wait_full(k_at);
        start_scores();
        ptx::wgmma_wait<1>();
        release(k_ring, k_before);
        v_ring.wait_full(v_at);
        start_dweights();
        turn.pass_on();
      }
      turn.pass_on();
      release(dout_ring, dout_at);
      ptx::wgmma_wait<0>();
      release(k_ring, k_at);

      const Matrix<Element> target(arrays.dq, params.dq, sequence.batch, job.head, sequence.first_query,
                                   sequence.seqlen_q, problem.head_dim);
      const float scale[2] = {problem.softmax_scale, problem.softmax_scale};
      // 0 * NaN is NaN: where pairs are hidden, keys that others see may have spoiled all queries.
      if (!store_vectorized_rows<16, true>(target, dq, scale, first_query)) {
        arrays.spoiled[Options::template query_tile<kBlockM>(problem, sequence, job.head, job.tile)] = 1;
      }
    }
  }
};

}  // namespace cuflash
