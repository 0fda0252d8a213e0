// CUDA kernels of the Adafactor ops and of squared_norm. Nothing is read on the host: step, lr, skip and all sums stay
// on the device, and a skipped update launches the same kernels.

#include "cuda/kernels/adafactor.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <initializer_list>

#include "cuda/common.h"
#include "ops/checks.h"

namespace glam::cuda {
namespace {

MatrixShape shape_of(const Tensor& x) {
  MatrixShape shape{.N = 1, .R = x.size(-2), .C = x.size(-1)};
  for (int64_t i = 0; i + 2 < x.dim(); ++i) shape.N *= x.size(i);
  return shape;
}

Tensor bytes(int64_t count, const Tensor& like) { return at::empty({count}, like.options().dtype(at::kByte)); }

double* doubles(const Tensor& x) { return x.mutable_data_ptr<double>(); }
const bool* flag(const OptionalTensor& skip) { return skip ? skip->const_data_ptr<bool>() : nullptr; }

// What the CPU kernels read on the host must live beside the parameter here.
void check_devices(const char* op, const Tensor& grad, std::initializer_list<OptionalTensor> others) {
  for (const OptionalTensor& other : others) {
    if (other) check_same_device(op, *other, grad);
  }
}

std::tuple<Tensor, Tensor> squares(const Tensor& x_) {
  checks::squared_norm(x_);
  const OnDevice device(x_);
  const Tensor x = x_.contiguous();
  const Tensor sum = at::empty({}, x.options().dtype(at::kDouble));
  const Tensor nonfinite = at::empty({}, x.options().dtype(at::kBool));
  const Tensor partial = bytes(squared_norm_partial_bytes(x.numel()), x);
  squared_norm(data(x), type_of(x), x.numel(), mutable_data(partial), doubles(sum), nonfinite.mutable_data_ptr<bool>(),
               device.stream());
  return {sum, nonfinite};
}

std::tuple<Tensor, Tensor, Tensor> sums(const Tensor& grad_, const Tensor& weight_, bool factored) {
  checks::adafactor_sums(grad_, weight_, factored);
  const auto options = grad_.options();
  if (!factored) return {at::empty({0}, options), at::empty({0}, options), std::get<0>(squares(weight_))};
  const OnDevice device(grad_);
  const Tensor grad = grad_.contiguous(), weight = weight_.contiguous();
  const MatrixShape shape = shape_of(grad);
  auto sizes = grad.sizes().slice(0, grad.dim() - 1).vec();
  if (grad.numel() == 0) {
    const Tensor row_sums = at::zeros(sizes, options);
    sizes.back() = shape.C;
    return {row_sums, at::zeros(sizes, options), at::zeros({}, options.dtype(at::kDouble))};
  }
  const Tensor row_sums = at::empty(sizes, options);
  sizes.back() = shape.C;
  const Tensor col_sums = at::empty(sizes, options), squares = at::empty({}, options.dtype(at::kDouble));
  const Tensor partial = bytes(adafactor_sums_partial_bytes(shape, type_of(grad)), grad);
  adafactor_sums(data(grad), data(weight), type_of(grad), shape, mutable_data(partial), mutable_data(row_sums),
                 mutable_data(col_sums), doubles(squares), device.stream());
  return {row_sums, col_sums, squares};
}

std::tuple<Tensor, Tensor> stats_(Tensor& row_var_, const OptionalTensor& col_var_, const Tensor& grad_,
                                  const Tensor& row_sums, const Tensor& col_sums, const Tensor& step,
                                  const OptionalTensor& skip, int64_t num_rows, int64_t num_cols, double decay_power,
                                  double eps) {
  checks::adafactor_stats(row_var_, col_var_, grad_, row_sums, col_sums, step, skip);
  check_devices("glam::adafactor_stats_", grad_, {row_var_, col_var_, row_sums, col_sums, step, skip});
  const OnDevice device(grad_);
  const Tensor grad = grad_.contiguous();
  const auto options = grad.options().dtype(at::kDouble);
  const MatrixShape shape = col_var_ ? shape_of(grad) : MatrixShape{1, 1, grad.numel()};
  if (grad.numel() == 0) return {at::ones({shape.N}, options), at::zeros({shape.N}, options)};
  const Tensor row_totals = at::empty({shape.N}, options), scaled_squares = at::empty({shape.N}, options);
  const AdafactorDecay decay{
      .step = step.const_data_ptr<int64_t>(), .skip = flag(skip), .decay = decay_power, .eps = eps};
  const InPlace row_var(row_var_);
  if (col_var_) {
    const InPlace col_var(*col_var_);
    const Tensor rows = row_sums.contiguous(), columns = col_sums.contiguous();
    const Tensor partial = bytes(adafactor_stats_partial_bytes(shape), grad);
    adafactor_stats(data(grad), type_of(grad), shape, data(rows), data(columns), num_rows, num_cols, decay,
                    row_var.data(), col_var.data(), mutable_data(partial), doubles(row_totals), doubles(scaled_squares),
                    device.stream());
    col_var.finish();
  } else {
    const Tensor partial = bytes(adafactor_variance_partial_bytes(grad.numel()), grad);
    adafactor_variance(data(grad), type_of(grad), grad.numel(), decay, row_var.data(), mutable_data(partial),
                       doubles(row_totals), doubles(scaled_squares), device.stream());
  }
  row_var.finish();
  return {row_totals, scaled_squares};
}

void apply_(Tensor& weight_, const Tensor& grad_, const Tensor& row_var_, const OptionalTensor& col_var_,
            const Tensor& row_means_, const Tensor& weight_squares, const Tensor& update_squares, const Tensor& lr_,
            const OptionalTensor& skip, int64_t num_elements, double clipping, double min_scale) {
  checks::adafactor_apply(weight_, grad_, row_var_, col_var_, row_means_, weight_squares, update_squares, lr_, skip);
  check_devices("glam::adafactor_apply_", grad_,
                {weight_, row_var_, col_var_, row_means_, weight_squares, update_squares, lr_, skip});
  if (weight_.numel() == 0) return;
  const OnDevice device(weight_);
  const Tensor grad = grad_.contiguous(), row_var = row_var_.contiguous(), row_means = row_means_.contiguous();
  const Tensor lr = lr_.to(at::kDouble);
  const AdafactorUpdate update{.row_means = row_means.const_data_ptr<double>(),
                               .weight_squares = weight_squares.const_data_ptr<double>(),
                               .update_squares = update_squares.const_data_ptr<double>(),
                               .lr = lr.const_data_ptr<double>(),
                               .skip = flag(skip),
                               .num_elements = num_elements,
                               .clipping = clipping,
                               .min_scale = min_scale};
  const InPlace weight(weight_);
  if (col_var_) {
    const Tensor col_var = col_var_->contiguous();
    adafactor_apply_matrix(weight.data(), data(grad), type_of(grad), shape_of(grad), data(row_var), data(col_var),
                           update, device.stream());
  } else {
    adafactor_apply_elements(weight.data(), data(grad), data(row_var), type_of(grad), grad.numel(), update,
                             device.stream());
  }
  weight.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("adafactor_sums", sums);
  m.impl("adafactor_stats_", stats_);
  m.impl("adafactor_apply_", apply_);
  m.impl("squared_norm", squares);
}

}  // namespace glam::cuda
