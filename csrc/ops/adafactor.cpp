// Adafactor's step in four ops over a list of parameters, so that many cost few kernel launches and sums over the shards
// of split parameters can go between.
//
// P parameters weight [..., R, C] (leading dimensions are a batch of N matrices) of one dtype, float32 or float64, with
// gradients of the same shapes. Factored state: row_var [..., R] and col_var [..., C]; unfactored: row_var holds the full
// variance, [..., R, C], col_var is [0], and N = 1.
// With t = step (updates applied so far), rho = 1 - (t + 1)^decay and q = grad^2 + eps:
//   row_var <- rho row_var + (1 - rho) mean over C of q      col_var <- rho col_var + (1 - rho) mean over R of q
//   u = grad / sqrt(row_var / mean over R of row_var) / sqrt(col_var), or grad / sqrt(variance)
//   weight <- weight - lr max(RMS(weight), min_scale) u / max(1, RMS(u) / clipping)
// RMS is over the whole tensor. Where `skip` [] bool is true nothing changes; it is read where it lives, as step [] int64
// and lr [] are. No temporary has the size of a weight. Sums have a fixed order. What an op returns for the whole list
// lies one parameter behind the other in one tensor; a part of it is what shards sum.
//
//   adafactor_sums(grads, weights, factored) -> row_sums [sum of N R] and col_sums [sum of N C] of grad^2, of the factored
//     parameters, and weight_squares [P] float64.
//     Sum a parameter's row_sums over the ranks that split C, col_sums over those that split R, weight_squares over all.
//   adafactor_stats_(row_vars, col_vars, grads, row_sums, col_sums, step, skip, num_rows, num_cols) updates the state, with
//     R and C of the whole parameters; returns row_means [sum of N], the sum of row_var / num_rows, and scaled_squares
//     [sum of N], the sum of grad^2 / (row_var col_var), both float64. Unfactored: 1 and the sum of grad^2 / variance.
//     Sum row_means over the ranks that split R, scaled_squares over those that split R or C.
//   adafactor_update_squares(row_means, scaled_squares, num_matrices) -> [P] float64, the sum over N of their product.
//     Sum them over the ranks that split neither R nor C.
//   adafactor_apply_(weights, grads, row_vars, col_vars, row_means, weight_squares, update_squares, lr, skip, num_elements)
// A parameter without elements keeps its state; its means are 1 and its squares 0.
// Source: Shazeer and Stern (arXiv 1804.04235) with the settings of lingvo's XLAShardingAdafactor.

#include "ops/adafactor.h"

#include <ATen/ops/empty.h>

#include "glam/ops.h"
#include "ops/checks.h"

namespace glam {
namespace {

constexpr auto kSums = "glam::adafactor_sums";
constexpr auto kStats = "glam::adafactor_stats_";
constexpr auto kUpdateSquares = "glam::adafactor_update_squares";
constexpr auto kApply = "glam::adafactor_apply_";
constexpr auto kSquares = "glam::squared_norm";

using SymSizes = std::vector<SymInt>;

// [..., R] and [..., C] of [..., R, C].
SymSizes row_sizes(const Tensor& x) { return x.sym_sizes().slice(0, x.dim() - 1).vec(); }
SymSizes column_sizes(const Tensor& x) {
  SymSizes sizes = row_sizes(x);
  sizes.back() = x.sym_size(-1);
  return sizes;
}
SymInt product(c10::SymIntArrayRef sizes) {
  SymInt count = 1;
  for (const SymInt& size : sizes) count = count * size;
  return count;
}
SymInt num_matrices(const Tensor& x) { return product(x.sym_sizes().slice(0, x.dim() - 2)); }

bool is_factored(const Tensor& row_var, const Tensor& parameter) { return row_var.dim() < parameter.dim(); }

// What the tensors of a list have together: rows, columns and matrices one behind the other.
struct Lengths {
  SymInt rows = 0, columns = 0, matrices = 0;

