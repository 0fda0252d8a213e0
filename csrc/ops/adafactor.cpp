// Adafactor's step of one parameter in three ops, so that sums over the shards of a split parameter can go between.
//
// weight [..., R, C] (any leading dimensions are a batch of N matrices) and grad, float32 or float64, same shape. Factored
// state: row_var [..., R] and col_var [..., C]; unfactored: row_var holds the full variance and col_var is absent.
// With t = step (updates applied so far), rho = 1 - (t + 1)^decay and q = grad^2 + eps:
//   row_var <- rho row_var + (1 - rho) mean over C of q      col_var <- rho col_var + (1 - rho) mean over R of q
//   u = grad / sqrt(row_var / mean over R of row_var) / sqrt(col_var), or grad / sqrt(variance)
//   weight <- weight - lr max(RMS(weight), min_scale) u / max(1, RMS(u) / clipping)
// RMS is over the whole tensor. Where `skip` [] bool is true nothing changes; it is read where it lives, as step [] int64
// and lr [] are. No temporary has the size of the weight. Sums have a fixed order.
//
//   adafactor_sums(grad, weight, factored) -> row_sums [..., R], col_sums [..., C] of grad^2, weight_squares [] float64
//     Sum row_sums over the ranks that split C, col_sums over those that split R, weight_squares over all.
//   adafactor_stats_(row_var, col_var, grad, row_sums, col_sums, step, skip, num_rows, num_cols) updates the state, with
//     R and C of the whole parameter; returns row_totals [N], the sum of row_var, and scaled_squares [N], the sum of
//     grad^2 / (row_var col_var), both float64. Unfactored: N = 1, totals 1, the sum of grad^2 / variance.
//     Sum row_totals over the ranks that split R; scaled_squares over those that split R or C. Then
//     row_means = row_totals / num_rows; update_squares = sum over N of row_means * scaled_squares, over all ranks.
//   adafactor_apply_(weight, grad, row_var, col_var, row_means, weight_squares, update_squares, lr, skip, num_elements)
// Source: Shazeer and Stern (arXiv 1804.04235) with the settings of lingvo's XLAShardingAdafactor.

#include <ATen/ops/empty.h>

#include "glam/ops.h"
#include "ops/checks.h"

namespace glam {
namespace {

constexpr auto kSums = "glam::adafactor_sums";
constexpr auto kStats = "glam::adafactor_stats_";
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
SymInt num_matrices(const Tensor& x) {
  SymInt count = 1;
  for (int64_t i = 0; i + 2 < x.dim(); ++i) count = count * x.sym_size(i);
  return count;
}

void check_parameter(const char* op, const char* name, const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op, ": expected ", name,
              " to be Float or Double, got ", x.scalar_type());
}
void check_scalar(const char* op, const char* name, const Tensor& x) {
  TORCH_CHECK(x.dim() == 0, op, ": expected ", name, " to be a scalar tensor, got ", x.dim(), " dimensions");
}
void check_skip(const char* op, const OptionalTensor& skip) {
  if (!skip) return;
  check_dtype(op, "skip", *skip, at::kBool);
  check_scalar(op, "skip", *skip);
}
void check_state(const char* op, const Tensor& row_var, const OptionalTensor& col_var, const Tensor& grad) {
  check_parameter(op, "grad", grad);
  check_same_dtype(op, "row_var", row_var, "grad", grad);
  if (!col_var) return check_shape(op, "row_var", row_var, "the shape of grad", grad.sym_sizes().vec());
  TORCH_CHECK(grad.dim() >= 2, op, ": expected grad to be [..., R, C] beside col_var, got ", grad.dim(), " dimensions");
  check_same_dtype(op, "col_var", *col_var, "grad", grad);
  check_shape(op, "row_var", row_var, "[..., R]", row_sizes(grad));
  check_shape(op, "col_var", *col_var, "[..., C]", column_sizes(grad));
}

}  // namespace

void checks::adafactor_sums(const Tensor& grad, const Tensor& weight, bool factored) {
  check_parameter(kSums, "weight", weight);
  check_same_dtype(kSums, "grad", grad, "weight", weight);
  check_shape(kSums, "grad", grad, "the shape of weight", weight.sym_sizes().vec());
  check_same_device(kSums, grad, weight);
  TORCH_CHECK(!factored || weight.dim() >= 2, kSums, ": expected weight to be [..., R, C] to be factored, got ",
              weight.dim(), " dimensions");
}

void checks::adafactor_stats(const Tensor& row_var, const OptionalTensor& col_var, const Tensor& grad,
                             const Tensor& row_sums, const Tensor& col_sums, const Tensor& step,
                             const OptionalTensor& skip) {
  check_state(kStats, row_var, col_var, grad);
  check_dtype(kStats, "step", step, at::kLong);
  check_scalar(kStats, "step", step);
  check_skip(kStats, skip);
  if (!col_var) return;
  check_shape(kStats, "row_sums", row_sums, "[..., R]", row_sizes(grad));
  check_shape(kStats, "col_sums", col_sums, "[..., C]", column_sizes(grad));
  check_same_dtype(kStats, "row_sums", row_sums, "grad", grad);
  check_same_dtype(kStats, "col_sums", col_sums, "grad", grad);
}

