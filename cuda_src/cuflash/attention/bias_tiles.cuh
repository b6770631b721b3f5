// The tiles of pairs that a block goes through for the gradient of a bias, written down ahead by one thread.
#pragma once

#include <cuflash/attention/bias_walk.cuh>
#include <cuflash/attention/options.cuh>

namespace cuflash {

// In shared memory: registers are few, and what one thread finds out the others need not. It is kAhead tiles and one
// more ahead of where it is. The block computes one tile of the gradient after the other. kTiles are kept: those ahead
// and the one at hand, or more where some are behind.
template <int kBlockM, int kBlockN, int kAhead, int kTiles = kAhead + 2>
struct BiasTiles {
  using Walk = BiasWalk<kBlockM, kBlockN>;
  using Step = typename Walk::Step;

  struct Tile {
    Step step;
    int head_kv;
    bool exists;   // else there are no more
    bool first;    // for its tile of the gradient
    bool visible;  // else it stands for a tile of the gradient of which nobody sees any pair
    bool same;     // arrays of pairs are those of the tile before
  };

  Tile tiles[kTiles];
  Walk walk;    // at the last tile
  Step stride;  // from one tile of the gradient to the next
  Band band;
  int group_size;

  __device__ __forceinline__ const Tile& at(int number) const { return tiles[static_cast<unsigned>(number) % kTiles]; }

  // Writes down the first ones of one of so many blocks, or clusters of blocks.
  template <class Options>
  __device__ __forceinline__ void begin(const DbiasParams& params, const Options& options, unsigned block = blockIdx.x,
                                        unsigned num_blocks = gridDim.x) {
    const Problem& problem = params.problem;
    band = problem.band(problem.seqlen_q, problem.seqlen_k);
    group_size = problem.group_size();
    walk = Walk(params);
    stride = walk.tile(num_blocks);
    begin_job(0, walk.tile(block), problem, options);
#pragma unroll 1
    for (int number = 0; number < kAhead; ++number) write_after(number, problem, options);
  }

  // Writes down the one that comes kAhead + 1 tiles after this, in place of the oldest.
  template <class Options>
  __device__ __forceinline__ void advance(int number, const Problem& problem, const Options& options) {
    write_after(number + kAhead, problem, options);
  }

 private:
  __device__ __forceinline__ Tile& place(int number) { return tiles[static_cast<unsigned>(number) % kTiles]; }

  template <class Options>
  __device__ __forceinline__ void write_after(int number, const Problem& problem, const Options& options) {
    const Tile& before = at(number);
    Tile& tile = place(number + 1);
    if (!before.exists) {
      tile.exists = tile.visible = false;
      return;
    }
    const Step step = walk.visited(walk.after(before.step), problem, band, options);
    if (walk.done(step)) return begin_job(number + 1, walk.sum(walk.first, stride), problem, options);
    const bool same_head = step.head == before.step.head;
    const bool same_place = same_head && step.m_block == before.step.m_block && step.n_block == before.step.n_block;
    const int head_kv = same_head ? before.head_kv : step.head / group_size;
    tile = {step, head_kv, true, false, true, same_place && options.same_in_batch()};
  }

  template <class Options>
  __device__ __forceinline__ void begin_job(int number, const Step& first, const Problem& problem,
                                            const Options& options) {
    Tile& tile = place(number);
    tile = {first, 0, walk.exists(first), true, false, false};
    if (!tile.exists) return;
    walk.begin(first);
    const Step step = walk.visited(first, problem, band, options);
    tile.visible = !walk.done(step);
    if (tile.visible) tile.step = step;
    tile.head_kv = tile.step.head / group_size;
  }
};

}  // namespace cuflash