  void add(const Tensor& parameter, bool factored) {
    matrices = matrices + (factored ? num_matrices(parameter) : SymInt(1));
    if (!factored) return;
    rows = rows + product(row_sizes(parameter));
    columns = columns + product(column_sizes(parameter));
  }
};
Lengths lengths_of(at::TensorList parameters, at::TensorList row_vars) {
  Lengths lengths;
  for (size_t i = 0; i < parameters.size(); ++i) lengths.add(parameters[i], is_factored(row_vars[i], parameters[i]));
  return lengths;
}

template <class Factored>
std::vector<ParameterShape> shapes_of(at::TensorList parameters, Factored&& factored) {
  std::vector<ParameterShape> shapes;
  shapes.reserve(parameters.size());
  int64_t rows = 0, columns = 0, matrices = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Tensor& x = parameters[i];
    ParameterShape shape{factored(i), 1, 1, x.numel(), rows, columns, matrices};
    if (shape.factored) {
      shape.R = x.size(-2);
      shape.C = x.size(-1);
      for (int64_t dim = 0; dim + 2 < x.dim(); ++dim) shape.N *= x.size(dim);
      rows += shape.N * shape.R;
      columns += shape.N * shape.C;
    }
    matrices += shape.N;
    shapes.push_back(shape);
  }
  return shapes;
}

std::string name_of(const char* list, size_t i) { return list + ('[' + std::to_string(i)) + ']'; }

void check_length(const char* op, const char* name, size_t length, const char* other_name, size_t other) {
  TORCH_CHECK(length == other, op, ": expected ", name, " to be of the length of ", other_name, ", ", other, ", got ",
              length);
}
// Of one dtype, float32 or float64, on one device.
void check_parameters(const char* op, const char* list, at::TensorList tensors) {
  TORCH_CHECK(!tensors.empty(), op, ": expected ", list, " to be one tensor or more, got none");
  const auto dtype = tensors[0].scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble, op, ": expected ", list, "[0] to be Float or Double, got ",
              dtype);
}
// `tensor` is list[i], of the dtype and on the device of the parameters, of which `first` is one.
void check_beside(const char* op, const std::string& name, const Tensor& tensor, const char* first_name,
                  const Tensor& first) {
  check_same_dtype(op, name.c_str(), tensor, first_name, first);
  check_same_device(op, tensor, first);
}
void check_shape_of(const char* op, const std::string& name, const Tensor& tensor, const std::string& other_name,
                    const Tensor& other) {
  check_shape(op, name.c_str(), tensor, ("the shape of " + other_name).c_str(), other.sym_sizes().vec());
}
void check_scalar(const char* op, const char* name, const Tensor& x) {
  TORCH_CHECK(x.dim() == 0, op, ": expected ", name, " to be a scalar tensor, got ", x.dim(), " dimensions");
}
void check_skip(const char* op, const OptionalTensor& skip) {
  if (!skip) return;
  check_dtype(op, "skip", *skip, at::kBool);
  check_scalar(op, "skip", *skip);
}
void check_doubles(const char* op, const char* name, const Tensor& x, const char* letters, const SymInt& length) {
  check_dtype(op, name, x, at::kDouble);
  check_shape(op, name, x, letters, {length});
}
void check_state(const char* op, at::TensorList row_vars, at::TensorList col_vars, at::TensorList grads) {
  check_parameters(op, "grads", grads);
  check_length(op, "row_vars", row_vars.size(), "grads", grads.size());
  check_length(op, "col_vars", col_vars.size(), "grads", grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::string grad = name_of("grads", i), row_var = name_of("row_vars", i), col_var = name_of("col_vars", i);
    check_beside(op, grad, grads[i], "grads[0]", grads[0]);
    check_beside(op, row_var, row_vars[i], "grads[0]", grads[0]);
    check_beside(op, col_var, col_vars[i], "grads[0]", grads[0]);
    if (is_factored(row_vars[i], grads[i])) {
      TORCH_CHECK(grads[i].dim() >= 2, op, ": expected ", row_var, " to be the shape of ", grad, ", which has ",
                  grads[i].dim(), " dimensions, got ", row_vars[i].dim());
      check_shape(op, row_var.c_str(), row_vars[i], "[..., R]", row_sizes(grads[i]));
      check_shape(op, col_var.c_str(), col_vars[i], "[..., C]", column_sizes(grads[i]));
    } else {
      check_shape_of(op, row_var, row_vars[i], grad, grads[i]);
      check_shape(op, col_var.c_str(), col_vars[i], "[0] beside a full variance", {0});
    }
  }
}

}  // namespace

