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

struct DecayShared {
  double decay;
  double sums[2 * kMaxWarps];
};

// The decay, computed by one thread.
__device__ __forceinline__ double shared_decay(const AdafactorDecay& decay, DecayShared& shared) {
  if (threadIdx.x == 0) store(&shared.decay, decay_of(decay));
  __syncthreads();
  return load(&shared.decay);
}

template <class T>
struct MeansItem {
  const T *row_sums, *col_sums;
  T *row_var, *col_var;
  int64_t rows, columns;
  double row_of, column_of;
};

// state <- decay state + (1 - decay) (sums / of + eps) for rows, then columns.
template <class T>
__global__ void __launch_bounds__(kThreads)
    means_kernel(const __grid_constant__ Batch<MeansItem<T>> batch, AdafactorDecay decay) {
  if (is_set(decay.skip)) return;
  const double rho = shared_decay(decay, shared_storage<DecayShared>());
  const Place place = this_place(batch);
  const MeansItem<T>& item = batch.items[place.item];
  const int64_t i = int64_t{place.block} * kThreads + threadIdx.x;
  if (i >= item.rows + item.columns) return;
  const bool is_row = i < item.rows;
  const int64_t at = is_row ? i : i - item.rows;
  T* const state = (is_row ? item.row_var : item.col_var) + at;
  const double sum = load((is_row ? item.row_sums : item.col_sums) + at);
  const double of = is_row ? item.row_of : item.column_of;
  store(state, static_cast<T>(rho * load(state) + (1 - rho) * (sum / of + decay.eps)));
}

// col_var is null if the parameter is not factored; row_var is then the variance.
template <class T>
struct SquaresItem {
  const T* grad;
  T* row_var;
  const T* col_var;
  double* partial_B2;
  int64_t count;
  int R, C;
};

// Of a warp's tile: the sum of row_var over its rows, in the first of a strip, and that of the scaled squares.
template <bool whole, class T>
__device__ __forceinline__ void scaled_squares_of_tile(const SquaresItem<T>& item, unsigned block, double (&sums)[2]) {
  constexpr int size = Vector<T>::size;
  const int C = item.C, lane = static_cast<int>(threadIdx.x) % kWarp;
  const Tile tile = this_tile<T>(Tiles::of<T>(item.R, C), item.R, block);
  const bool active = tile.column < C;
  const T* const grad_RC = item.grad + tile.row * C;
  T column_scale[size] = {};
  if (active) load_values<whole>(item.col_var + int64_t{tile.matrix} * C, tile.column, C, column_scale);
#pragma unroll
  for (int i = 0; i < size; ++i) {
    column_scale[i] = T(1) / std::sqrt(tile.column + i < C ? column_scale[i] : T(1));  // grad is 0 beyond C
  }
  T scale_of_lane = 0;
  for (int first = 0; first < tile.rows; first += kBatch) {
    if (first % kWarp == 0 && first + lane < tile.rows) {
      const T variance = load(item.row_var + tile.row + first + lane);
      scale_of_lane = T(1) / std::sqrt(variance);
      if (tile.column_tile == 0) sums[0] += variance;
    }
    Vector<T> grad[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (!active || first + b >= tile.rows) continue;
      grad[b] = load_piece<whole>(grad_RC + int64_t{first + b} * C, tile.column, C);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const T row_scale = __shfl_sync(kAllLanes, scale_of_lane, (first + b) % kWarp);
      if (!active || first + b >= tile.rows) continue;
#pragma unroll
      for (int i = 0; i < size; ++i) {
        const double scaled = grad[b][i] * row_scale * column_scale[i];
        sums[1] += scaled * scaled;
      }
    }
  }
}

