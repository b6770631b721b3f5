// What kernels ask about the options of a call.
#pragma once

#include <cuflash/attention/dropout.cuh>
#include <cuflash/attention/dual.cuh>
#include <cuflash/attention/neighbour.cuh>
#include <cuflash/attention/sequence.cuh>

namespace cuflash {

// How large the products of queries and keys at hand are, where options know a shorter way to scores of some sizes.
enum class Size { kSmall, kModerate, kAny };

// Plain attention. For a call with options the JIT writes a class derived from this one, which holds their parameters
// and replaces what they change (cuflash/_options.py): every kernel family takes it as a template argument.
struct PlainOptions : BatchedSequences {
  static constexpr bool kPacked = false;
  static constexpr bool kChangesScores = false;  // score() is not the identity
  static constexpr bool kBendsScores = false;    // the slope of score() is not 1
  static constexpr bool kBreaksScores = false;   // it may be infinite or NaN where a pair has no weight
  static constexpr bool kHidesPairs = false;     // visible() may be false
  static constexpr bool kReadsArrays = false;    // score() and visible() read arrays at the positions they are given
  static constexpr bool kSkipsBlocks = false;    // hides_all() may be true
  static constexpr bool kHasSinks = false;
  static constexpr bool kHasDropout = false;

  // Prepares for one sequence and query head.
  __device__ __forceinline__ void enter(const Sequence&, int) {}

  // Starts to copy to shared memory what the options know of the tile of pairs that begins at a query and a key.
  template <int kBlockM, int kBlockN>
  static constexpr int kTileBytes = 0;
  template <int kBlockM, int kBlockN, int kNumThreads>
  __device__ __forceinline__ void load(unsigned char*, int, int, int = 0) const {}
  // Whether that is the same for all batch entries.
  __device__ __forceinline__ bool same_in_batch() const { return true; }

  // Prepares for that tile; what follows may be asked of its pairs alone. The memory is read when the copies are there.
  template <int kBlockM, int kBlockN>
  __device__ __forceinline__ void look_at(const unsigned char*, int, int) {}

  // The scaled score of a query and a key, of their product.
  static constexpr bool kHasShortWays = false;
  template <Size kSize>
  __device__ __forceinline__ Dual scaled(float product, float scale) const {
    return {product * scale, 1.0f};
  }

  // In a short way scores may be a factor that they have in common, which can wait, times what is computed of products.
  static constexpr bool kLeavesFactor = false;
  template <Size kSize>
  __device__ __forceinline__ float factor() const {
    return 1.0f;
  }
  template <Size kSize>
  __device__ __forceinline__ Dual over_factor(float product) const {
    return {product, 1.0f};
  }

  // Whether products up to this magnitude may take the short way of a size.
  __device__ __forceinline__ bool allows(Size, float) const { return false; }

  // What becomes of the scaled score. The two lie inside the sequence where arrays are read.
  __device__ __forceinline__ Dual score(Dual score, int, int) const { return score; }

  // Options may do no more than subtract a penalty from products: what a pair loses; whether that is a line over the
  // keys up to half a width away, for queries nearby too; and by how much it falls from one key to the next.
  static constexpr bool kHasPenalties = false;
  __device__ __forceinline__ float penalty(int, int) const { return 0.0f; }
  __device__ __forceinline__ bool penalties_are_line(int, int, int) const { return false; }
  __device__ __forceinline__ float penalty_step(int, int) const { return 0.0f; }

  // The same with the derivative by the bias of the pair, for calls that have one.
  using Bias = float;
  template <class Key>
  __device__ __forceinline__ Dual score_by_bias(Dual score, int, Key) const {
    return score;
  }

  // Whether a query sees a key, apart from the band. The two lie inside the sequence where arrays are read.
  __device__ __forceinline__ bool visible(int, int) const { return true; }

  // Whether all pairs of the tile are visible, or none, apart from the band.
  __device__ __forceinline__ bool shows_all() const { return true; }
  __device__ __forceinline__ bool hides_all() const { return false; }

  // One more logit of each row.
  __device__ __forceinline__ float sink() const { return -infinity(); }

