// The step itself: weight <- weight - factor grad / sqrt(variance).

#include <cmath>

#include "cuda/kernels/adafactor.cuh"

namespace glam::cuda {
namespace {

using namespace adafactor;

// As std::max: the first where either is NaN.
__device__ __forceinline__ double larger(double a, double b) { return a < b ? b : a; }

// What the update of an element is multiplied by, but for the mean of its matrix's row statistics.
__device__ __forceinline__ double factor_of(const AdafactorUpdate& update) {
  const auto elements = static_cast<double>(update.num_elements);
  const double weight_rms = std::sqrt(load(update.weight_squares) / elements);
  const double update_rms = std::sqrt(load(update.update_squares) / elements);
  return load(update.lr) * larger(weight_rms, update.min_scale) / larger(1., update_rms / update.clipping);
}

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

}  // namespace

void adafactor_apply_matrix(void* weight, const void* grad, Type type, const MatrixShape& shape, const void* row_var,
                            const void* col_var, const AdafactorUpdate& update, cudaStream_t stream) {
  dispatch_sum(type, [&](auto zero) {
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
  dispatch_sum(type, [&](auto zero) {
    using T = decltype(zero);
    dispatch_bool(rows_are_vectors<T>(0, weight, grad, variance), [&](auto aligned) {
      launch(&apply_elements_kernel<decltype(aligned)::value, T>, grid_of(flat_blocks(count, Vector<T>::size)),
             dim3(kThreads), sizeof(ScalarShared), stream, static_cast<T*>(weight), static_cast<const T*>(grad),
             static_cast<const T*>(variance), count, update);
    });
  });
}

}  // namespace glam::cuda
