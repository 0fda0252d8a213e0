// Sums of squares: of any tensor, and along the rows and columns of a gradient. Column sums stay in registers; row sums
// go through the warps.

#include "cuda/kernels/adafactor.cuh"

namespace glam::cuda {
namespace {

using namespace adafactor;

template <bool aligned, class T>
__global__ void __launch_bounds__(kThreads) squares_kernel(const T* x, int64_t count, double* partial_B2) {
  using S = Sum<T>;
  constexpr int size = Vector<T>::size;
  auto& shared = shared_storage<PairShared>();
  double sum = 0;
  S overflow = 0;  // stays 0 unless a square is infinite or NaN
  const int64_t stride = int64_t{gridDim.x} * kThreads * size;
#pragma unroll 2
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * size; i < count; i += stride) {
    const Vector<T> part = load_part<aligned>(x, i, count);
#pragma unroll
    for (int j = 0; j < size; ++j) {
      const S value = wide(part[j]);
      sum += static_cast<double>(value) * value;
      overflow += value * value * S(0);
    }
  }
  double sums[2] = {sum, overflow == S(0) ? 0. : 1.};
  block_sums(sums, shared.sums);
  if (threadIdx.x > 0) return;
  store(partial_B2 + 2 * blockIdx.x, sums[0]);
  store(partial_B2 + 2 * blockIdx.x + 1, sums[1]);
}

__global__ void __launch_bounds__(kFinishThreads)
    finish_squares_kernel(const double* partial_B2, int64_t blocks, double* sum, bool* nonfinite) {
  auto& shared = shared_storage<PairShared>();
  const double total = sum_of_partials(partial_B2, blocks, 2, shared.sums);
  const double bad = sum_of_partials(partial_B2 + 1, blocks, 2, shared.sums);
  if (threadIdx.x > 0) return;
  store(sum, total);
  if (nonfinite != nullptr) store(nonfinite, bad != 0);
}

template <class T>
struct SumsShared {
  T rows[kGroup][kWarps];
  double weight[kMaxWarps];
};

template <class T>
struct SumsPartial {
  double* weight;  // [tiles]
  T* rows;         // [column tiles, N * R]
  T* columns;      // [N * row tiles, C]

  static int64_t bytes(const MatrixShape& shape, const Tiles& tiles) {
    return rows_at(shape, tiles) + (tiles.column_tiles * shape.N * shape.R + 16) * sizeof(T) +
           shape.N * tiles.row_tiles * shape.C * sizeof(T);
  }
  static SumsPartial at(void* partial, const MatrixShape& shape, const Tiles& tiles) {
    auto* const rows = reinterpret_cast<T*>(static_cast<char*>(partial) + rows_at(shape, tiles));
    return {static_cast<double*>(partial), rows, rows + ceil_div(tiles.column_tiles * shape.N * shape.R, 16) * 16};
  }
  static int64_t rows_at(const MatrixShape& shape, const Tiles& tiles) {
    return ceil_div(tiles.count(shape.N), 2) * 16;
  }
};

template <bool whole, class T>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(const T* grad_NRC, const T* weight_NRC, Tiles tiles, int64_t total_rows, SumsPartial<T> partial) {
  constexpr int size = Vector<T>::size;
  auto& shared = shared_storage<SumsShared<T>>();
  const Tile tile = this_tile<T>(tiles);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const bool active = tile.column < tiles.C;
  const int64_t first_row = tile.matrix * tiles.R;
  T columns[size] = {};
  double weight_squares = 0;
  for (int64_t group = tile.row; group < tile.end; group += kGroup) {
    for (int r = 0; r < kGroup; r += kBatch) {
      Vector<T> grad[kBatch], weight[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t row = group + r + b, at = (first_row + row) * tiles.C;
        if (!active || row >= tile.end) continue;
        grad[b] = load_piece<whole>(grad_NRC + at, tile.column, tiles.C);
        weight[b] = load_piece<whole>(weight_NRC + at, tile.column, tiles.C);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        T row_sum = 0;
        if (active && group + r + b < tile.end) {
#pragma unroll
          for (int i = 0; i < size; ++i) {
            const T square = grad[b][i] * grad[b][i];
            row_sum += square;
            columns[i] += square;
            weight_squares += static_cast<double>(weight[b][i]) * weight[b][i];
          }
        }
        row_sum = warp_sum(row_sum);
        if (lane == 0) store(&shared.rows[r + b][warp], row_sum);
      }
    }
    __syncthreads();
    if (thread < kGroup && group + thread < tile.end) {
      T sum = 0;
      for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) sum += load(&shared.rows[thread][w]);
      store(partial.rows + tile.column_tile * total_rows + first_row + group + thread, sum);
    }
    __syncthreads();
  }
  if (active) {
    T* const columns_C = partial.columns + (tile.matrix * tiles.row_tiles + tile.row_tile) * tiles.C;
    store_values<whole>(columns_C, tile.column, tiles.C, columns);
  }
  weight_squares = block_sum(weight_squares, shared.weight);
  if (thread == 0) store(partial.weight + blockIdx.x, weight_squares);
}

