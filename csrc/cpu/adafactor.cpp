// CPU kernels of the Adafactor ops and of squared_norm: blocks of fixed size in parallel, their sums added in order.

#include "cpu/kernels/adafactor.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/gemm.h"
#include "ops/checks.h"

namespace glam::cpu {
namespace {

constexpr int64_t kRowsPerBlock = 64;
constexpr int64_t kElementsPerBlock = 16384;

// f(begin, count, index) for blocks of `size` of [0, total), in parallel.
template <class F>
void for_each_block(int64_t total, int64_t size, F&& f) {
  at::parallel_for(0, (total + size - 1) / size, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      f(block * size, std::min(size, total - block * size), block);
    }
  });
}

// The sum over blocks of f(begin, count), added in the blocks' order.
template <class F>
double sum_of_blocks(int64_t total, F&& f) {
  std::vector<double> partial(static_cast<size_t>((total + kElementsPerBlock - 1) / kElementsPerBlock));
  for_each_block(total, kElementsPerBlock,
                 [&](int64_t begin, int64_t count, int64_t block) { partial[block] = f(begin, count); });
  double sum = 0;
  for (const double value : partial) sum += value;
  return sum;
}

// A parameter as N matrices [R, C]; blocks of rows never cross a matrix.
struct Matrices {
  explicit Matrices(const Tensor& x)
      : R(x.size(-2)), C(x.size(-1)), N(1), blocks_per_matrix((R + kRowsPerBlock - 1) / kRowsPerBlock) {
    for (int64_t i = 0; i + 2 < x.dim(); ++i) N *= x.size(i);
  }
  // f(matrix, first row within it, rows, block index)
  template <class F>
  void for_each_rows(F&& f) const {
    at::parallel_for(0, N * blocks_per_matrix, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block % blocks_per_matrix * kRowsPerBlock;
        f(block / blocks_per_matrix, row, std::min(kRowsPerBlock, R - row), block);
      }
    });
  }
  int64_t R, C, N, blocks_per_matrix;
};

bool is_set(const OptionalTensor& skip) { return skip && *skip->const_data_ptr<bool>(); }

// State and weights are written in place through a contiguous view, or copied back.
class InPlace {
 public:
  explicit InPlace(const Tensor& original) : original_(original), contiguous_(original.contiguous()) {}
  const Tensor& get() const { return contiguous_; }
  void finish() const {
    if (!contiguous_.is_same(original_)) original_.copy_(contiguous_);
  }

 private:
  Tensor original_, contiguous_;
};

template <class T>
SquareSum square_sum(const Tensor& x) {
  const Type type = type_of(x);
  const void* const data = x.const_data_ptr();
  std::vector<char> finite(static_cast<size_t>((x.numel() + kElementsPerBlock - 1) / kElementsPerBlock));
  const double sum = sum_of_blocks(x.numel(), [&](int64_t begin, int64_t count) {
    const SquareSum part = adafactor_functions<T>().square_sum(advance(data, type, begin), type, count);
    finite[begin / kElementsPerBlock] = part.finite;
    return part.sum;
  });
  return {sum, std::all_of(finite.begin(), finite.end(), [](char flag) { return flag != 0; })};
}

std::tuple<Tensor, Tensor> squared_norm(const Tensor& x_) {
  checks::squared_norm(x_);
  const Tensor x = x_.contiguous();
  const Tensor sum = at::empty({}, x.options().dtype(at::kDouble));
  const Tensor nonfinite = at::empty({}, x.options().dtype(at::kBool));
  dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    const SquareSum result = square_sum<decltype(zero)>(x);
    *sum.mutable_data_ptr<double>() = result.sum;
    *nonfinite.mutable_data_ptr<bool>() = !result.finite;
  });
  return {sum, nonfinite};
}

