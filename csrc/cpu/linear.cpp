// CPU kernels of glam::linear: one product forward, one for the weight gradient.

#include "cpu/gemm.h"
#include "ops/checks.h"
#include "ops/large_memory.h"
#include "ops/packed_weight.h"

namespace glam::cpu {
namespace {

Tensor as_matrix(const Tensor& x) { return with_unit_stride(x.reshape({-1, x.size(-1)})); }

template <bool wide>
Tensor linear(const Tensor& x, const Tensor& weight_) {
  checks::linear(x, weight_);
  const bool is_packed = packed::is_packed(weight_, 2);
  const Tensor weight = is_packed ? weight_ : with_unit_stride(weight_);
  auto sizes = x.sizes().vec();
  sizes.back() = packed::columns(weight, 2).expect_int();
  const auto dtype = wide ? accumulation_dtype(x.scalar_type()) : x.scalar_type();
  const Tensor y = empty_large(sizes, x.options().dtype(dtype));
  if (y.numel() == 0) return y;
  const Tensor x_MK = x.size(-1) == 0 ? x.new_zeros({y.numel() / y.size(-1), 0}) : as_matrix(x);
  const Tensor y_MN = y.view({-1, y.size(-1)});
  dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    run_products<decltype(zero)>({{.a = outer_rows(x_MK),
                                   .b = outer_columns(weight),
                                   .c = output_to(y_MN),
                                   .m = y_MN.size(0),
                                   .n = y_MN.size(1),
                                   .k = x_MK.size(1)}},
                                 precision_of(x.scalar_type()));
  });
  return y;
}

// grad_weight[k, n] = sum over rows m of x[m, k] grad[m, n]
Tensor weight_gradient(const Tensor& x, const Tensor& grad, at::ScalarType dtype) {
  const Tensor grad_weight = empty_large({x.size(-1), grad.size(-1)}, x.options().dtype(dtype));
  if (grad_weight.numel() == 0) return grad_weight;
  if (x.numel() == 0) return grad_weight.zero_();
  const Tensor x_MK = as_matrix(x), grad_MN = as_matrix(grad);
  dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    run_products<decltype(zero)>({{.a = outer_rows(x_MK.t()),
                                   .b = outer_columns(grad_MN),
                                   .c = output_to_part(grad_weight, grad_weight),
                                   .m = x_MK.size(1),
                                   .n = grad_MN.size(1),
                                   .k = x_MK.size(0)}},
                                 precision_of(grad.scalar_type()));
  });
  return grad_weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("linear", linear<false>);
  m.impl("linear_wide", linear<true>);
  m.impl("_linear_weight_gradient", weight_gradient);
}

}  // namespace glam::cpu
