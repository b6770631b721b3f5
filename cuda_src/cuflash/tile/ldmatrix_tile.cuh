// A tile in shared memory as cp.async writes it and ldmatrix reads it.
#pragma once

#include <cuflash/ptx/ldmatrix.cuh>
#include <cuflash/ptx/opaque.cuh>
#include <cuflash/tile/matrix.cuh>

namespace cuflash {

// Rows follow each other; the 16-byte pieces of a row are swizzled, so that the same piece of 8 rows lies in all 32
// banks of shared memory: piece p of row r is at place p XOR r % 8. Where rows are an odd number of 64 bytes, two of
// them fill the banks, and the piece is at p XOR r / 2 % 4.
template <class Number, int kRows, int kCols>
struct alignas(128) LdmatrixTile {
  using Element = typename Number::Element;

  static constexpr int kSize = sizeof(Element);
  static constexpr int kPitch = kCols * kSize;               // bytes
  static constexpr int kPiece = 16 / kSize;                  // elements of 16 bytes
  static constexpr int kPieces = kPitch % 128 == 0 ? 8 : 4;  // that change places with each other
  static constexpr int kGroup = kPieces * kPiece;            // their columns

  static_assert(kPitch % 64 == 0 && kRows % 16 == 0);

  Element data[kRows * kCols];

  // Where an element is, in elements.
  static __device__ __forceinline__ int offset(int row, int col) {
    const int place = col / kPiece ^ row / (8 / kPieces) % kPieces;
    return row * kCols + place * kPiece + col % kPiece;
  }

  // Whether so many columns, from a multiple of them on, stay within a group or take whole ones: then XOR with a
  // constant leads from their first column to any other.
  template <int kWidth>
  static constexpr bool kKeepsGroups = kGroup % kWidth == 0 || kWidth % kGroup == 0;

  // From the place of an element, in bytes, to that of one whole pieces to the right and a multiple of 8 rows below. An
  // address can be the place, since tiles begin at multiples of 128.
  template <class Place>
  static __device__ __forceinline__ Place moved(Place place, int row, int col) {
    return turned(place, col) + row * kPitch + group_of(col);
  }
  // Its parts: XOR within a group of columns, and the bytes to the group.
  template <class Place>
  static __device__ __forceinline__ Place turned(Place place, int col) {
    return place ^ kSize * (col % kGroup);
  }
  static __device__ __forceinline__ constexpr int group_of(int col) { return kSize * (col / kGroup * kGroup); }