std::tuple<Tensor, Tensor, Tensor> sums(const Tensor& grad_, const Tensor& weight, bool factored) {
  checks::adafactor_sums(grad_, weight, factored);
  const Tensor grad = grad_.contiguous();
  const Tensor weight_squares = std::get<0>(squared_norm(weight));
  if (!factored) return {at::empty({0}, grad.options()), at::empty({0}, grad.options()), weight_squares};
  const Matrices shape(grad);
  const Tensor row_sums = at::empty(grad.sizes().slice(0, grad.dim() - 1), grad.options());
  auto column_sizes = row_sums.sizes().vec();
  column_sizes.back() = shape.C;
  const Tensor col_sums = at::empty(column_sizes, grad.options());
  dispatch_accumulation(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* const g = grad.const_data_ptr<T>();
    T *const rows = row_sums.mutable_data_ptr<T>(), *const columns = col_sums.mutable_data_ptr<T>();
    std::vector<T> partial(static_cast<size_t>(shape.N * shape.blocks_per_matrix * shape.C));
    shape.for_each_rows([&](int64_t matrix, int64_t row, int64_t count, int64_t block) {
      const int64_t first = matrix * shape.R + row;
      adafactor_functions<T>().matrix_sums(g + first * shape.C, count, shape.C, rows + first,
                                           partial.data() + block * shape.C);
    });
    for (int64_t i = 0; i < shape.N; ++i) {
      for (int64_t j = 0; j < shape.C; ++j) columns[i * shape.C + j] = 0;
      for (int64_t block = 0; block < shape.blocks_per_matrix; ++block) {
        const T* const part = partial.data() + (i * shape.blocks_per_matrix + block) * shape.C;
        for (int64_t j = 0; j < shape.C; ++j) columns[i * shape.C + j] += part[j];
      }
    }
  });
  return {row_sums, col_sums, weight_squares};
}

// state <- decay state + (1 - decay) (sums / count + eps)
template <class T>
void update_means(const Tensor& state, const Tensor& sums, int64_t count, double decay, double eps) {
  T* const values = state.mutable_data_ptr<T>();
  const T* const sum = sums.const_data_ptr<T>();
  for (int64_t i = 0; i < state.numel(); ++i) {
    values[i] = static_cast<T>(decay * values[i] + (1 - decay) * (static_cast<double>(sum[i]) / count + eps));
  }
}

template <class T>
std::vector<T> inverse_roots(const Tensor& x) {
  const T* const values = x.const_data_ptr<T>();
  std::vector<T> roots(static_cast<size_t>(x.numel()));
  for (size_t i = 0; i < roots.size(); ++i) roots[i] = T(1) / std::sqrt(values[i]);
  return roots;
}

std::tuple<Tensor, Tensor> stats_(Tensor& row_var_, const OptionalTensor& col_var_, const Tensor& grad_,
                                  const Tensor& row_sums, const Tensor& col_sums, const Tensor& step,
                                  const OptionalTensor& skip, int64_t num_rows, int64_t num_cols, double decay,
                                  double eps) {
  checks::adafactor_stats(row_var_, col_var_, grad_, row_sums, col_sums, step, skip);
  const Tensor grad = grad_.contiguous();
  const auto options = grad.options().dtype(at::kDouble);
  const int64_t N = col_var_ ? Matrices(grad).N : 1;
  Tensor row_totals = at::empty({N}, options), scaled_squares = at::empty({N}, options);
  auto *const totals = row_totals.mutable_data_ptr<double>(), *const scaled = scaled_squares.mutable_data_ptr<double>();
  if (is_set(skip) || grad.numel() == 0) return {row_totals.fill_(1), scaled_squares.zero_()};
  const double rho = 1 - std::pow(static_cast<double>(*step.const_data_ptr<int64_t>()) + 1, decay);
  const InPlace row_var(row_var_);
  dispatch_accumulation(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& functions = adafactor_functions<T>();
    const T* const g = grad.const_data_ptr<T>();
    if (!col_var_) {
      T* const variance = row_var.get().mutable_data_ptr<T>();
      totals[0] = 1;
      scaled[0] = sum_of_blocks(grad.numel(), [&](int64_t begin, int64_t count) {
        return functions.update_variance(variance + begin, g + begin, count, static_cast<T>(rho), static_cast<T>(eps));
      });
      return;
    }
    const InPlace col_var(*col_var_);
    update_means<T>(row_var.get(), row_sums.contiguous(), num_cols, rho, eps);
    update_means<T>(col_var.get(), col_sums.contiguous(), num_rows, rho, eps);
    col_var.finish();
    const Matrices shape(grad);
    const std::vector<T> row_scale = inverse_roots<T>(row_var.get()), column_scale = inverse_roots<T>(col_var.get());
    std::vector<double> partial(static_cast<size_t>(shape.N * shape.blocks_per_matrix));
    shape.for_each_rows([&](int64_t matrix, int64_t row, int64_t count, int64_t block) {
      const int64_t first = matrix * shape.R + row;
      partial[block] = functions.scaled_square_sum(g + first * shape.C, count, shape.C, row_scale.data() + first,
                                                   column_scale.data() + matrix * shape.C);
    });
    const T* const rows = row_var.get().const_data_ptr<T>();
    for (int64_t i = 0; i < shape.N; ++i) {
      totals[i] = scaled[i] = 0;
      for (int64_t row = 0; row < shape.R; ++row) totals[i] += rows[i * shape.R + row];
      for (int64_t b = 0; b < shape.blocks_per_matrix; ++b) scaled[i] += partial[i * shape.blocks_per_matrix + b];
    }
  });
  row_var.finish();
  return {row_totals, scaled_squares};
}