// Moves the variance of this thread's elements; returns the sum of their scaled squares.
template <bool aligned, class T>
__device__ __forceinline__ double update_variance(const SquaresItem<T>& item, const Place& place, T rho, T eps) {
  constexpr int size = Vector<T>::size;
  double sum = 0;
  for (int64_t i = first_element<T>(place); i < item.count; i += element_stride<T>(place)) {
    const Vector<T> g = load_part<aligned>(item.grad, i, item.count);
    Vector<T> v = load_part<aligned>(static_cast<const T*>(item.row_var), i, item.count);
#pragma unroll
    for (int j = 0; j < size; ++j) {
      v[j] = rho * v[j] + (T(1) - rho) * (g[j] * g[j] + eps);
      if (i + j < item.count) sum += static_cast<double>(g[j]) * g[j] / v[j];
    }
    store_part<aligned>(item.row_var, i, item.count, v);
  }
  return sum;
}

template <bool whole, class T>
__global__ void __launch_bounds__(kThreads)
    scaled_squares_kernel(const __grid_constant__ Batch<SquaresItem<T>> batch, AdafactorDecay decay) {
  if (is_set(decay.skip)) return;
  auto& shared = shared_storage<DecayShared>();
  const Place place = this_place(batch);
  const SquaresItem<T>& item = batch.items[place.item];
  double sums[2] = {0, 0};
  if (item.col_var != nullptr) {
    scaled_squares_of_tile<whole>(item, place.block, sums);
  } else {
    const T rho = static_cast<T>(shared_decay(decay, shared));
    sums[1] = update_variance<whole>(item, place, rho, static_cast<T>(decay.eps));
  }
  block_sums(sums, shared.sums);
  if (threadIdx.x > 0) return;
  store(item.partial_B2 + 2 * place.block, sums[0]);
  store(item.partial_B2 + 2 * place.block + 1, sums[1]);
}

struct FinishStatsItem {
  const double* partial_B2;
  double num_rows;  // 0 if there is no row_var to average: the mean is then 1
  int64_t first_matrix;
  int blocks;  // of a matrix
};

// A block adds what a matrix's blocks left.
__global__ void __launch_bounds__(kThreads)
    finish_stats_kernel(const __grid_constant__ Batch<FinishStatsItem> batch, const bool* skip, double* row_means,
                        double* scaled_squares) {
  auto& shared = shared_storage<PairShared>();
  const Place place = this_place(batch);
  const FinishStatsItem& item = batch.items[place.item];
  double mean = 1, scaled = 0;
  if (!is_set(skip)) {
    const double* const parts = item.partial_B2 + 2 * int64_t{place.block} * item.blocks;
    const double total = sum_of_partials(parts, item.blocks, 2, shared.sums);
    if (item.num_rows > 0) mean = total / item.num_rows;
    scaled = sum_of_partials(parts + 1, item.blocks, 2, shared.sums);
  }
  if (threadIdx.x > 0) return;
  store(row_means + item.first_matrix + place.block, mean);
  store(scaled_squares + item.first_matrix + place.block, scaled);
}

struct UpdateItem {
  const double *row_means_N, *scaled_squares_N;
  int64_t N;
  double* update_squares;
};

__global__ void __launch_bounds__(kThreads) update_squares_kernel(const __grid_constant__ Batch<UpdateItem> batch) {
  auto& shared = shared_storage<PairShared>();
  const UpdateItem& item = batch.items[this_place(batch).item];
  double sum = 0;
  for (int64_t n = threadIdx.x; n < item.N; n += kThreads) {
    sum += load(item.row_means_N + n) * load(item.scaled_squares_N + n);
  }
  sum = block_sum(sum, shared.sums);
  if (threadIdx.x == 0) store(item.update_squares, sum);
}

// A parameter's part of the workspace.
template <class T>
struct StatsPartial {
  int64_t blocks;
  double* B2;

  static StatsPartial take(const AdafactorParameter& parameter, Workspace& workspace) {
    const int64_t blocks = blocks_of<T>(parameter);
    return {blocks, workspace.take<double>(2 * blocks)};
  }
};

}  // namespace

