// A matrix is cut into tiles: a block holds a piece of 16 bytes of each row for every thread and walks down the rows, a
// few loads ahead. Column sums stay in registers; row sums go through the warps.

#include "cuda/kernels/adafactor.h"

#include <cmath>

#include "cuda/kernels/rows.cuh"

namespace glam::cuda {
namespace {

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

// As std::max: the first where either is NaN.
__device__ __forceinline__ double larger(double a, double b) { return a < b ? b : a; }

__device__ __forceinline__ double decay_of(const AdafactorDecay& decay) {
  return 1 - std::pow(static_cast<double>(load(decay.step)) + 1, decay.decay);
}

// What the update of an element is multiplied by, but for the mean of its matrix's row statistics.
__device__ __forceinline__ double factor_of(const AdafactorUpdate& update) {
  const auto elements = static_cast<double>(update.num_elements);
  const double weight_rms = std::sqrt(load(update.weight_squares) / elements);
  const double update_rms = std::sqrt(load(update.update_squares) / elements);
  return load(update.lr) * larger(weight_rms, update.min_scale) / larger(1., update_rms / update.clipping);
}

// The sum of values[0], values[stride], ... over the block.
__device__ __forceinline__ double sum_of_partials(const double* values, int64_t count, int stride, double* shared) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += load(values + i * stride);
  return block_sum(sum, shared);
}

// Sums of squares.

struct PairShared {
  double sums[2 * kMaxWarps];
};

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

// adafactor_sums.

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

// adafactor_stats_.

struct ScalarShared {
  double value;
};

// state <- decay state + (1 - decay) (sums / of + eps) for rows, then columns.
template <class T>
__global__ void __launch_bounds__(kThreads)
    means_kernel(const T* row_sums, const T* col_sums, int64_t rows, int64_t columns, double row_of, double column_of,
                 AdafactorDecay decay, T* row_var, T* col_var) {
  if (is_set(decay.skip)) return;
  auto& shared = shared_storage<ScalarShared>();
  if (threadIdx.x == 0) store(&shared.value, decay_of(decay));
  __syncthreads();
  const double rho = load(&shared.value);
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= rows + columns) return;
  const bool is_row = i < rows;
  T* const state = is_row ? row_var + i : col_var + (i - rows);
  const double sum = is_row ? load(row_sums + i) : load(col_sums + (i - rows));
  store(state, static_cast<T>(rho * load(state) + (1 - rho) * (sum / (is_row ? row_of : column_of) + decay.eps)));
}

template <class T>
struct ScaledShared {
  T row_scale[kGroup];
  double sums[2 * kMaxWarps];
};