  // Starts to copy rows [first_row, first_row + kRows) and the first kCols columns of a matrix; whatever lies outside
  // of it becomes 0.
  // Complete after cp_async_wait and a barrier. `thread` counts the kNumThreads threads that share the work.
  template <int kNumThreads>
  __device__ __forceinline__ void load(const Matrix<const Element>& source, int first_row,
                                       unsigned thread = threadIdx.x) {
    ptx::make_opaque(thread);  // places are found anew for each tile: the registers belong to the products
    // Each thread copies the same piece of every kRowStep-th row, so that it stays at the same place.
    constexpr int kRowStep = kNumThreads / kPieces;
    static_assert(kRowStep % 8 == 0);
    if (source.vectorized) {
      const int row = thread / kPieces, col = thread % kPieces * kPiece;
      Element* const target = data + offset(row, col);
      const Element* const address = source.at(first_row + row, col);
      const long long step = kRowStep * source.row_stride;
      if (kRows % kRowStep == 0 && first_row + kRows <= source.rows && source.cols >= kCols) {
        const Element* of_row = address;
#pragma unroll
        for (int i = 0; i < kRows / kRowStep; ++i) {
#pragma unroll
          for (int group = 0; group < kCols; group += kGroup) {
            ptx::cp_async_16(target + i * kRowStep * kCols + group, of_row + group, true);
          }
          of_row += step;
        }
      } else {
        const Element* of_row = address;
        const int num_rows = source.rows - first_row - row, num_cols = source.cols - col;
#pragma unroll
        for (int i = 0; i < ceil_div(kRows, kRowStep); ++i) {
          if (kRows % kRowStep != 0 && row + i * kRowStep >= kRows) break;
#pragma unroll
          for (int group = 0; group < kCols; group += kGroup) {
            ptx::cp_async_16(target + i * kRowStep * kCols + group, of_row + group,
                             i * kRowStep < num_rows && group < num_cols);
          }
          of_row += step;
        }
      }
    } else {
#pragma unroll 1  // the rare path leaves the registers to the others
      for (int index = static_cast<int>(thread); index < kRows * kCols; index += kNumThreads) {
        const int row = index / kCols, col = index % kCols;
        const bool inside = first_row + row < source.rows && col < source.cols;
        data[offset(row, col)] = inside ? *source.at(first_row + row, col) : from_float<Element>(0.0f);
      }
    }
  }
};

// A tile that not all kernels have.
template <bool kIsThere, class Tile>
struct TileIf : Tile {};
template <class Tile>
struct alignas(16) TileIf<false, Tile> {
  unsigned char nothing[16];
};

// The order in which ldmatrix loads four matrices, 8 rows of 16 bytes each, of 16 rows: by columns, so that x[1] is the
// lower left one, or by rows, so that it is the upper right one. mma takes registers in a row: a first factor along the
// rows of memory and a second factor across them come by columns, the other two by rows. ldmatrix transposes 16-bit
// elements alone; of longer ones lanes read a column themselves, in the even or the odd ones of 8 rows.
enum class Order { kByColumns, kByRows, kEvenRows, kOddRows };

// Where a lane begins to read such a tile, in bytes: for ldmatrix it gives the place of one row of one matrix. Found
// anew wherever it is needed: that takes less time than the registers of an old one would cost.
template <class Tile, Order kOrder>
__device__ __forceinline__ int start_of_lane(int first_row = 0) {
  unsigned thread = threadIdx.x;
  ptx::make_opaque(thread);
  const int lane = thread % 32;
  if constexpr (kOrder == Order::kEvenRows || kOrder == Order::kOddRows) {
    const int odd = kOrder == Order::kOddRows;
    return Tile::kSize * Tile::offset(first_row + lane % 4 * 2 + odd, lane / 4);
  } else {
    const int first = lane / 8 % 2 * 8, second = lane / 16 * 8;
    const bool by_rows = kOrder == Order::kByRows;
    const int row = first_row + lane % 8 + (by_rows ? second : first), col = by_rows ? first : second;
    return Tile::kSize * Tile::offset(row, col / (8 / Tile::kPiece));
  }
}

// An element of a tile, at multiples of 16; its column must keep groups (LdmatrixTile).
struct Corner {
  int row, col;
};

// How a lane reads a tile. From a multiple of 16 rows on: the address of the tile is the same for all lanes, and takes
// none of their registers. A column that is no constant takes an instruction more.
template <class Tile, Order kOrder, class Start = int>
struct TileReader {
  const Tile& tile;
  int start;

  __device__ __forceinline__ explicit TileReader(const Tile& tile, int first_row = 0)
      : tile(tile), start(start_of_lane<Tile, kOrder>(first_row)) {}

  __device__ __forceinline__ ptx::SharedAddress at(int row, int col) const {
    // Sum by sum: the compiler then finds the constants.
    return ptx::shared_address(reinterpret_cast<const unsigned char*>(tile.data) + Tile::turned(start, col) +
                               row * Tile::kPitch + Tile::group_of(col));
  }
};

// From an element on that the compiler does not know: further addresses differ from its own by constants.
template <class Tile, Order kOrder>
struct TileReader<Tile, kOrder, Corner> {
  ptx::SharedAddress start;

  __device__ __forceinline__ TileReader(const Tile& tile, const Corner& corner)
      : start(Tile::moved(ptx::shared_address(tile.data) + start_of_lane<Tile, kOrder>(), corner.row, corner.col)) {}

  __device__ __forceinline__ ptx::SharedAddress at(int row, int col) const { return Tile::moved(start, row, col); }
};

// How a lane writes the words that it has of a product (WarpgroupFactor), one of each row of 16-byte pieces, from a row
// on that is a multiple of 16, and a column that is one of what is written. Columns of float32 stay in the order that
// those words have.
template <class Tile>
struct TileWriter {
  Tile& tile;
  int start;  // bytes

  __device__ __forceinline__ TileWriter(Tile& tile, int first_row, int first_col) : tile(tile) {
    unsigned lane = threadIdx.x % 32;
    ptx::make_opaque(lane);
    start = Tile::moved(Tile::kSize * Tile::offset(lane / 4, 0) ^ lane % 4 * 4, first_row, first_col);
  }

  // Rows are multiples of 8, columns whole pieces.
  __device__ __forceinline__ void store(int row, int col, unsigned word) const {
    *reinterpret_cast<unsigned*>(reinterpret_cast<unsigned char*>(tile.data) + Tile::moved(start, row, col)) = word;
  }

  // All words of 16 rows.
  template <class Factor>
  __device__ __forceinline__ void store(const Factor& factor, int first_row) const {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(factor) / 4); ++i) {
      store(first_row + i % 2 * 8, i / 2 * Tile::kPiece, factor.x[i / 4][i % 4]);
    }
  }
};

}  // namespace cuflash
