// The second moments' moving averages, of a matrix by rows and columns or of each element, and the squares of the
// gradient over them.

#include <cmath>

#include "cuda/kernels/adafactor.cuh"

namespace glam::cuda {
namespace {

using namespace adafactor;

__device__ __forceinline__ double decay_of(const AdafactorDecay& decay) {
  return 1 - std::pow(static_cast<double>(load(decay.step)) + 1, decay.decay);
}

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

}  // namespace

int64_t adafactor_stats_partial_bytes(const MatrixShape& shape) {
  return 2 * Tiles::of<double>(shape).count(shape.N) * int64_t{sizeof(double)};  // float32 needs no more
}

void adafactor_stats(const void* grad, Type type, const MatrixShape& shape, const void* row_sums, const void* col_sums,
                     int64_t num_rows, int64_t num_cols, const AdafactorDecay& decay, void* row_var, void* col_var,
                     void* partial, double* row_totals, double* scaled_squares, cudaStream_t stream) {
  auto* const partial_B2 = static_cast<double*>(partial);
  dispatch_sum(type, [&](auto zero) {
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
  dispatch_sum(type, [&](auto zero) {
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

}  // namespace glam::cuda