// Of each tile: the sum of row_var over its rows, in the first of a strip, and that of the scaled squares.
template <bool whole, class T>
__global__ void __launch_bounds__(kThreads)
    scaled_squares_kernel(const T* grad_NRC, Tiles tiles, const T* row_var_NR, const T* col_var_NC, const bool* skip,
                          double* partial_B2) {
  constexpr int size = Vector<T>::size;
  if (is_set(skip)) return;
  auto& shared = shared_storage<ScaledShared<T>>();
  const Tile tile = this_tile<T>(tiles);
  const int thread = static_cast<int>(threadIdx.x);
  const bool active = tile.column < tiles.C;
  const int64_t first_row = tile.matrix * tiles.R;
  T column_scale[size] = {};
  if (active) load_values<whole>(col_var_NC + tile.matrix * tiles.C, tile.column, tiles.C, column_scale);
#pragma unroll
  for (int i = 0; i < size; ++i) {
    column_scale[i] = T(1) / std::sqrt(tile.column + i < tiles.C ? column_scale[i] : T(1));  // grad is 0 beyond C
  }
  double sums[2] = {0, 0};
  for (int64_t group = tile.row; group < tile.end; group += kGroup) {
    if (thread < kGroup && group + thread < tile.end) {
      const T variance = load(row_var_NR + first_row + group + thread);
      store(&shared.row_scale[thread], T(1) / std::sqrt(variance));
      if (tile.column_tile == 0) sums[0] += variance;
    }
    __syncthreads();
    for (int r = 0; r < kGroup; r += kBatch) {
      Vector<T> grad[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t row = group + r + b;
        if (active && row < tile.end) {
          grad[b] = load_piece<whole>(grad_NRC + (first_row + row) * tiles.C, tile.column, tiles.C);
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (!active || group + r + b >= tile.end) continue;
        const T row_scale = load(&shared.row_scale[r + b]);
#pragma unroll
        for (int i = 0; i < size; ++i) {
          const double scaled = grad[b][i] * row_scale * column_scale[i];
          sums[1] += scaled * scaled;
        }
      }
    }
    __syncthreads();
  }
  block_sums(sums, shared.sums);
  if (thread > 0) return;
  store(partial_B2 + 2 * int64_t{blockIdx.x}, sums[0]);
  store(partial_B2 + 2 * int64_t{blockIdx.x} + 1, sums[1]);
}

// A block adds a matrix's tiles.
__global__ void __launch_bounds__(kThreads)
    finish_stats_kernel(const double* partial_B2, int64_t tiles_per_matrix, const bool* skip, double* row_totals_N,
                        double* scaled_squares_N) {
  auto& shared = shared_storage<PairShared>();
  const int64_t matrix = blockIdx.x;
  double total = 1, scaled = 0;
  if (!is_set(skip)) {
    const double* const parts = partial_B2 + 2 * matrix * tiles_per_matrix;
    total = sum_of_partials(parts, tiles_per_matrix, 2, shared.sums);
    scaled = sum_of_partials(parts + 1, tiles_per_matrix, 2, shared.sums);
  }
  if (threadIdx.x > 0) return;
  store(row_totals_N + matrix, total);
  store(scaled_squares_N + matrix, scaled);
}

struct VarianceShared {
  double decay;
  double sums[kMaxWarps];
};

template <bool aligned, class T>
__global__ void __launch_bounds__(kThreads)
    variance_kernel(const T* grad, int64_t count, AdafactorDecay decay, T* variance, double* partial_B) {
  constexpr int size = Vector<T>::size;
  if (is_set(decay.skip)) return;
  auto& shared = shared_storage<VarianceShared>();
  if (threadIdx.x == 0) store(&shared.decay, decay_of(decay));
  __syncthreads();
  const T rho = static_cast<T>(load(&shared.decay)), eps = static_cast<T>(decay.eps);
  double sum = 0;
  const int64_t stride = int64_t{gridDim.x} * kThreads * size;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * size; i < count; i += stride) {
    const Vector<T> g = load_part<aligned>(grad, i, count);
    Vector<T> v = load_part<aligned>(static_cast<const T*>(variance), i, count);
#pragma unroll
    for (int j = 0; j < size; ++j) {
      v[j] = rho * v[j] + (T(1) - rho) * (g[j] * g[j] + eps);
      if (i + j < count) sum += static_cast<double>(g[j]) * g[j] / v[j];
    }
    store_part<aligned>(variance, i, count, v);
  }
  sum = block_sum(sum, shared.sums);
  if (threadIdx.x == 0) store(partial_B + blockIdx.x, sum);
}

__global__ void __launch_bounds__(kFinishThreads)
    finish_variance_kernel(const double* partial_B, int64_t blocks, const bool* skip, double* row_totals,
                           double* scaled_squares) {
  auto& shared = shared_storage<PairShared>();
  const double sum = is_set(skip) ? 0. : sum_of_partials(partial_B, blocks, 1, shared.sums);
  if (threadIdx.x > 0) return;
  store(row_totals, 1.);
  store(scaled_squares, sum);
}

// adafactor_apply_.

template <class T>
struct ApplyShared {
  T row_scale[kGroup];
  double factor;
};

