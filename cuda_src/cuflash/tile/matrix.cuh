// A matrix in global memory with any strides, and its tiles in shared memory.
#pragma once

#include <cuflash/common/math.cuh>
#include <cuflash/common/numbers.cuh>
#include <cuflash/ptx/cp_async.cuh>

namespace cuflash {

// Strides of an array seen as (batch, heads, rows, columns), in elements.
struct Strides {
  long long batch, head, row, col;
};

// The (rows, cols) matrix of one batch entry and head.
template <class T>
struct Matrix {
  T* data;
  long long row_stride, col_stride;
  int rows, cols;
  bool vectorized;  // every row can be moved in aligned 16-byte pieces

  static constexpr int kVector = 16 / sizeof(T);

  __device__ __forceinline__ Matrix(T* array, const Strides& strides, int batch, int head, int first_row, int rows = 1,
                                    int cols = 1)
      : data(array + batch * strides.batch + head * strides.head + first_row * strides.row),
        row_stride(strides.row),
        col_stride(strides.col),
        rows(rows),
        cols(cols),
        vectorized(strides.col == 1 && cols % kVector == 0 && strides.row % kVector == 0 &&
                   reinterpret_cast<unsigned long long>(data) % 16 == 0) {}

  __device__ __forceinline__ T* at(int row, int col) const { return data + row * row_stride + col * col_stride; }
};

// A row of shared memory is padded by 16 bytes, so that the rows of a fragment fall into different banks.
template <class T>
constexpr int padded(int cols) {
  return cols + 16 / static_cast<int>(sizeof(T));
}

// How threads share a tile in pieces of 16 bytes: each takes the same columns of every kRowStep-th row. Threads that
// are left over because a row of threads does not fill the block do nothing.
template <class T, int kRows, int kCols, int kNumThreads>
struct VectorWalk {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kThreadsPerRow = smaller(kCols / kVector, kNumThreads);
  static constexpr int kRowStep = kNumThreads / kThreadsPerRow;
  static constexpr int kColStep =
      kThreadsPerRow * kVector;  // less than kCols only where a row has more pieces than threads

  int first_row, first_col;

  __device__ __forceinline__ explicit VectorWalk(int thread)
      : first_row(thread / kThreadsPerRow), first_col(thread % kThreadsPerRow * kVector) {
    if (first_row >= kRowStep) first_row = kRows;
  }
};

// Starts to copy rows [first_row, first_row + kRows) into a tile; whatever lies outside the matrix becomes 0.
// Complete after cp_async_wait and a barrier. `thread` counts the kNumThreads threads that share the work.
template <int kRows, int kCols, int kNumThreads, class T>
__device__ __forceinline__ void load_tile(T* tile, const Matrix<const T>& source, int first_row,
                                          int thread = threadIdx.x) {
  constexpr int kPitch = padded<T>(kCols);
  if (source.vectorized) {
    using Walk = VectorWalk<T, kRows, kCols, kNumThreads>;
    const Walk walk(thread);
    for (int col = walk.first_col; col < kCols; col += Walk::kColStep) {
      const int num_rows = col < source.cols ? source.rows - first_row : 0;
      const T* address = source.at(first_row + walk.first_row, col);
#pragma unroll 1  // a copy is one instruction: leave the registers to the products
      for (int row = walk.first_row; row < kRows; row += Walk::kRowStep) {
        const bool inside = row < num_rows;
        ptx::cp_async_16(tile + row * kPitch + col, inside ? address : source.data, inside);
        address += Walk::kRowStep * source.row_stride;
      }
    }
  } else {
#pragma unroll 1  // the rare path leaves the registers to the others
    for (int index = thread; index < kRows * kCols; index += kNumThreads) {
      const int row = index / kCols, col = index % kCols;
      const bool inside = first_row + row < source.rows && col < source.cols;
      tile[row * kPitch + col] = inside ? *source.at(first_row + row, col) : from_float<T>(0.0f);
    }
  }
}

// Copies a tile to rows [first_row, first_row + kRows), as far as they lie inside the matrix.
// `thread` counts the kNumThreads threads that share the work.
template <int kRows, int kCols, int kNumThreads, class T>
__device__ __forceinline__ void store_tile(const Matrix<T>& target, int first_row, const T* tile, int thread) {
  constexpr int kPitch = padded<T>(kCols);
  if (target.vectorized) {
    using Walk = VectorWalk<T, kRows, kCols, kNumThreads>;
    const Walk walk(thread);
    for (int col = walk.first_col; col < smaller(kCols, target.cols); col += Walk::kColStep) {
      for (int row = walk.first_row; row < smaller(kRows, target.rows - first_row); row += Walk::kRowStep) {
        *reinterpret_cast<uint4*>(target.at(first_row + row, col)) =
            *reinterpret_cast<const uint4*>(tile + row * kPitch + col);
      }
    }
  } else {
    for (int index = thread; index < kRows * kCols; index += kNumThreads) {
      const int row = index / kCols, col = index % kCols;
      if (first_row + row < target.rows && col < target.cols) {
        *target.at(first_row + row, col) = tile[row * kPitch + col];
      }
    }
  }
}

}  // namespace cuflash
