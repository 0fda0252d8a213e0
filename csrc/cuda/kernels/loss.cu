// A block of threads per row of logits, which is read once for the statistics (each thread keeps a running maximum and
// the sum of exponentials below it) and once for the gradient. Every sum has a fixed order, which the number of columns
// alone decides.

#include "cuda/kernels/loss.h"

#include <cmath>

#include "cuda/kernels/softmax.cuh"

namespace glam::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kTokenThreads = 256;  // of the sum over tokens, one each

// What makes a product a logit.
template <class S>
struct Logit {
  S scale, cap;

  template <bool capped>
  __device__ __forceinline__ S of(S product) const {
    if constexpr (capped) return cap * std::tanh(scale * product / cap);
    return scale * product;
  }
};

template <class S>
struct RowShared {
  S maxima[kMaxWarps];
  S sums[2 * kMaxWarps];
};

// exp(x - largest), where a largest of -infinity means that there is nothing.
template <class S>
__device__ __forceinline__ S exp_below(S x, S largest) {
  return x == -kInfinity<S> ? S(0) : std::exp(x - largest);
}

template <bool capped, class S>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const S* products, int64_t stride, int64_t columns, Logit<S> logit, const int64_t* targets,
                      int64_t first_column, int64_t vocabulary, bool first, S* lse_T, S* target_T, S* sum_T) {
  constexpr int size = Vector<S>::size;
  auto& shared = shared_storage<RowShared<S>>();
  const int64_t row = blockIdx.x;
  const S* const row_products = products + row * stride;
  const int64_t pieces = ceil_div(columns, size);
  S largest = -kInfinity<S>;
  S sums[2] = {0, 0};  // of the exponentials, and of the logits
#pragma unroll 2
  for (int64_t piece = threadIdx.x; piece < pieces; piece += kThreads) {
    const Vector<S> values = load_vector(row_products + piece * size);
    S logits[size], top = -kInfinity<S>;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const bool inside = piece * size + i < columns;
      logits[i] = inside ? logit.template of<capped>(values[i]) : -kInfinity<S>;
      sums[1] += inside ? logits[i] : S(0);
      top = logits[i] > top ? logits[i] : top;
    }
    if (top > largest) {
      sums[0] *= exp_below(largest, top);
      largest = top;
    }
#pragma unroll
    for (int i = 0; i < size; ++i) sums[0] += exp_below(logits[i], largest);
  }
  const S top = block_max(largest, shared.maxima);
  sums[0] *= largest == top ? S(1) : exp_below(largest, top);
  block_sums(sums, shared.sums);
  if (threadIdx.x > 0) return;
  S lse = top + std::log(sums[0]), sum = sums[1];
  const int64_t target = load(targets + row), column = target - first_column;
  S target_logit = first ? S(0) : load(target_T + row);
  if (target < 0 || target >= vocabulary) {
    target_logit = kNaN<S>;
  } else if (column >= 0 && column < columns) {
    target_logit = logit.template of<capped>(load(row_products + column));
  }
  if (!first) {
    const S before = load(lse_T + row), high = before > lse ? before : lse;
    lse = high + std::log(exp_below(before, high) + exp_below(lse, high));
    sum += load(sum_T + row);
  }
  store(lse_T + row, lse);
  store(target_T + row, target_logit);
  store(sum_T + row, sum);
}

template <bool capped, class T>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const Sum<T>* products, int64_t stride, int64_t columns, Logit<Sum<T>> logit,
                    const int64_t* targets, int64_t first_column, const Sum<T>* lse_T, const Sum<T>* weight_T,
                    double z_loss, double label_smoothing, int64_t vocabulary, T* gradient) {
  using S = Sum<T>;
  constexpr int size = Vector<S>::size;  // so that a warp reads and writes whole sectors
  const int64_t row = blockIdx.x;
  const S* const row_products = products + row * stride;
  T* const row_gradient = gradient + row * stride;
  const int64_t pieces = ceil_div(columns, size);
  const S weight = weight_T == nullptr ? S(1) : load(weight_T + row);
  if (weight == S(0)) {
    Vector<T, size> zeros;
#pragma unroll
    for (int i = 0; i < size; ++i) zeros[i] = narrow<T>(0.f);
    for (int64_t piece = threadIdx.x; piece < pieces; piece += kThreads)
      store_vector(row_gradient + piece * size, zeros);
    return;
  }
  const S lse = load(lse_T + row);
  const int64_t target_of_all = load(targets + row), target = target_of_all - first_column;
  const S valid = target_of_all >= 0 && target_of_all < vocabulary ? S(1) : kNaN<S>;
  const S softmax = valid * weight * logit.scale * static_cast<S>(1 + 2 * z_loss * lse);
  const S uniform = weight * logit.scale * static_cast<S>(label_smoothing / static_cast<double>(vocabulary));
  const S of_target = weight * logit.scale * static_cast<S>(1 - label_smoothing);
#pragma unroll 4
  for (int64_t piece = threadIdx.x; piece < pieces; piece += kThreads) {
    S values[size];
    load_values<true>(row_products, piece * size, columns, values);
    Vector<T, size> gradients;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const S value = logit.template of<capped>(values[i]);
      S result = softmax * std::exp(value - lse) - uniform;
      if (piece * size + i == target) result -= of_target;
      if constexpr (capped) result *= S(1) - value / logit.cap * (value / logit.cap);
      gradients[i] = narrow<T>(result);
    }
    store_vector(row_gradient + piece * size, gradients);
  }
}