std::vector<ParameterShape> parameter_shapes(at::TensorList parameters, const std::vector<bool>& factored) {
  return shapes_of(parameters, [&](size_t i) { return factored[i]; });
}
std::vector<ParameterShape> parameter_shapes(at::TensorList parameters, at::TensorList row_vars) {
  return shapes_of(parameters, [&](size_t i) { return is_factored(row_vars[i], parameters[i]); });
}

std::pair<int64_t, int64_t> rows_and_columns(const std::vector<ParameterShape>& shapes) {
  int64_t rows = 0, columns = 0;
  for (const ParameterShape& shape : shapes) {
    rows += shape.factored ? shape.N * shape.R : 0;
    columns += shape.factored ? shape.N * shape.C : 0;
  }
  return {rows, columns};
}

std::vector<Tensor> contiguous(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(tensor.contiguous());
  return result;
}

Tensor empty_doubles(const SymInt& length, const Tensor& like) {
  return at::empty_symint({length}, like.options().dtype(at::kDouble));
}

void checks::adafactor_sums(at::TensorList grads, at::TensorList weights, const std::vector<bool>& factored) {
  check_parameters(kSums, "weights", weights);
  check_length(kSums, "grads", grads.size(), "weights", weights.size());
  check_length(kSums, "factored", factored.size(), "weights", weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string grad = name_of("grads", i), weight = name_of("weights", i);
    check_beside(kSums, weight, weights[i], "weights[0]", weights[0]);
    check_beside(kSums, grad, grads[i], "weights[0]", weights[0]);
    check_shape_of(kSums, grad, grads[i], weight, weights[i]);
    TORCH_CHECK(!factored[i] || weights[i].dim() >= 2, kSums, ": expected ", weight,
                " to be [..., R, C] to be factored, got ", weights[i].dim(), " dimensions");
  }
}

void checks::adafactor_stats(at::TensorList row_vars, at::TensorList col_vars, at::TensorList grads,
                             const Tensor& row_sums, const Tensor& col_sums, const Tensor& step,
                             const OptionalTensor& skip, size_t num_rows, size_t num_cols) {
  check_state(kStats, row_vars, col_vars, grads);
  const Lengths lengths = lengths_of(grads, row_vars);
  check_same_dtype(kStats, "row_sums", row_sums, "grads[0]", grads[0]);
  check_same_dtype(kStats, "col_sums", col_sums, "grads[0]", grads[0]);
  check_shape(kStats, "row_sums", row_sums, "[sum of N R]", {lengths.rows});
  check_shape(kStats, "col_sums", col_sums, "[sum of N C]", {lengths.columns});
  check_dtype(kStats, "step", step, at::kLong);
  check_scalar(kStats, "step", step);
  check_skip(kStats, skip);
  check_length(kStats, "num_rows", num_rows, "grads", grads.size());
  check_length(kStats, "num_cols", num_cols, "grads", grads.size());
}

void checks::adafactor_update_squares(const Tensor& row_means, const Tensor& scaled_squares,
                                      c10::SymIntArrayRef num_matrices) {
  SymInt sum = 0;
  for (const SymInt& count : num_matrices) sum = sum + count;
  check_doubles(kUpdateSquares, "row_means", row_means, "[sum of num_matrices]", sum);
  check_doubles(kUpdateSquares, "scaled_squares", scaled_squares, "[sum of num_matrices]", sum);
  check_same_device(kUpdateSquares, scaled_squares, row_means);
  for (const SymInt& count : num_matrices) {
    TORCH_SYM_CHECK(count.sym_ge(0), kUpdateSquares, ": expected num_matrices of at least 0, got ", count);
  }
}

