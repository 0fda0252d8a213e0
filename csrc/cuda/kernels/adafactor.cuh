// What Adafactor's kernels share. A matrix is cut into tiles: a block holds a piece of 16 bytes of each row for every
// thread and walks down the rows, a few loads ahead.
#pragma once

#include "cuda/kernels/adafactor.h"
#include "cuda/kernels/rows.cuh"

namespace glam::cuda::adafactor {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroup = 32;          // rows between two barriers of a tile
constexpr int kBatch = 4;           // rows loaded at a time
constexpr int64_t kRowTiles = 256;  // of a matrix, at most: whoever adds their sums goes through them in turn
constexpr int64_t kFlatBlocks = 1024;
constexpr int kFinishThreads = 1024;

static_assert(kGroup % kBatch == 0 && kGroup <= kWarp, "a warp sees to a group's rows");

struct Tiles {
  int64_t R, row_tiles, column_tiles, rows_per_tile;
  int C, threads;

  template <class T>
  static Tiles of(const MatrixShape& shape) {
    const int64_t pieces = ceil_div(shape.C, Vector<T>::size);
    const int64_t rows = ceil_div(ceil_div(shape.R, kRowTiles), kGroup) * kGroup;
    const int threads = threads_for(pieces, 1, kThreads);
    return {.R = shape.R,
            .row_tiles = ceil_div(shape.R, rows),
            .column_tiles = ceil_div(pieces, threads),
            .rows_per_tile = rows,
            .C = static_cast<int>(shape.C),
            .threads = threads};
  }
  int64_t count(int64_t N) const { return N * row_tiles * column_tiles; }
};

// This block's tile, and this thread's columns in it.
struct Tile {
  int64_t matrix, row_tile, column_tile, row, end;  // rows [row, end) of the matrix
  int column;
};

template <class T>
__device__ __forceinline__ Tile this_tile(const Tiles& tiles) {
  Tile tile;
  const int64_t strip = int64_t{blockIdx.x} / tiles.column_tiles;
  tile.column_tile = int64_t{blockIdx.x} % tiles.column_tiles;
  tile.matrix = strip / tiles.row_tiles;
  tile.row_tile = strip % tiles.row_tiles;
  tile.row = tile.row_tile * tiles.rows_per_tile;
  tile.end = tile.row + tiles.rows_per_tile < tiles.R ? tile.row + tiles.rows_per_tile : tiles.R;
  tile.column = static_cast<int>(tile.column_tile * blockDim.x + threadIdx.x) * Vector<T>::size;
  return tile;
}

__device__ __forceinline__ bool is_set(const bool* skip) { return skip != nullptr && load(skip); }

// The sum of values[0], values[stride], ... over the block.
__device__ __forceinline__ double sum_of_partials(const double* values, int64_t count, int stride, double* shared) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += load(values + i * stride);
  return block_sum(sum, shared);
}

struct PairShared {
  double sums[2 * kMaxWarps];
};

struct ScalarShared {
  double value;
};

inline int64_t flat_blocks(int64_t count, int size) {
  return clamp(ceil_div(count, int64_t{kThreads} * size), 1, kFlatBlocks);
}

inline dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

}  // namespace glam::cuda::adafactor