template <class S>
__global__ void __launch_bounds__(kTokenThreads)
    token_loss_kernel(const S* lse_T, const S* target_T, const S* sum_T, const S* weight_T, double z_loss,
                      double label_smoothing, int64_t vocabulary, int64_t T, S* nll_T, double* partial) {
  auto& shared = shared_storage<RowShared<double>>();
  const int64_t token = int64_t{blockIdx.x} * kTokenThreads + threadIdx.x;
  double loss = 0;
  if (token < T) {
    const S lse = load(lse_T + token), target = load(target_T + token);
    const S weight = weight_T == nullptr ? S(1) : load(weight_T + token);
    store(nll_T + token, lse - target);
    if (weight != S(0)) {  // padding: not even a NaN enters the sum
      const double wide_lse = lse;
      loss = (1 - label_smoothing) * (wide_lse - target) + z_loss * wide_lse * wide_lse;
      if (label_smoothing > 0)
        loss += label_smoothing * (wide_lse - load(sum_T + token) / static_cast<double>(vocabulary));
      loss *= weight;
    }
  }
  loss = block_sum(loss, shared.sums);
  if (threadIdx.x == 0) store(partial + blockIdx.x, loss);
}

template <class S>
__global__ void __launch_bounds__(kTokenThreads) add_losses_kernel(const double* partial, int64_t count, S* loss_sum) {
  auto& shared = shared_storage<RowShared<double>>();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kTokenThreads) sum += load(partial + i);
  sum = block_sum(sum, shared.sums);
  if (threadIdx.x == 0) store(loss_sum, static_cast<S>(sum));
}

dim3 blocks(int64_t count) { return dim3(static_cast<unsigned>(count)); }

}  // namespace

void loss_statistics(const LogitBlock& block, bool first, void* lse, void* target_logit, void* logit_sum,
                     cudaStream_t stream) {
  dispatch_sum(block.type, [&](auto zero) {
    using S = decltype(zero);
    dispatch_bool(block.logit_cap > 0, [&](auto capped) {
      const Logit<S> logit{static_cast<S>(block.scale), static_cast<S>(block.logit_cap)};
      launch(&statistics_kernel<decltype(capped)::value, S>, blocks(block.rows), dim3(kThreads), sizeof(RowShared<S>),
             stream, static_cast<const S*>(block.products), block.stride, block.columns, logit, block.targets,
             block.first_column, block.vocabulary, first, static_cast<S*>(lse), static_cast<S*>(target_logit),
             static_cast<S*>(logit_sum));
    });
  });
}

void loss_gradient(const LogitBlock& block, const void* lse, const void* weights, double z_loss, double label_smoothing,
                   void* gradient, cudaStream_t stream) {
  dispatch_type(block.type, [&](auto zero) {
    using T = decltype(zero);
    using S = Sum<T>;
    dispatch_bool(block.logit_cap > 0, [&](auto capped) {
      const Logit<S> logit{static_cast<S>(block.scale), static_cast<S>(block.logit_cap)};
      launch(&gradient_kernel<decltype(capped)::value, T>, blocks(block.rows), dim3(kThreads), 0, stream,
             static_cast<const S*>(block.products), block.stride, block.columns, logit, block.targets,
             block.first_column, static_cast<const S*>(lse), static_cast<const S*>(weights), z_loss, label_smoothing,
             block.vocabulary, static_cast<T*>(gradient));
    });
  });
}

int64_t loss_sum_blocks(int64_t T) { return ceil_div(T, kTokenThreads); }

void loss_sum(const void* lse, const void* target_logit, const void* logit_sum, const void* weights, Type type,
              double z_loss, double label_smoothing, int64_t vocabulary, int64_t T, void* nll, double* partial,
              void* loss_sum, cudaStream_t stream) {
  dispatch_sum(type, [&](auto zero) {
    using S = decltype(zero);
    const int64_t count = loss_sum_blocks(T);
    launch(&token_loss_kernel<S>, blocks(count), dim3(kTokenThreads), sizeof(RowShared<double>), stream,
           static_cast<const S*>(lse), static_cast<const S*>(target_logit), static_cast<const S*>(logit_sum),
           static_cast<const S*>(weights), z_loss, label_smoothing, vocabulary, T, static_cast<S*>(nll), partial);
    launch(&add_losses_kernel<S>, dim3(1), dim3(kTokenThreads), sizeof(RowShared<double>), stream, partial, count,
           static_cast<S*>(loss_sum));
  });
}

}  // namespace glam::cuda