void checks::adafactor_apply(at::TensorList weights, at::TensorList grads, at::TensorList row_vars,
                             at::TensorList col_vars, const Tensor& row_means, const Tensor& weight_squares,
                             const Tensor& update_squares, const Tensor& lr, const OptionalTensor& skip,
                             size_t num_elements) {
  check_state(kApply, row_vars, col_vars, grads);
  check_length(kApply, "weights", weights.size(), "grads", grads.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string weight = name_of("weights", i);
    check_beside(kApply, weight, weights[i], "grads[0]", grads[0]);
    check_shape_of(kApply, weight, weights[i], name_of("grads", i), grads[i]);
  }
  const auto count = static_cast<int64_t>(grads.size());
  check_doubles(kApply, "row_means", row_means, "[sum of N]", lengths_of(grads, row_vars).matrices);
  check_doubles(kApply, "weight_squares", weight_squares, "[P]", count);
  check_doubles(kApply, "update_squares", update_squares, "[P]", count);
  check_floating(kApply, "lr", lr);
  check_scalar(kApply, "lr", lr);
  check_skip(kApply, skip);
  check_length(kApply, "num_elements", num_elements, "grads", grads.size());
}

void checks::squared_norm(at::TensorList xs) {
  TORCH_CHECK(!xs.empty(), kSquares, ": expected xs to be one tensor or more, got none");
  for (size_t i = 0; i < xs.size(); ++i) {
    check_floating(kSquares, name_of("xs", i).c_str(), xs[i]);
    check_same_device(kSquares, xs[i], xs[0]);
  }
}