int64_t adafactor_stats_partial_bytes(AdafactorParameters parameters, Type type) {
  Workspace workspace;
  dispatch_sum(type, [&](auto zero) {
    for (const auto& parameter : parameters) StatsPartial<decltype(zero)>::take(parameter, workspace);
  });
  return workspace.bytes();
}

void adafactor_stats(AdafactorParameters parameters, Type type, const void* row_sums, const void* col_sums,
                     const AdafactorDecay& decay, void* partial, double* row_means, double* scaled_squares,
                     cudaStream_t stream) {
  dispatch_sum(type, [&](auto zero) {
    using T = decltype(zero);
    Batches<MeansItem<T>> means;
    Batches<SquaresItem<T>> squares[2];  // rows that are no vectors, rows that are
    Batches<FinishStatsItem> finish;
    Workspace workspace(partial);
    for (const AdafactorParameter& parameter : parameters) {
      const auto part = StatsPartial<T>::take(parameter, workspace);
      const bool factored = has_matrices(parameter);
      const int64_t N = parameter.N, rows = N * parameter.R, columns = N * parameter.C;
      const SquaresItem<T> item{.grad = static_cast<const T*>(parameter.grad),
                                .row_var = static_cast<T*>(parameter.row_var),
                                .col_var = factored ? static_cast<const T*>(parameter.col_var) : nullptr,
                                .partial_B2 = part.B2,
                                .count = parameter.numel(),
                                .R = factored ? static_cast<int>(parameter.R) : 0,
                                .C = factored ? static_cast<int>(parameter.C) : 0};
      const bool whole = factored ? rows_are_vectors<T>(item.C, item.grad, item.col_var)
                                  : rows_are_vectors<T>(0, item.grad, item.row_var);
      squares[whole].add(item, part.blocks);
      const FinishStatsItem sums{.partial_B2 = part.B2,
                                 .num_rows = factored ? static_cast<double>(parameter.num_rows) : 0.,
                                 .first_matrix = parameter.matrices,
                                 .blocks = static_cast<int>(factored ? part.blocks / N : part.blocks)};
      finish.add(sums, N);
      if (!factored) continue;
      const MeansItem<T> mean{.row_sums = static_cast<const T*>(row_sums) + parameter.rows,
                              .col_sums = static_cast<const T*>(col_sums) + parameter.columns,
                              .row_var = item.row_var,
                              .col_var = static_cast<T*>(parameter.col_var),
                              .rows = rows,
                              .columns = columns,
                              .row_of = static_cast<double>(parameter.num_cols),
                              .column_of = static_cast<double>(parameter.num_rows)};
      means.add(mean, ceil_div(rows + columns, kThreads));
    }
    means.for_each([&](const auto& batch, dim3 grid) {
      launch(&means_kernel<T>, grid, dim3(kThreads), sizeof(DecayShared), stream, batch, decay);
    });
    for_each_bool([&](auto whole) {
      squares[whole].for_each([&](const auto& batch, dim3 grid) {
        launch(&scaled_squares_kernel<decltype(whole)::value, T>, grid, dim3(kThreads), sizeof(DecayShared), stream,
               batch, decay);
      });
    });
    finish.for_each([&](const auto& batch, dim3 grid) {
      launch(&finish_stats_kernel, grid, dim3(kThreads), sizeof(PairShared), stream, batch, decay.skip, row_means,
             scaled_squares);
    });
  });
}

void adafactor_update_squares(const double* row_means, const double* scaled_squares,
                              std::span<const int64_t> num_matrices, double* update_squares, cudaStream_t stream) {
  Batches<UpdateItem> updates;
  for (const int64_t N : num_matrices) {
    updates.add({row_means, scaled_squares, N, update_squares++}, 1);
    row_means += N;
    scaled_squares += N;
  }
  updates.for_each([&](const auto& batch, dim3 grid) {
    launch(&update_squares_kernel, grid, dim3(kThreads), sizeof(PairShared), stream, batch);
  });
}

}  // namespace glam::cuda
