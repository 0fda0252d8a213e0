// The step itself: weight <- weight - factor grad / sqrt(variance).

#include <cmath>

#include "cuda/kernels/adafactor.cuh"

namespace glam::cuda {
namespace {

using namespace adafactor;

// As std::max: the first where either is NaN.
__device__ __forceinline__ double larger(double a, double b) { return a < b ? b : a; }

// col_var is null if the parameter is not factored; row_var is then the variance.
template <class T>
struct ApplyItem {
  T* weight;
  const T *grad, *row_var, *col_var;
  int64_t count, num_elements, first_matrix;
  int R, C;
  int parameter;  // its place in the list
};

struct FactorShared {
  double factor;
};

// What the update of an element is multiplied by, but for the mean of its matrix's row statistics: computed by one thread.
template <class T>
__device__ __forceinline__ double factor_of(const ApplyItem<T>& item, const AdafactorUpdate& update) {
  auto& shared = shared_storage<FactorShared>();
  if (threadIdx.x == 0) {
    const auto elements = static_cast<double>(item.num_elements);
    const double weight_rms = std::sqrt(load(update.weight_squares + item.parameter) / elements);
    const double update_rms = std::sqrt(load(update.update_squares + item.parameter) / elements);
    store(&shared.factor,
          load(update.lr) * larger(weight_rms, update.min_scale) / larger(1., update_rms / update.clipping));
  }
  __syncthreads();
  return load(&shared.factor);
}

template <bool whole, class T>
__device__ __forceinline__ void apply_to_tile(const ApplyItem<T>& item, unsigned block, double factor,
                                              const double* row_means) {
  constexpr int size = Vector<T>::size;
  const int C = item.C, lane = static_cast<int>(threadIdx.x) % kWarp;
  const Tile tile = this_tile<T>(Tiles::of<T>(item.R, C), item.R, block);
  const bool active = tile.column < C;
  T* const weight_RC = item.weight + tile.row * C;
  const T* const grad_RC = item.grad + tile.row * C;
  factor *= std::sqrt(load(row_means + item.first_matrix + tile.matrix));
  T column_scale[size] = {};
  if (active) load_values<whole>(item.col_var + int64_t{tile.matrix} * C, tile.column, C, column_scale);
#pragma unroll
  for (int i = 0; i < size; ++i) column_scale[i] = T(1) / std::sqrt(column_scale[i]);
  T scale_of_lane = 0;
  for (int first = 0; first < tile.rows; first += kBatch) {
    if (first % kWarp == 0 && first + lane < tile.rows) {
      const T root = T(1) / std::sqrt(load(item.row_var + tile.row + first + lane));
      scale_of_lane = static_cast<T>(root * factor);
    }
    Vector<T> weight[kBatch], grad[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t at = int64_t{first + b} * C;
      if (!active || first + b >= tile.rows) continue;
      weight[b] = load_piece<whole>(static_cast<const T*>(weight_RC) + at, tile.column, C);
      grad[b] = load_piece<whole>(grad_RC + at, tile.column, C);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const T row_scale = __shfl_sync(kAllLanes, scale_of_lane, (first + b) % kWarp);
      if (!active || first + b >= tile.rows) continue;
#pragma unroll
      for (int i = 0; i < size; ++i) weight[b][i] -= grad[b][i] * row_scale * column_scale[i];
      store_piece<whole>(weight_RC + int64_t{first + b} * C, tile.column, C, weight[b]);
    }
  }
}

template <bool aligned, class T>
__device__ __forceinline__ void apply_to_elements(const ApplyItem<T>& item, const Place& place, T factor) {
  for (int64_t i = first_element<T>(place); i < item.count; i += element_stride<T>(place)) {
    Vector<T> w = load_part<aligned>(static_cast<const T*>(item.weight), i, item.count);
    const Vector<T> g = load_part<aligned>(item.grad, i, item.count);
    const Vector<T> v = load_part<aligned>(item.row_var, i, item.count);
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) w[j] -= factor * g[j] / std::sqrt(v[j]);
    store_part<aligned>(item.weight, i, item.count, w);
  }
}

template <bool whole, class T>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const __grid_constant__ Batch<ApplyItem<T>> batch, AdafactorUpdate update) {
  if (is_set(update.skip)) return;
  const Place place = this_place(batch);
  const ApplyItem<T>& item = batch.items[place.item];
  const double factor = factor_of(item, update);
  if (item.col_var != nullptr) {
    apply_to_tile<whole>(item, place.block, factor, update.row_means);
  } else {
    apply_to_elements<whole>(item, place, static_cast<T>(factor));
  }
}

}  // namespace

void adafactor_apply(AdafactorParameters parameters, Type type, const AdafactorUpdate& update, cudaStream_t stream) {
  dispatch_sum(type, [&](auto zero) {
    using T = decltype(zero);
    Batches<ApplyItem<T>> items[2];  // rows that are no vectors, rows that are
    for (const AdafactorParameter& parameter : parameters) {
      const bool factored = has_matrices(parameter);
      const ApplyItem<T> item{.weight = static_cast<T*>(parameter.weight),
                              .grad = static_cast<const T*>(parameter.grad),
                              .row_var = static_cast<const T*>(parameter.row_var),
                              .col_var = factored ? static_cast<const T*>(parameter.col_var) : nullptr,
                              .count = parameter.numel(),
                              .num_elements = parameter.num_elements,
                              .first_matrix = parameter.matrices,
                              .R = factored ? static_cast<int>(parameter.R) : 0,
                              .C = factored ? static_cast<int>(parameter.C) : 0,
                              .parameter = static_cast<int>(&parameter - parameters.data())};
      const bool whole = factored ? rows_are_vectors<T>(item.C, item.weight, item.grad, item.col_var)
                                  : rows_are_vectors<T>(0, item.weight, item.grad, item.row_var);
      items[whole].add(item, blocks_of<T>(parameter));
    }
    for_each_bool([&](auto whole) {
      items[whole].for_each([&](const auto& batch, dim3 grid) {
        launch(&apply_kernel<decltype(whole)::value, T>, grid, dim3(kThreads), sizeof(FactorShared), stream, batch,
               update);
      });
    });
  });
}

}  // namespace glam::cuda
