// CPU kernels of glam::router_logits: tokens in parallel; the weight's gradient, which sums over them, by rows of the weight.

#include "cpu/kernels/router.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/scratch.h"
#include "ops/checks.h"
#include "ops/large_memory.h"

namespace glam::cpu {
namespace {

constexpr int64_t kProductsPerTask = 1 << 18;

// f(begin, end) over [0, count) in whole tiles, each index of which takes `work` products.
template <class F>
void parallel_tiles(int64_t count, int64_t tile, int64_t work, F&& f) {
  const int64_t tiles = (count + tile - 1) / tile;
  const int64_t grain = std::max<int64_t>(kProductsPerTask / std::max<int64_t>(tile * work, 1), 1);
  at::parallel_for(0, tiles, grain,
                   [&](int64_t first, int64_t last) { f(first * tile, std::min(last * tile, count)); });
}

// The panels of a matrix in memory of the calling thread.
template <class T>
const T* panels_of(const Tensor& matrix) {
  static thread_local Scratch scratch;
  const auto& functions = router_functions<T>();
  T* const panels = scratch.get<T>(functions.panel_elements(matrix.size(0), matrix.size(1)));
  functions.pack(outer_columns(matrix), matrix.size(0), matrix.size(1), panels);
  return panels;
}

std::vector<int64_t> with_last(const Tensor& x, int64_t size) {
  auto sizes = x.sizes().vec();
  sizes.back() = size;
  return sizes;
}

Tensor logits(const Tensor& x_, const Tensor& weight_) {
  checks::router_logits(x_, weight_);
  const Tensor x = x_.contiguous();
  const auto dtype = accumulation_dtype(x.scalar_type());
  const Tensor weight = with_unit_stride(weight_);
  const int64_t D = weight.size(0), E = weight.size(1);
  const Tensor y = empty_large(with_last(x, E), x.options().dtype(dtype));
  if (y.numel() == 0) return y;
  if (D == 0) return y.zero_();
  const Type type = type_of(x);
  dispatch_accumulation(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto& functions = router_functions<T>();
    const T* const panels = panels_of<T>(weight);
    const void* const x_data = x.const_data_ptr();
    T* const y_data = y.mutable_data_ptr<T>();
    parallel_tiles(y.numel() / E, functions.tile_tokens, D * E, [&](int64_t begin, int64_t end) {
      static thread_local Scratch scratch;
      functions.logits(advance(x_data, type, begin * D), type, end - begin, D, panels, E, y_data + begin * E,
                       scratch.get<T>(functions.panel_elements(functions.tile_tokens, E)));
    });
  });
  return y;
}

// grad weight^T, rounded to `dtype`.
Tensor input_gradient(const Tensor& grad_, const Tensor& weight, at::ScalarType dtype) {
  const Tensor grad = grad_.contiguous(), weight_ED = with_unit_stride(weight.t());
  const int64_t E = weight_ED.size(0), D = weight_ED.size(1);
  const Tensor grad_x = empty_large(with_last(grad, D), grad.options().dtype(dtype));
  if (grad_x.numel() == 0) return grad_x;
  if (E == 0) return grad_x.zero_();
  const Type type = type_of(grad_x);
  dispatch_accumulation(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& functions = router_functions<T>();
    const T *const panels = panels_of<T>(weight_ED), *const grad_data = grad.const_data_ptr<T>();
    void* const grad_x_data = grad_x.mutable_data_ptr();
    parallel_tiles(grad_x.numel() / D, functions.tile_tokens, D * E, [&](int64_t begin, int64_t end) {
      static thread_local Scratch scratch;
      functions.input_gradient(grad_data + begin * E, end - begin, E, panels, D, advance(grad_x_data, type, begin * D),
                               type, scratch.get<T>(functions.tile_tokens * E));
    });
  });
  return grad_x;
}

// grad_weight[d, e] = sum over tokens t, in order, of x[t, d] grad[t, e]
Tensor weight_gradient(const Tensor& x_, const Tensor& grad_, at::ScalarType dtype) {
  const Tensor x = x_.contiguous(), grad = grad_.contiguous();
  const int64_t D = x.size(-1), E = grad.size(-1);
  const Tensor grad_weight = empty_large({D, E}, grad.options());
  if (grad_weight.numel() == 0) return grad_weight.to(dtype);
  if (x.numel() == 0) return grad_weight.zero_().to(dtype);
  const Type type = type_of(x);
  dispatch_accumulation(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& functions = router_functions<T>();
    const int64_t tokens = x.numel() / D;
    const void* const x_data = x.const_data_ptr();
    const T* const grad_data = grad.const_data_ptr<T>();
    T* const out = grad_weight.mutable_data_ptr<T>();
    parallel_tiles(D, functions.tile_columns, tokens * E, [&](int64_t begin, int64_t end) {
      static thread_local Scratch scratch;
      functions.weight_gradient(x_data, type, tokens, D, grad_data, E, begin, end, out,
                                scratch.get<T>(functions.tile_columns * E));
    });
  });
  return grad_weight.to(dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("router_logits", logits);
  m.impl("_router_logits_input_gradient", input_gradient);
  m.impl("_router_logits_weight_gradient", weight_gradient);
}

}  // namespace glam::cpu