void apply_(Tensor& weight_, const Tensor& grad_, const Tensor& row_var_, const OptionalTensor& col_var_,
            const Tensor& row_means_, const Tensor& weight_squares, const Tensor& update_squares, const Tensor& lr,
            const OptionalTensor& skip, int64_t num_elements, double clipping, double min_scale) {
  checks::adafactor_apply(weight_, grad_, row_var_, col_var_, row_means_, weight_squares, update_squares, lr, skip);
  if (is_set(skip) || weight_.numel() == 0) return;
  const auto rms = [&](const Tensor& squares) { return std::sqrt(*squares.const_data_ptr<double>() / num_elements); };
  const double factor =
      lr.item<double>() * std::max(rms(weight_squares), min_scale) / std::max(1., rms(update_squares) / clipping);
  const Tensor grad = grad_.contiguous(), row_var = row_var_.contiguous(), row_means = row_means_.contiguous();
  const InPlace weight(weight_);
  dispatch_accumulation(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto& functions = adafactor_functions<T>();
    const T* const g = grad.const_data_ptr<T>();
    T* const w = weight.get().mutable_data_ptr<T>();
    if (!col_var_) {
      const T* const variance = row_var.const_data_ptr<T>();
      for_each_block(grad.numel(), kElementsPerBlock, [&](int64_t begin, int64_t count, int64_t) {
        functions.apply_elements(w + begin, g + begin, variance + begin, count, static_cast<T>(factor));
      });
      return;
    }
    const Matrices shape(grad);
    std::vector<T> row_scale = inverse_roots<T>(row_var);
    const std::vector<T> column_scale = inverse_roots<T>(col_var_->contiguous());
    const auto* const means = row_means.const_data_ptr<double>();
    for (int64_t row = 0; row < shape.N * shape.R; ++row) {
      row_scale[row] = static_cast<T>(row_scale[row] * factor * std::sqrt(means[row / shape.R]));
    }
    shape.for_each_rows([&](int64_t matrix, int64_t row, int64_t count, int64_t) {
      const int64_t first = matrix * shape.R + row;
      functions.apply_matrix(w + first * shape.C, g + first * shape.C, count, shape.C, row_scale.data() + first,
                             column_scale.data() + matrix * shape.C);
    });
  });
  weight.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("adafactor_sums", sums);
  m.impl("adafactor_stats_", stats_);
  m.impl("adafactor_apply_", apply_);
  m.impl("squared_norm", squared_norm);
}

}  // namespace glam::cpu
