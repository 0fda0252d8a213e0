// CUDA kernels of the Adafactor ops and of squared_norm. Nothing is read on the host: step, lr, skip and all sums stay
// on the device, and a skipped update launches the same kernels.

#include "cuda/kernels/adafactor.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <vector>

#include "cuda/common.h"
#include "ops/adafactor.h"
#include "ops/checks.h"

namespace glam::cuda {
namespace {

Tensor bytes(int64_t count, const Tensor& like) { return at::empty({count}, like.options().dtype(at::kByte)); }

double* pointer(const Tensor& x) { return x.mutable_data_ptr<double>(); }
const bool* flag(const OptionalTensor& skip) { return skip ? skip->const_data_ptr<bool>() : nullptr; }

// What the CPU kernels read on the host must live beside the parameters here.
void check_devices(const char* op, const Tensor& grad, std::initializer_list<OptionalTensor> others) {
  for (const OptionalTensor& other : others) {
    if (other) check_same_device(op, *other, grad);
  }
}

std::vector<InPlace> in_place(at::TensorList tensors) { return {tensors.begin(), tensors.end()}; }
void finish(const std::vector<InPlace>& tensors) {
  for (const InPlace& tensor : tensors) tensor.finish();
}

// The list as the kernels take it, without its arrays.
std::vector<AdafactorParameter> parameters_of(const char* op, const std::vector<ParameterShape>& shapes) {
  std::vector<AdafactorParameter> parameters;
  for (const ParameterShape& shape : shapes) {
    constexpr int64_t most = std::numeric_limits<int>::max();
    TORCH_CHECK(!shape.factored || std::max({shape.N, shape.R, shape.C}) <= most, op,
                ": expected [..., R, C] to be at most ", most, " matrices, rows and columns to be factored, got ",
                shape.N, ", ", shape.R, " and ", shape.C);
    parameters.push_back({.factored = shape.factored,
                          .N = shape.N,
                          .R = shape.R,
                          .C = shape.C,
                          .rows = shape.rows,
                          .columns = shape.columns,
                          .matrices = shape.matrices});
  }
  return parameters;
}

std::tuple<Tensor, Tensor> squares(at::TensorList xs_) {
  checks::squared_norm(xs_);
  const OnDevice device(xs_[0]);
  const auto xs = contiguous(xs_);
  std::vector<Array> arrays;
  for (const Tensor& x : xs) arrays.push_back({data(x), type_of(x), x.numel()});
  const auto count = static_cast<int64_t>(xs.size());
  const Tensor sums = empty_doubles(count, xs[0]), nonfinite = at::empty({count}, xs[0].options().dtype(at::kBool));
  const Tensor partial = bytes(squared_norm_partial_bytes(arrays), xs[0]);
  squared_norm(arrays, mutable_data(partial), pointer(sums), nonfinite.mutable_data_ptr<bool>(), device.stream());
  return {sums, nonfinite};
}

std::tuple<Tensor, Tensor, Tensor> sums(at::TensorList grads_, at::TensorList weights_,
                                        const c10::List<bool>& factored) {
  constexpr auto op = "glam::adafactor_sums";
  checks::adafactor_sums(grads_, weights_, factored.vec());
  const OnDevice device(grads_[0]);
  const auto grads = contiguous(grads_), weights = contiguous(weights_);
  const auto shapes = parameter_shapes(grads, factored.vec());
  const auto [rows, columns] = rows_and_columns(shapes);
  auto parameters = parameters_of(op, shapes);
  bool any_empty = false;  // which has sums of no elements
  for (size_t i = 0; i < parameters.size(); ++i) {
    AdafactorParameter& parameter = parameters[i];
    parameter.grad = data(grads[i]);
    parameter.weight = mutable_data(weights[i]);
    any_empty = any_empty || parameter.numel() == 0;
  }
  const auto make = any_empty ? [](int64_t length, const Tensor& like) { return at::zeros({length}, like.options()); }
                              : [](int64_t length, const Tensor& like) { return at::empty({length}, like.options()); };
  const Tensor row_sums = make(rows, grads[0]), col_sums = make(columns, grads[0]);
  const Tensor weight_squares = empty_doubles(static_cast<int64_t>(grads.size()), grads[0]);
  const Type type = type_of(grads[0]);
  const Tensor partial = bytes(adafactor_sums_partial_bytes(parameters, type), grads[0]);
  adafactor_sums(parameters, type, mutable_data(partial), mutable_data(row_sums), mutable_data(col_sums),
                 pointer(weight_squares), device.stream());
  return {row_sums, col_sums, weight_squares};
}

std::tuple<Tensor, Tensor> stats_(at::TensorList row_vars_, at::TensorList col_vars_, at::TensorList grads_,
                                  const Tensor& row_sums_, const Tensor& col_sums_, const Tensor& step,
                                  const OptionalTensor& skip, at::IntArrayRef num_rows, at::IntArrayRef num_cols,
                                  double decay_power, double eps) {
  constexpr auto op = "glam::adafactor_stats_";
  checks::adafactor_stats(row_vars_, col_vars_, grads_, row_sums_, col_sums_, step, skip, num_rows.size(),
                          num_cols.size());
  check_devices(op, grads_[0], {row_sums_, col_sums_, step, skip});
  const OnDevice device(grads_[0]);
  const auto grads = contiguous(grads_);
  const auto row_vars = in_place(row_vars_), col_vars = in_place(col_vars_);
  const Tensor row_sums = row_sums_.contiguous(), col_sums = col_sums_.contiguous();
  auto parameters = parameters_of(op, parameter_shapes(grads, row_vars_));
  for (size_t i = 0; i < parameters.size(); ++i) {
    parameters[i].grad = data(grads[i]);
    parameters[i].row_var = row_vars[i].data();
    parameters[i].col_var = col_vars[i].data();
    parameters[i].num_rows = num_rows[i];
    parameters[i].num_cols = num_cols[i];
  }
  const int64_t matrices = parameters.back().matrices + parameters.back().N;
  const Tensor row_means = empty_doubles(matrices, grads[0]), scaled_squares = empty_doubles(matrices, grads[0]);
  const AdafactorDecay decay{
      .step = step.const_data_ptr<int64_t>(), .skip = flag(skip), .decay = decay_power, .eps = eps};
  const Type type = type_of(grads[0]);
  const Tensor partial = bytes(adafactor_stats_partial_bytes(parameters, type), grads[0]);
  adafactor_stats(parameters, type, data(row_sums), data(col_sums), decay, mutable_data(partial), pointer(row_means),
                  pointer(scaled_squares), device.stream());
  finish(row_vars);
  finish(col_vars);
  return {row_means, scaled_squares};
}

Tensor update_squares(const Tensor& row_means_, const Tensor& scaled_squares_, at::IntArrayRef num_matrices) {
  checks::adafactor_update_squares(row_means_, scaled_squares_, c10::fromIntArrayRefSlow(num_matrices));
  const OnDevice device(row_means_);
  const Tensor row_means = row_means_.contiguous(), scaled_squares = scaled_squares_.contiguous();
  const Tensor squares = empty_doubles(static_cast<int64_t>(num_matrices.size()), row_means);
  adafactor_update_squares(row_means.const_data_ptr<double>(), scaled_squares.const_data_ptr<double>(),
                           {num_matrices.data(), num_matrices.size()}, pointer(squares), device.stream());
  return squares;
}

void apply_(at::TensorList weights_, at::TensorList grads_, at::TensorList row_vars_, at::TensorList col_vars_,
            const Tensor& row_means_, const Tensor& weight_squares_, const Tensor& update_squares_, const Tensor& lr_,
            const OptionalTensor& skip, at::IntArrayRef num_elements, double clipping, double min_scale) {
  constexpr auto op = "glam::adafactor_apply_";
  checks::adafactor_apply(weights_, grads_, row_vars_, col_vars_, row_means_, weight_squares_, update_squares_, lr_,
                          skip, num_elements.size());
  check_devices(op, grads_[0], {row_means_, weight_squares_, update_squares_, lr_, skip});
  const OnDevice device(grads_[0]);
  const auto grads = contiguous(grads_), row_vars = contiguous(row_vars_), col_vars = contiguous(col_vars_);
  const auto weights = in_place(weights_);
  auto parameters = parameters_of(op, parameter_shapes(grads, row_vars_));
  for (size_t i = 0; i < parameters.size(); ++i) {
    parameters[i].grad = data(grads[i]);
    parameters[i].weight = weights[i].data();
    parameters[i].row_var = mutable_data(row_vars[i]);
    parameters[i].col_var = mutable_data(col_vars[i]);
    parameters[i].num_elements = num_elements[i];
  }
  const Tensor row_means = row_means_.contiguous(), weight_squares = weight_squares_.contiguous();
  const Tensor update_squares = update_squares_.contiguous(), lr = lr_.to(at::kDouble);
  const AdafactorUpdate update{.row_means = row_means.const_data_ptr<double>(),
                               .weight_squares = weight_squares.const_data_ptr<double>(),
                               .update_squares = update_squares.const_data_ptr<double>(),
                               .lr = lr.const_data_ptr<double>(),
                               .skip = flag(skip),
                               .clipping = clipping,
                               .min_scale = min_scale};
  adafactor_apply(parameters, type_of(grads[0]), update, device.stream());
  finish(weights);
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("adafactor_sums", sums);
  m.impl("adafactor_stats_", stats_);
  m.impl("adafactor_update_squares", update_squares);
  m.impl("adafactor_apply_", apply_);
  m.impl("squared_norm", squares);
}

}  // namespace glam::cuda
