// CPU kernels of glam::rms_norm: rows in parallel; the scale's gradient as partial sums of fixed blocks of rows, added in
// the blocks' order, whatever the threads.

#include "cpu/kernels/norm.h"
#include "ops/large_memory.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/scratch.h"
#include "ops/checks.h"

namespace glam::cpu {
namespace {

constexpr int64_t kRowsPerBlock = 64;
constexpr int64_t kElementsPerTask = 16384;

// The scale in the accumulation type, contiguous.
Tensor accumulation_copy(const Tensor& scale, at::ScalarType x_dtype) {
  return scale.to(accumulation_dtype(x_dtype)).contiguous();
}

Tensor forward(const Tensor& x_, const Tensor& scale_, double eps) {
  checks::rms_norm(x_, scale_);
  const Tensor x = x_.contiguous();
  const Tensor y = empty_large(x.sizes(), x.options());
  if (x.numel() == 0) return y;
  const int64_t D = x.size(-1), rows = x.numel() / D;
  const Type type = type_of(x);
  const Tensor scale = accumulation_copy(scale_, x.scalar_type());
  dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& functions = norm_functions<T>();
    const T* const scale_D = scale.const_data_ptr<T>();
    const void* const x_data = x.const_data_ptr();
    void* const y_data = y.mutable_data_ptr();
    at::parallel_for(0, rows, std::max<int64_t>(kElementsPerTask / D, 1), [&](int64_t begin, int64_t end) {
      static thread_local Scratch scratch;
      functions.forward(advance(x_data, type, begin * D), type, scale_D, static_cast<T>(eps), end - begin, D,
                        advance(y_data, type, begin * D), scratch.get<T>(D));
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_, const Tensor& x_, const Tensor& scale_, double eps) {
  const Tensor grad = grad_.contiguous(), x = x_.contiguous();
  const Tensor grad_x = empty_large(x.sizes(), x.options());
  const Tensor scale = accumulation_copy(scale_, x.scalar_type());
  Tensor grad_scale = at::empty(scale.sizes(), scale.options());
  if (x.numel() == 0) return {grad_x, grad_scale.zero_().to(scale_.scalar_type())};
  const int64_t D = x.size(-1), rows = x.numel() / D;
  const int64_t num_blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  const Type type = type_of(x);
  dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& functions = norm_functions<T>();
    const T* const scale_D = scale.const_data_ptr<T>();
    const void *const x_data = x.const_data_ptr(), *const grad_data = grad.const_data_ptr();
    void* const grad_x_data = grad_x.mutable_data_ptr();
    std::vector<T> partial(static_cast<size_t>(num_blocks * D));
    at::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
      static thread_local Scratch scratch;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block * kRowsPerBlock, count = std::min(kRowsPerBlock, rows - row);
        functions.backward(advance(grad_data, type, row * D), advance(x_data, type, row * D), type, scale_D,
                           static_cast<T>(eps), count, D, advance(grad_x_data, type, row * D),
                           partial.data() + block * D, scratch.get<T>(2 * D));
      }
    });
    T* const sum = grad_scale.mutable_data_ptr<T>();
    std::copy_n(partial.data(), D, sum);
    for (int64_t block = 1; block < num_blocks; ++block) {
      for (int64_t d = 0; d < D; ++d) sum[d] += partial[block * D + d];
    }
  });
  return {grad_x, grad_scale.to(scale_.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("rms_norm", forward);
  m.impl("_rms_norm_backward", backward);
}

}  // namespace glam::cpu
