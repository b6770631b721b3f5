// Shadows <cuflash/ptx/wgmma.cuh>: one template for all widths. A warp computes its 16 rows at once.
#pragma once

namespace cuflash::ptx {

using TileDescriptor = unsigned long long;

// Element (i, k) of a factor of 16-bit numbers in the 128-byte swizzle; i counts rows of a, or columns of b.
template <bool kAcross>
inline uint16_t element_at(TileDescriptor tile, int i, int k) {
  // Shared addresses are those of the host here (shared_address.cuh), of which the descriptor keeps the low bits.
  unsigned char* const memory = hostcuda::block->shared_memory;
  const unsigned low = static_cast<unsigned>(tile) - static_cast<unsigned>(reinterpret_cast<uintptr_t>(memory) / 16);
  const unsigned start = low % (1 << 14) * 16, leading_bytes = (low >> 16) * 16;
  const unsigned row = kAcross ? k : i, byte = start % 128 + 2 * (kAcross ? i : k);
  const unsigned place = start / 128 * 128 + row * 128 + byte / 128 * leading_bytes + byte % 128;
  uint16_t bits;
  memcpy(&bits, memory + (place ^ (place / 128 % 8 * 16)), sizeof bits);
  return bits;
}

template <class Element, int kWidth>
struct Wgmma {
  template <bool kAcrossA, bool kAcrossB>
  static void multiply(float (&sum)[kWidth / 2], TileDescriptor a, TileDescriptor b, bool add,
                       hostcuda::Site site = hostcuda::Site::here()) {
    const int first_row = hostcuda::current->rank / 32 % 4 * 16;
    run<kAcrossB>({sum, a, b, add}, site, [&](int row, int k, const hostcuda::Lanes<Argument>&) {
      return element_at<kAcrossA>(a, first_row + row, k);
    });
  }

  template <bool kAcrossB>
  static void multiply(float (&sum)[kWidth / 2], const unsigned (&a)[4], TileDescriptor b, bool add,
                       hostcuda::Site site = hostcuda::Site::here()) {
    Argument argument = {sum, 0, b, add};
    memcpy(argument.words, a, sizeof a);
    run<kAcrossB>(argument, site, [](int row, int k, const hostcuda::Lanes<Argument>& lanes) {
      const unsigned word = lanes[row % 8 * 4 + k % 8 / 2].words[k / 8 * 2 + row / 8];
      return static_cast<uint16_t>(word >> 16 * (k % 2));
    });
  }

 private:
  static constexpr int kRows = 16, kDepth = 16;  // of a warp

  struct Argument {
    float* sum;
    TileDescriptor a, b;
    bool add;
    unsigned words[4];
  };

  // The last lane that comes works for the warp; a_at(row, k, lanes) is what it takes from the first factor.
  template <bool kAcrossB, class At>
  static void run(Argument argument, hostcuda::Site site, At a_at) {
    hostcuda::warp_operation(hostcuda::kAllLanes, "wgmma", site, argument, [&](const hostcuda::Lanes<Argument>& lanes) {
      if (!lanes.all_present()) {
        hostcuda::fail("wgmma at %s:%d: some lanes of the warp have exited", site.file, site.line);
      }
      float factor_a[kRows][kDepth], factor_b[kDepth][kWidth], product[kRows][kWidth];
      for (int k = 0; k < kDepth; ++k) {
        for (int i = 0; i < kRows; ++i) factor_a[i][k] = number(a_at(i, k, lanes));
        for (int j = 0; j < kWidth; ++j) factor_b[k][j] = number(element_at<kAcrossB>(argument.b, j, k));
      }
      multiply_matrices(product, factor_a, factor_b);
      lanes.for_each([&](int lane, Argument& mine) {
        if (mine.a != argument.a || mine.b != argument.b || mine.add != argument.add) {
          hostcuda::fail("wgmma at %s:%d: lanes disagree about the factors", site.file, site.line);
        }
        for (int i = 0; i < kWidth / 2; ++i) {
          const float x = product[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
          mine.sum[i] = mine.add ? mine.sum[i] + x : x;
        }
      });
    });
  }

  static float number(uint16_t bits) { return hostcuda::to_float(hostcuda::bits_as<Element>(bits)); }

  // Most of the time of an emulated kernel: worth being optimised.
  __attribute__((optimize("O3"))) static void multiply_matrices(float (&product)[kRows][kWidth],
                                                                const float (&a)[kRows][kDepth],
                                                                const float (&b)[kDepth][kWidth]) {
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kWidth; ++j) product[i][j] = 0.0f;
      for (int k = 0; k < kDepth; ++k) {
        for (int j = 0; j < kWidth; ++j) product[i][j] += a[i][k] * b[k][j];
      }
    }
  }
};

inline void wgmma_fence() {}
inline void wgmma_commit() {}

template <int kPending>
inline void wgmma_wait(hostcuda::Site site = hostcuda::Site::here()) {
  __syncwarp(hostcuda::kAllLanes, site);  // as .aligned says, all lanes come here
}

}  // namespace cuflash::ptx