void checks::adafactor_apply(const Tensor& weight, const Tensor& grad, const Tensor& row_var,
                             const OptionalTensor& col_var, const Tensor& row_means, const Tensor& weight_squares,
                             const Tensor& update_squares, const Tensor& lr, const OptionalTensor& skip) {
  check_state(kApply, row_var, col_var, grad);
  check_same_dtype(kApply, "weight", weight, "grad", grad);
  check_shape(kApply, "weight", weight, "the shape of grad", grad.sym_sizes().vec());
  check_dtype(kApply, "row_means", row_means, at::kDouble);
  check_shape(kApply, "row_means", row_means, "[N]", {col_var ? num_matrices(grad) : SymInt(1)});
  check_dtype(kApply, "weight_squares", weight_squares, at::kDouble);
  check_scalar(kApply, "weight_squares", weight_squares);
  check_dtype(kApply, "update_squares", update_squares, at::kDouble);
  check_scalar(kApply, "update_squares", update_squares);
  check_floating(kApply, "lr", lr);
  check_scalar(kApply, "lr", lr);
  check_skip(kApply, skip);
}

void checks::squared_norm(const Tensor& x) { check_floating(kSquares, "x", x); }

namespace {

std::tuple<Tensor, Tensor, Tensor> sums_meta(const Tensor& grad, const Tensor& weight, bool factored) {
  checks::adafactor_sums(grad, weight, factored);
  const SymSizes none = {0};
  return {at::empty_symint(factored ? row_sizes(grad) : none, grad.options()),
          at::empty_symint(factored ? column_sizes(grad) : none, grad.options()),
          at::empty({}, grad.options().dtype(at::kDouble))};
}

std::tuple<Tensor, Tensor> stats_meta(Tensor& row_var, const OptionalTensor& col_var, const Tensor& grad,
                                      const Tensor& row_sums, const Tensor& col_sums, const Tensor& step,
                                      const OptionalTensor& skip, SymInt, SymInt, double, double) {
  checks::adafactor_stats(row_var, col_var, grad, row_sums, col_sums, step, skip);
  const SymSizes sizes = {col_var ? num_matrices(grad) : SymInt(1)};
  const auto options = grad.options().dtype(at::kDouble);
  return {at::empty_symint(sizes, options), at::empty_symint(sizes, options)};
}

void apply_meta(Tensor& weight, const Tensor& grad, const Tensor& row_var, const OptionalTensor& col_var,
                const Tensor& row_means, const Tensor& weight_squares, const Tensor& update_squares, const Tensor& lr,
                const OptionalTensor& skip, SymInt, double, double) {
  checks::adafactor_apply(weight, grad, row_var, col_var, row_means, weight_squares, update_squares, lr, skip);
}

std::tuple<Tensor, Tensor> squared_norm_meta(const Tensor& x) {
  checks::squared_norm(x);
  return {at::empty({}, x.options().dtype(at::kDouble)), at::empty({}, x.options().dtype(at::kBool))};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> adafactor_sums(const Tensor& grad, const Tensor& weight, bool factored) {
  using Signature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, bool);
  static const auto op = find_op<Signature>(kSums);
  return op.call(grad, weight, factored);
}

std::tuple<Tensor, Tensor> adafactor_stats_(Tensor& row_var, const OptionalTensor& col_var, const Tensor& grad,
                                            const Tensor& row_sums, const Tensor& col_sums, const Tensor& step,
                                            const OptionalTensor& skip, SymInt num_rows, SymInt num_cols, double decay,
                                            double eps) {
  using Signature =
      std::tuple<Tensor, Tensor>(Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                                 const Tensor&, const OptionalTensor&, SymInt, SymInt, double, double);
  static const auto op = find_op<Signature>(kStats);
  return op.call(row_var, col_var, grad, row_sums, col_sums, step, skip, std::move(num_rows), std::move(num_cols),
                 decay, eps);
}

void adafactor_apply_(Tensor& weight, const Tensor& grad, const Tensor& row_var, const OptionalTensor& col_var,
                      const Tensor& row_means, const Tensor& weight_squares, const Tensor& update_squares,
                      const Tensor& lr, const OptionalTensor& skip, SymInt num_elements, double clipping,
                      double min_scale) {
  using Signature = void(Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                         const Tensor&, const Tensor&, const OptionalTensor&, SymInt, double, double);
  static const auto op = find_op<Signature>(kApply);
  op.call(weight, grad, row_var, col_var, row_means, weight_squares, update_squares, lr, skip, std::move(num_elements),
          clipping, min_scale);
}

std::tuple<Tensor, Tensor> squared_norm(const Tensor& x) {
  static const auto op = find_op<std::tuple<Tensor, Tensor>(const Tensor&)>(kSquares);
  return op.call(x);
}

TORCH_LIBRARY_FRAGMENT(glam, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "adafactor_sums(Tensor grad, Tensor weight, bool factored) -> "
      "(Tensor row_sums, Tensor col_sums, Tensor weight_squares)",
      tags);
  m.def(
      "adafactor_stats_(Tensor(a!) row_var, Tensor(b!)? col_var, Tensor grad, Tensor row_sums, Tensor col_sums, "
      "Tensor step, Tensor? skip, SymInt num_rows, SymInt num_cols, float decay=-0.8, float eps=1e-30) -> "
      "(Tensor row_totals, Tensor scaled_squares)",
      tags);
  m.def(
      "adafactor_apply_(Tensor(a!) weight, Tensor grad, Tensor row_var, Tensor? col_var, Tensor row_means, "
      "Tensor weight_squares, Tensor update_squares, Tensor lr, Tensor? skip, SymInt num_elements, "
      "float clipping=1., float min_scale=0.001) -> ()",
      tags);
  // The sum of x^2 in float64, and whether a square is infinite or NaN in float32 (float64 for float64).
  m.def("squared_norm(Tensor x) -> (Tensor square_sum, Tensor nonfinite)", tags);
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  for (const char* name : {"adafactor_sums", "adafactor_stats_", "adafactor_apply_", "squared_norm"}) {
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
  m.impl("adafactor_apply_", apply_meta);
  m.impl("squared_norm", squared_norm_meta);
}

}  // namespace glam