template <bool whole, class T>
__global__ void __launch_bounds__(kThreads)
    apply_matrix_kernel(T* weight_NRC, const T* grad_NRC, Tiles tiles, const T* row_var_NR, const T* col_var_NC,
                        AdafactorUpdate update) {
  constexpr int size = Vector<T>::size;
  if (is_set(update.skip)) return;
  auto& shared = shared_storage<ApplyShared<T>>();
  const Tile tile = this_tile<T>(tiles);
  const int thread = static_cast<int>(threadIdx.x);
  const bool active = tile.column < tiles.C;
  const int64_t first_row = tile.matrix * tiles.R;
  if (thread == 0) store(&shared.factor, factor_of(update) * std::sqrt(load(update.row_means + tile.matrix)));
  __syncthreads();
  const double factor = load(&shared.factor);
  T column_scale[size] = {};
  if (active) load_values<whole>(col_var_NC + tile.matrix * tiles.C, tile.column, tiles.C, column_scale);
#pragma unroll
  for (int i = 0; i < size; ++i) column_scale[i] = T(1) / std::sqrt(column_scale[i]);
  for (int64_t group = tile.row; group < tile.end; group += kGroup) {
    if (thread < kGroup && group + thread < tile.end) {
      const T root = T(1) / std::sqrt(load(row_var_NR + first_row + group + thread));
      store(&shared.row_scale[thread], static_cast<T>(root * factor));
    }
    __syncthreads();
    for (int r = 0; r < kGroup; r += kBatch) {
      Vector<T> weight[kBatch], grad[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t row = group + r + b, at = (first_row + row) * tiles.C;
        if (!active || row >= tile.end) continue;
        weight[b] = load_piece<whole>(static_cast<const T*>(weight_NRC) + at, tile.column, tiles.C);
        grad[b] = load_piece<whole>(grad_NRC + at, tile.column, tiles.C);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t row = group + r + b;
        if (!active || row >= tile.end) continue;
        const T row_scale = load(&shared.row_scale[r + b]);
#pragma unroll
        for (int i = 0; i < size; ++i) weight[b][i] -= grad[b][i] * row_scale * column_scale[i];
        store_piece<whole>(weight_NRC + (first_row + row) * tiles.C, tile.column, tiles.C, weight[b]);
      }
    }
    __syncthreads();
  }
}

template <bool aligned, class T>
__global__ void __launch_bounds__(kThreads)
    apply_elements_kernel(T* weight, const T* grad, const T* variance, int64_t count, AdafactorUpdate update) {
  constexpr int size = Vector<T>::size;
  if (is_set(update.skip)) return;
  auto& shared = shared_storage<ScalarShared>();
  if (threadIdx.x == 0) store(&shared.value, factor_of(update));
  __syncthreads();
  const T factor = static_cast<T>(load(&shared.value));
  const int64_t stride = int64_t{gridDim.x} * kThreads * size;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * size; i < count; i += stride) {
    Vector<T> w = load_part<aligned>(static_cast<const T*>(weight), i, count);
    const Vector<T> g = load_part<aligned>(grad, i, count), v = load_part<aligned>(variance, i, count);
#pragma unroll
    for (int j = 0; j < size; ++j) w[j] -= factor * g[j] / std::sqrt(v[j]);
    store_part<aligned>(weight, i, count, w);
  }
}

// Launchers.

template <class F>
void dispatch_parameter(Type type, F&& f) {
  if (type == Type::f64) {
    f(double{});
  } else {
    f(float{});
  }
}

int64_t flat_blocks(int64_t count, int size) {
  return clamp(ceil_div(count, int64_t{kThreads} * size), 1, kFlatBlocks);
}

dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

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
  dispatch_parameter(type, [&](auto zero) {
    using T = decltype(zero);
    bytes = SumsPartial<T>::bytes(shape, Tiles::of<T>(shape));
  });
  return bytes;
}