template <class T>
struct FinishSumsShared {
  ColumnSums<T> columns;
  double weight[kMaxWarps];
};

static_assert(kColumnWarps * kWarp == kThreads, "the same block adds rows and columns");

// Blocks of rows first, then blocks of columns, then one for the weight's squares.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_sums_kernel(SumsPartial<T> partial, Tiles tiles, int64_t total_rows, int64_t row_blocks,
                       int64_t blocks_per_matrix, int64_t num_tiles, T* row_sums, T* col_sums, double* weight_squares) {
  auto& shared = shared_storage<FinishSumsShared<T>>();
  const int64_t block = blockIdx.x;
  if (block < row_blocks) {
    const int64_t row = block * kThreads + threadIdx.x;
    if (row >= total_rows) return;
    T sum = 0;
#pragma unroll 4
    for (int64_t i = 0; i < tiles.column_tiles; ++i) sum += load(partial.rows + i * total_rows + row);
    store(row_sums + row, sum);
  } else if (block + 1 < int64_t{gridDim.x}) {
    const int64_t matrix = (block - row_blocks) / blocks_per_matrix;
    const int64_t column = (block - row_blocks) % blocks_per_matrix * kWarp + threadIdx.x % kWarp;
    const T* const parts = partial.columns + matrix * tiles.row_tiles * tiles.C;
    const T sum = column_sum(parts, tiles.row_tiles, int64_t{tiles.C}, column, shared.columns);
    if (threadIdx.x < kWarp && column < tiles.C) store(col_sums + matrix * tiles.C + column, sum);
  } else {
    const double sum = sum_of_partials(partial.weight, num_tiles, 1, shared.weight);
    if (threadIdx.x == 0) store(weight_squares, sum);
  }
}

}  // namespace

int64_t squared_norm_partial_bytes(int64_t) { return 2 * kFlatBlocks * int64_t{sizeof(double)}; }

void squared_norm(const void* x, Type type, int64_t count, void* partial, double* sum, bool* nonfinite,
                  cudaStream_t stream) {
  auto* const partial_B2 = static_cast<double*>(partial);
  dispatch_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t blocks = flat_blocks(count, Vector<T>::size);
    dispatch_bool(rows_are_vectors<T>(0, x), [&](auto aligned) {
      launch(&squares_kernel<decltype(aligned)::value, T>, grid_of(blocks), dim3(kThreads), sizeof(PairShared), stream,
             static_cast<const T*>(x), count, partial_B2);
    });
    launch(&finish_squares_kernel, dim3(1), dim3(kFinishThreads), sizeof(PairShared), stream, partial_B2, blocks, sum,
           nonfinite);
  });
}

int64_t adafactor_sums_partial_bytes(const MatrixShape& shape, Type type) {
  int64_t bytes = 0;
  dispatch_sum(type, [&](auto zero) {
    using T = decltype(zero);
    bytes = SumsPartial<T>::bytes(shape, Tiles::of<T>(shape));
  });
  return bytes;
}

void adafactor_sums(const void* grad, const void* weight, Type type, const MatrixShape& shape, void* partial,
                    void* row_sums, void* col_sums, double* weight_squares, cudaStream_t stream) {
  dispatch_sum(type, [&](auto zero) {
    using T = decltype(zero);
    const Tiles tiles = Tiles::of<T>(shape);
    const auto parts = SumsPartial<T>::at(partial, shape, tiles);
    const int64_t num_tiles = tiles.count(shape.N), rows = shape.N * shape.R;
    dispatch_bool(rows_are_vectors<T>(shape.C, grad, weight, parts.columns), [&](auto whole) {
      launch(&sums_kernel<decltype(whole)::value, T>, grid_of(num_tiles), dim3(tiles.threads), sizeof(SumsShared<T>),
             stream, static_cast<const T*>(grad), static_cast<const T*>(weight), tiles, rows, parts);
    });
    const int64_t row_blocks = ceil_div(rows, kThreads), blocks_per_matrix = ceil_div(shape.C, kWarp);
    launch(&finish_sums_kernel<T>, grid_of(row_blocks + shape.N * blocks_per_matrix + 1), dim3(kThreads),
           sizeof(FinishSumsShared<T>), stream, parts, tiles, rows, row_blocks, blocks_per_matrix, num_tiles,
           static_cast<T*>(row_sums), static_cast<T*>(col_sums), weight_squares);
  });
}

}  // namespace glam::cuda
