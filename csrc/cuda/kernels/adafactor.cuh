// What Adafactor's kernels share. A matrix is cut into tiles, one for a warp, which holds a piece of 16 bytes of each row
// for every lane and walks down the rows, a few loads ahead. A block's tiles are of one matrix. Elements that are no
// matrix are strided over by the blocks of their parameter.
#pragma once

#include "cuda/kernels/adafactor.h"
#include "cuda/kernels/batch.cuh"
#include "cuda/kernels/rows.cuh"

namespace glam::cuda::adafactor {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBatch = 4;       // rows loaded at a time
constexpr int kRowTiles = 256;  // of a matrix, at most: whoever adds their sums goes through them in turn
constexpr int64_t kFlatBlocks = 1024;

static_assert(kWarp % kBatch == 0, "a lane knows the statistics of one row in kWarp");

// Of a matrix [R, C] with elements.
struct Tiles {
  int rows;  // of a tile, a multiple of kWarp
  int row_tiles, column_tiles;

  template <class T>
  static __host__ __device__ __forceinline__ Tiles of(int R, int C) {
    const int rows = ((R - 1) / (kRowTiles * kWarp) + 1) * kWarp;
    return {.rows = rows, .row_tiles = (R - 1) / rows + 1, .column_tiles = (C - 1) / (kWarp * Vector<T>::size) + 1};
  }
  __host__ __device__ __forceinline__ int count() const { return row_tiles * column_tiles; }
  __host__ __device__ __forceinline__ int blocks() const { return (count() - 1) / kWarps + 1; }
};

// A warp's tile, and a lane's columns in it.
struct Tile {
  int matrix, column_tile;
  int strip;      // of rows, counted through all matrices
  int64_t index;  // of the tile, likewise
  int64_t row;    // the first, likewise
  int rows;       // 0 if the block has more warps than there are tiles left
  int column;
};

template <class T>
__device__ __forceinline__ Tile this_tile(const Tiles& tiles, int R, unsigned block) {
  const unsigned blocks = tiles.blocks();
  const int matrix = static_cast<int>(block / blocks);
  const int index = static_cast<int>(block % blocks * kWarps + threadIdx.x / kWarp);
  const int row_tile = index / tiles.column_tiles, row = row_tile * tiles.rows;
  Tile tile;
  tile.matrix = matrix;
  tile.column_tile = index % tiles.column_tiles;
  tile.strip = matrix * tiles.row_tiles + row_tile;
  tile.index = int64_t{matrix} * tiles.count() + index;
  tile.row = int64_t{matrix} * R + row;
  tile.rows = row_tile < tiles.row_tiles ? min(tiles.rows, R - row) : 0;
  tile.column = (tile.column_tile * kWarp + static_cast<int>(threadIdx.x) % kWarp) * Vector<T>::size;
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

// A block's first element and the distance to its next ones, of a parameter that its blocks stride over together.
template <class T>
__device__ __forceinline__ int64_t first_element(const Place& place) {
  return (int64_t{place.block} * kThreads + threadIdx.x) * Vector<T>::size;
}
template <class T>
__device__ __forceinline__ int64_t element_stride(const Place& place) {
  return int64_t{place.blocks} * kThreads * Vector<T>::size;
}

// Hands out 16-byte aligned parts of the workspace, or without one counts what it must hold.
class Workspace {
 public:
  explicit Workspace(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t begin = bytes_;
    bytes_ += ceil_div(count * int64_t{sizeof(T)}, 16) * 16;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

// Whether a pass over the parameter goes through its matrices: factored, and not empty.
inline bool has_matrices(const AdafactorParameter& parameter) { return parameter.factored && parameter.numel() > 0; }

template <class T>
Tiles tiles_of(const AdafactorParameter& parameter) {
  return Tiles::of<T>(static_cast<int>(parameter.R), static_cast<int>(parameter.C));
}

inline int64_t flat_blocks(int64_t count, int size) {
  return count == 0 ? 0 : clamp(ceil_div(count, int64_t{kThreads} * size), 1, kFlatBlocks);
}

// Blocks of a pass over a parameter.
template <class T>
int64_t blocks_of(const AdafactorParameter& parameter) {
  return has_matrices(parameter) ? parameter.N * tiles_of<T>(parameter).blocks()
                                 : flat_blocks(parameter.numel(), Vector<T>::size);
}

}  // namespace glam::cuda::adafactor