void adafactor_sums(const void* grad, const void* weight, Type type, const MatrixShape& shape, void* partial,
                    void* row_sums, void* col_sums, double* weight_squares, cudaStream_t stream) {
  dispatch_parameter(type, [&](auto zero) {
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

int64_t adafactor_stats_partial_bytes(const MatrixShape& shape) {
  return 2 * Tiles::of<double>(shape).count(shape.N) * int64_t{sizeof(double)};  // float32 needs no more
}

void adafactor_stats(const void* grad, Type type, const MatrixShape& shape, const void* row_sums, const void* col_sums,
                     int64_t num_rows, int64_t num_cols, const AdafactorDecay& decay, void* row_var, void* col_var,
                     void* partial, double* row_totals, double* scaled_squares, cudaStream_t stream) {
  auto* const partial_B2 = static_cast<double*>(partial);
  dispatch_parameter(type, [&](auto zero) {
    using T = decltype(zero);
    const Tiles tiles = Tiles::of<T>(shape);
    const int64_t rows = shape.N * shape.R, columns = shape.N * shape.C;
    launch(&means_kernel<T>, grid_of(ceil_div(rows + columns, kThreads)), dim3(kThreads), sizeof(ScalarShared), stream,
           static_cast<const T*>(row_sums), static_cast<const T*>(col_sums), rows, columns,
           static_cast<double>(num_cols), static_cast<double>(num_rows), decay, static_cast<T*>(row_var),
           static_cast<T*>(col_var));
    dispatch_bool(rows_are_vectors<T>(shape.C, grad, col_var), [&](auto whole) {
      launch(&scaled_squares_kernel<decltype(whole)::value, T>, grid_of(tiles.count(shape.N)), dim3(tiles.threads),
             sizeof(ScaledShared<T>), stream, static_cast<const T*>(grad), tiles, static_cast<const T*>(row_var),
             static_cast<const T*>(col_var), decay.skip, partial_B2);
    });
    launch(&finish_stats_kernel, grid_of(shape.N), dim3(kThreads), sizeof(PairShared), stream, partial_B2,
           tiles.row_tiles * tiles.column_tiles, decay.skip, row_totals, scaled_squares);
  });
}

int64_t adafactor_variance_partial_bytes(int64_t) { return kFlatBlocks * int64_t{sizeof(double)}; }

void adafactor_variance(const void* grad, Type type, int64_t count, const AdafactorDecay& decay, void* variance,
                        void* partial, double* row_totals, double* scaled_squares, cudaStream_t stream) {
  auto* const partial_B = static_cast<double*>(partial);
  dispatch_parameter(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t blocks = flat_blocks(count, Vector<T>::size);
    dispatch_bool(rows_are_vectors<T>(0, grad, variance), [&](auto aligned) {
      launch(&variance_kernel<decltype(aligned)::value, T>, grid_of(blocks), dim3(kThreads), sizeof(VarianceShared),
             stream, static_cast<const T*>(grad), count, decay, static_cast<T*>(variance), partial_B);
    });
    launch(&finish_variance_kernel, dim3(1), dim3(kFinishThreads), sizeof(PairShared), stream, partial_B, blocks,
           decay.skip, row_totals, scaled_squares);
  });
}

void adafactor_apply_matrix(void* weight, const void* grad, Type type, const MatrixShape& shape, const void* row_var,
                            const void* col_var, const AdafactorUpdate& update, cudaStream_t stream) {
  dispatch_parameter(type, [&](auto zero) {
    using T = decltype(zero);
    const Tiles tiles = Tiles::of<T>(shape);
    dispatch_bool(rows_are_vectors<T>(shape.C, weight, grad, col_var), [&](auto whole) {
      launch(&apply_matrix_kernel<decltype(whole)::value, T>, grid_of(tiles.count(shape.N)), dim3(tiles.threads),
             sizeof(ApplyShared<T>), stream, static_cast<T*>(weight), static_cast<const T*>(grad), tiles,
             static_cast<const T*>(row_var), static_cast<const T*>(col_var), update);
    });
  });
}

void adafactor_apply_elements(void* weight, const void* grad, const void* variance, Type type, int64_t count,
                              const AdafactorUpdate& update, cudaStream_t stream) {
  dispatch_parameter(type, [&](auto zero) {
    using T = decltype(zero);
    dispatch_bool(rows_are_vectors<T>(0, weight, grad, variance), [&](auto aligned) {
      launch(&apply_elements_kernel<decltype(aligned)::value, T>, grid_of(flat_blocks(count, Vector<T>::size)),
             dim3(kThreads), sizeof(ScalarShared), stream, static_cast<T*>(weight), static_cast<const T*>(grad),
             static_cast<const T*>(variance), count, update);
    });
  });
}

}  // namespace glam::cuda
