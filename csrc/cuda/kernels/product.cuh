// One tile of a product A B by one block, from operands that are read through functors.
//
// A block of 256 threads makes a tile of 64 x 64: thread (i, j) of 16 x 16 sums the rows i, i + 16, ... and the columns
// j, j + 16, ..., so that neighbouring threads read neighbouring words of shared memory. k is walked in steps of 16 and
// in ascending order; what lies outside the operands must read as 0.
#pragma once

#include "cuda/kernels/device.cuh"

namespace glam::cuda {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kProductThreads = 256;
constexpr int kSide = 16;  // threads along one side of the tile
constexpr int kPerThread = kTile / kSide;
constexpr int kLoads = kTile * kDepth / kProductThreads;  // of each operand, per thread and step

// Two words of padding: 16 rows of k at one column then lie in different banks.
template <class Acc>
struct ProductStorage {
  Acc a[kDepth][kTile + 2];
  Acc b[kDepth][kTile + 2];
};

template <class Acc>
using TileSums = Acc[kPerThread][kPerThread];

// The row (or column) within the tile and the k within the step of this thread's load `i`. Neighbouring threads take
// neighbouring k where the operand lies along k in memory, and neighbouring rows otherwise.
template <bool along_k>
struct LoadIndex {
  int row, k;
  __device__ explicit LoadIndex(int i) {
    const int index = i * kProductThreads + static_cast<int>(threadIdx.x);
    row = along_k ? index / kDepth : index % kTile;
    k = along_k ? index % kDepth : index / kTile;
  }
};

// sums += A B over k in [0, depth): a(row, k) for row in [0, 64), b(column, k). All threads of the block take part.
template <bool a_along_k, bool b_along_k, class Acc, class A, class B>
__device__ void multiply_tile(ProductStorage<Acc>& storage, int64_t depth, const A& a, const B& b,
                              TileSums<Acc>& sums) {
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const LoadIndex<a_along_k> at(i);
      store(&storage.a[at.k][at.row], k0 + at.k < depth ? a(at.row, k0 + at.k) : Acc(0));
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const LoadIndex<b_along_k> at(i);
      store(&storage.b[at.k][at.row], k0 + at.k < depth ? b(at.row, k0 + at.k) : Acc(0));
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      Acc left[kPerThread], right[kPerThread];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) left[i] = load(&storage.a[k][row + kSide * i]);
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) right[j] = load(&storage.b[k][column + kSide * j]);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) sums[i][j] += left[i] * right[j];
      }
    }
    __syncthreads();  // before the next step overwrites the tiles
  }
}

// f(row, column, sum) for every element of the tile that this thread holds.
template <class Acc, class F>
__device__ __forceinline__ void for_each_sum(const TileSums<Acc>& sums, const F& f) {
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) f(row + kSide * i, column + kSide * j, sums[i][j]);
  }
}

// Up to 64 rows of one segment.
struct RowTile {
  int64_t begin;
  int rows;
  int expert;  // -1: rows that belong to no segment
};

// The most tiles that R rows in S segments make, the unused rows counted as one segment more.
constexpr int64_t most_row_tiles(int64_t R, int64_t S) { return R / kTile + S + 1; }

struct Segments {
  const int32_t* offsets;  // null: one segment that has all rows
  int64_t num_segments, num_rows;
  int num_experts;

  __device__ int64_t begin(int64_t segment) const {
    if (!offsets) return segment == 0 ? 0 : num_rows;
    const int64_t offset = load(offsets + segment);
    return offset < 0 ? 0 : offset > num_rows ? num_rows : offset;
  }

  // Tile number `tile` in the order of the rows; rows = 0 if there are not so many. Every lane of the warp must call
  // it.
  __device__ RowTile find(int64_t tile) const {
    const int lane = threadIdx.x % kWarp;
    for (int64_t base = 0; base < num_segments; base += kWarp) {
      const int64_t segment = base + lane;
      const int64_t first = segment < num_segments ? begin(segment) : 0;
      const int64_t count = segment < num_segments ? begin(segment + 1) - first : 0;
      const int64_t tiles = count > 0 ? ceil_div(count, kTile) : 0;
      int64_t upto = tiles;
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const int64_t before = __shfl_up_sync(kAllLanes, upto, distance);
        if (lane >= distance) upto += before;
      }
      const unsigned beyond = __ballot_sync(kAllLanes, tile < upto);
      if (beyond != 0) {
        const int found = __ffs(static_cast<int>(beyond)) - 1;
        const int64_t skip = (tile - __shfl_sync(kAllLanes, upto - tiles, found)) * kTile;
        const int64_t start = __shfl_sync(kAllLanes, first, found), size = __shfl_sync(kAllLanes, count, found);
        return {start + skip, static_cast<int>(size - skip < kTile ? size - skip : kTile),
                static_cast<int>((base + found) % num_experts)};
      }
      tile -= __shfl_sync(kAllLanes, upto, kWarp - 1);
    }
    const int64_t start = begin(num_segments) + tile * kTile;
    const int64_t left = num_rows - start;
    return {start, static_cast<int>(left < 0 ? 0 : left < kTile ? left : kTile), -1};
  }
};

}  // namespace glam::cuda