  // Which weights of one or two tiles of 16 x 16 survive, as far as this lane draws them, and their factor.
  template <int kTiles>
  __device__ __forceinline__ Draw<kTiles> draw(unsigned, unsigned) const {
    return {};
  }
  __device__ __forceinline__ float survivor_factor() const { return 1.0f; }
};

// Whether scores may be of any size, as with a bias of -1e30 for what is hidden: of those log2(e) times a score must be
// rounded before a base is subtracted, or what is left is the rounding of the base.
template <class Options>
constexpr bool kScoresOfAnySize = Options::kChangesScores && !Options::kHasPenalties && !Options::kLeavesFactor;

// The pairs of one sequence and head: which see each other, and what becomes of their scores. Positions may lie beyond
// the ends of the sequence, where options must not look. A key is an int or a Neighbour.
template <class Options, Size kSize = Size::kAny>
struct Pairs {
  static constexpr bool kHasDropout = Options::kHasDropout;

  const Options& options;
  const Band& band;
  float scale;

  template <class Key>
  __device__ __forceinline__ Dual score(float product, int query, Key key) const {
    return options.score(options.template scaled<kSize>(product, scale), inside(query, band.seqlen_q),
                         inside(key, band.seqlen_k));
  }

  // The same as a factor of all scores and the rest of this one; with the slope of the score.
  __device__ __forceinline__ float factor() const {
    return Options::kLeavesFactor && kSize != Size::kAny ? options.template factor<kSize>() : 1.0f;
  }
  template <class Key>
  __device__ __forceinline__ Dual score_over_factor(float product, int query, Key key) const {
    if constexpr (Options::kLeavesFactor && kSize != Size::kAny) {
      return options.template over_factor<kSize>(product);
    } else {
      return score(product, query, key);
    }
  }

  // Options are asked in any case: a branch around a load of a mask would wait for it.
  __device__ __forceinline__ bool visible(int query, int key) const {
    const bool in_band = band.visible(query, key);
    if constexpr (Options::kHidesPairs) {
      return in_band & visible_by_options(query, key);
    } else {
      return in_band;
    }
  }

  // The same apart from the band.
  template <class Key>
  __device__ __forceinline__ bool visible_by_options(int query, Key key) const {
    return options.visible(inside(query, band.seqlen_q), inside(key, band.seqlen_k));
  }

  // Then a tile may be visited all the same, but options have nothing to look at.
  __device__ __forceinline__ bool has_no_keys() const { return Options::kReadsArrays && band.seqlen_k == 0; }
  __device__ __forceinline__ bool options_hide_nothing() const { return options.shows_all() || has_no_keys(); }

  // Calls hide(visible) for each mask that may hide pairs of a tile.
  template <class Hide>
  __device__ __forceinline__ void each_mask(Range queries, Range keys, Hide hide) const {
    if (!band.all_visible(queries, keys)) hide([&](int query, int key) { return band.visible(query, key); });
    if constexpr (Options::kHidesPairs) {
      if (options.shows_all()) return;
      hide([&](int query, int key) { return visible_by_options(query, key); });
    }
  }

 protected:
  template <class Position>
  static __device__ __forceinline__ auto inside(Position position, int length) {
    if constexpr (Options::kReadsArrays) {
      return min(static_cast<int>(position), length - 1);
    } else {
      return position;
    }
  }
};

// The same, where gradients are those by the bias.
template <class Options, Size kSize = Size::kAny>
struct BiasPairs : Pairs<Options, kSize> {
  template <class Key>
  __device__ __forceinline__ Dual score(float product, int query, Key key) const {
    return this->options.score_by_bias(this->options.template scaled<kSize>(product, this->scale),
                                       this->inside(query, this->band.seqlen_q),
                                       this->inside(key, this->band.seqlen_k));
  }
};

// Calls use(pairs) with the kind of pairs that suits these products of a warp.
template <template <class, Size> class SomePairs, class Options, class Tile, class Use>
__device__ __forceinline__ void use_pairs(const SomePairs<Options, Size::kAny>& pairs, Tile& products, Use use) {
  if constexpr (Options::kHasShortWays) {
    const float largest = products.largest();
    if (__all_sync(kFullMask, pairs.options.allows(Size::kSmall, largest))) {
      use(SomePairs<Options, Size::kSmall>{pairs.options, pairs.band, pairs.scale});
    } else if (__all_sync(kFullMask, pairs.options.allows(Size::kModerate, largest))) {
      use(SomePairs<Options, Size::kModerate>{pairs.options, pairs.band, pairs.scale});
    } else {
      use(pairs);
    }
  } else {
    use(pairs);
  }
}

}  // namespace cuflash