namespace {

std::tuple<Tensor, Tensor, Tensor> sums_meta(at::TensorList grads, at::TensorList weights,
                                             const c10::List<bool>& factored) {
  checks::adafactor_sums(grads, weights, factored.vec());
  Lengths lengths;
  for (size_t i = 0; i < grads.size(); ++i) lengths.add(grads[i], factored[i]);
  const auto options = grads[0].options();
  return {at::empty_symint({lengths.rows}, options), at::empty_symint({lengths.columns}, options),
          empty_doubles(static_cast<int64_t>(grads.size()), grads[0])};
}

std::tuple<Tensor, Tensor> stats_meta(at::TensorList row_vars, at::TensorList col_vars, at::TensorList grads,
                                      const Tensor& row_sums, const Tensor& col_sums, const Tensor& step,
                                      const OptionalTensor& skip, c10::SymIntArrayRef num_rows,
                                      c10::SymIntArrayRef num_cols, double, double) {
  checks::adafactor_stats(row_vars, col_vars, grads, row_sums, col_sums, step, skip, num_rows.size(), num_cols.size());
  const SymInt matrices = lengths_of(grads, row_vars).matrices;
  return {empty_doubles(matrices, grads[0]), empty_doubles(matrices, grads[0])};
}

Tensor update_squares_meta(const Tensor& row_means, const Tensor& scaled_squares, c10::SymIntArrayRef num_matrices) {
  checks::adafactor_update_squares(row_means, scaled_squares, num_matrices);
  return empty_doubles(static_cast<int64_t>(num_matrices.size()), row_means);
}

void apply_meta(at::TensorList weights, at::TensorList grads, at::TensorList row_vars, at::TensorList col_vars,
                const Tensor& row_means, const Tensor& weight_squares, const Tensor& update_squares, const Tensor& lr,
                const OptionalTensor& skip, c10::SymIntArrayRef num_elements, double, double) {
  checks::adafactor_apply(weights, grads, row_vars, col_vars, row_means, weight_squares, update_squares, lr, skip,
                          num_elements.size());
}

std::tuple<Tensor, Tensor> squared_norm_meta(at::TensorList xs) {
  checks::squared_norm(xs);
  const auto count = static_cast<int64_t>(xs.size());
  return {empty_doubles(count, xs[0]), at::empty({count}, xs[0].options().dtype(at::kBool))};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> adafactor_sums(at::TensorList grads, at::TensorList weights,
                                                  const std::vector<bool>& factored) {
  using Signature = std::tuple<Tensor, Tensor, Tensor>(at::TensorList, at::TensorList, const c10::List<bool>&);
  static const auto op = find_op<Signature>(kSums);
  c10::List<bool> flags;
  for (const bool flag : factored) flags.push_back(flag);
  return op.call(grads, weights, flags);
}

std::tuple<Tensor, Tensor> adafactor_stats_(at::TensorList row_vars, at::TensorList col_vars, at::TensorList grads,
                                            const Tensor& row_sums, const Tensor& col_sums, const Tensor& step,
                                            const OptionalTensor& skip, c10::SymIntArrayRef num_rows,
                                            c10::SymIntArrayRef num_cols, double decay, double eps) {
  using Signature = std::tuple<Tensor, Tensor>(at::TensorList, at::TensorList, at::TensorList, const Tensor&,
                                               const Tensor&, const Tensor&, const OptionalTensor&, c10::SymIntArrayRef,
                                               c10::SymIntArrayRef, double, double);
  static const auto op = find_op<Signature>(kStats);
  return op.call(row_vars, col_vars, grads, row_sums, col_sums, step, skip, num_rows, num_cols, decay, eps);
}

Tensor adafactor_update_squares(const Tensor& row_means, const Tensor& scaled_squares,
                                c10::SymIntArrayRef num_matrices) {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef)>(kUpdateSquares);
  return op.call(row_means, scaled_squares, num_matrices);
}

void adafactor_apply_(at::TensorList weights, at::TensorList grads, at::TensorList row_vars, at::TensorList col_vars,
                      const Tensor& row_means, const Tensor& weight_squares, const Tensor& update_squares,
                      const Tensor& lr, const OptionalTensor& skip, c10::SymIntArrayRef num_elements, double clipping,
                      double min_scale) {
  using Signature = void(at::TensorList, at::TensorList, at::TensorList, at::TensorList, const Tensor&, const Tensor&,
                         const Tensor&, const Tensor&, const OptionalTensor&, c10::SymIntArrayRef, double, double);
  static const auto op = find_op<Signature>(kApply);
  op.call(weights, grads, row_vars, col_vars, row_means, weight_squares, update_squares, lr, skip, num_elements,
          clipping, min_scale);
}

std::tuple<Tensor, Tensor> squared_norm(at::TensorList xs) {
  static const auto op = find_op<std::tuple<Tensor, Tensor>(at::TensorList)>(kSquares);
  return op.call(xs);
}

TORCH_LIBRARY_FRAGMENT(glam, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "adafactor_sums(Tensor[] grads, Tensor[] weights, bool[] factored) -> "
      "(Tensor row_sums, Tensor col_sums, Tensor weight_squares)",
      tags);
  m.def(
      "adafactor_stats_(Tensor(a!)[] row_vars, Tensor(b!)[] col_vars, Tensor[] grads, Tensor row_sums, "
      "Tensor col_sums, Tensor step, Tensor? skip, SymInt[] num_rows, SymInt[] num_cols, float decay=-0.8, "
      "float eps=1e-30) -> (Tensor row_means, Tensor scaled_squares)",
      tags);
  m.def(
      "adafactor_update_squares(Tensor row_means, Tensor scaled_squares, SymInt[] num_matrices) -> "
      "Tensor update_squares",
      tags);
  m.def(
      "adafactor_apply_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] row_vars, Tensor[] col_vars, Tensor row_means, "
      "Tensor weight_squares, Tensor update_squares, Tensor lr, Tensor? skip, SymInt[] num_elements, "
      "float clipping=1., float min_scale=0.001) -> ()",
      tags);
  // The sum of x^2 in float64, and whether a square is infinite or NaN in float32 (float64 for float64), of each.
  m.def("squared_norm(Tensor[] xs) -> (Tensor square_sums, Tensor nonfinite)", tags);
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  for (const char* name :
       {"adafactor_sums", "adafactor_stats_", "adafactor_update_squares", "adafactor_apply_", "squared_norm"}) {
    m.impl(name, not_differentiable());
  }
}
TORCH_LIBRARY_IMPL(glam, ADInplaceOrView, m) {
  m.impl("adafactor_stats_", bump_mutated_versions());
  m.impl("adafactor_apply_", bump_mutated_versions());
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("adafactor_sums", sums_meta);
  m.impl("adafactor_stats_", stats_meta);
  m.impl("adafactor_update_squares", update_squares_meta);
  m.impl("adafactor_apply_", apply_meta);
  m.impl("squared_norm", squared_norm_meta);
}

}  // namespace glam
