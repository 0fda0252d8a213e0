// Embedding: y[...] = table[ids[...]], with ids [...] int64 or int32, table [V, D], y [..., D] in the table's dtype.
//
// An id outside [0, V) raises on CPU. The table's gradient is dense [V, D] in the table's dtype: for each id the rows that
// used it are added in their order, in float32 (float64 for float64); no atomics. The table may be packed for inference:
// table.t() is, so that the output layer can use it too (ops/packed_weight.h); y is bfloat16 then, or float32 for int8.

#include <ATen/ops/empty.h>

#include "glam/ops.h"
#include "ops/accumulate.h"
#include "ops/checks.h"
#include "ops/packed_weight.h"

namespace glam {
namespace {

constexpr auto kOp = "glam::embedding";

const auto& embedding_op() {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&)>(kOp);
  return op;
}
const auto& backward_into_op() {
  static const auto op = find_op<void(const Tensor&, const Tensor&, const Tensor&)>("glam::_embedding_backward_into");
  return op;
}
const auto& backward_op() {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, SymInt)>("glam::_embedding_backward");
  return op;
}

}  // namespace

void checks::embedding(const Tensor& ids, const Tensor& table) {
  TORCH_CHECK(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, kOp,
              ": expected ids to be Long or Int, got ", ids.scalar_type());
  if (packed::is_packed(table, 2)) {
    packed::check_weight(kOp, "table", table, "[D, V]", {-1, -1}, at::empty({0}, table.options().dtype(at::kFloat)));
  } else {
    check_floating(kOp, "table", table);
    check_dim(kOp, "table", table, "[V, D]", 2);
  }
  check_same_device(kOp, ids, table);
}

namespace {

struct EmbeddingFunction : torch::autograd::Function<EmbeddingFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& ids, const Tensor& table) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({ids});
    ctx->saved_data["V"] = table.sym_size(0);
    ctx->saved_data["table"] = table;  // for who it is, not for its values, which may change
    return embedding_op().call(ids, table);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor ids = ctx->get_saved_variables()[0];
    if (const Tensor shared = accumulate::announced(ctx->saved_data["table"].toTensor()); shared.defined()) {
      backward_into_op().call(grads[0], ids, shared);
      return {Tensor(), Tensor()};
    }
    return {Tensor(), backward_op().call(grads[0], ids, ctx->saved_data["V"].toSymInt())};
  }
};

Tensor embedding_autograd(const Tensor& ids, const Tensor& table) {
  if (packed::is_packed(table, 2)) {
    packed::refuse_gradients(kOp, {table});
    at::AutoDispatchBelowADInplaceOrView guard;
    return embedding_op().call(ids, table);
  }
  return EmbeddingFunction::apply(ids, table);
}

Tensor embedding_meta(const Tensor& ids, const Tensor& table) {
  checks::embedding(ids, table);
  auto sizes = ids.sym_sizes().vec();
  if (!packed::is_packed(table, 2)) {
    sizes.push_back(table.sym_size(1));
    return at::empty_symint(sizes, table.options());
  }
  sizes.push_back(packed::depth(table));
  return at::empty_symint(sizes, table.options().dtype(packed::value_dtype(table)));
}

Tensor backward_meta(const Tensor& grad, const Tensor&, SymInt num_rows) {
  return at::empty_symint({std::move(num_rows), grad.sym_size(-1)}, grad.options());
}

void backward_into_meta(const Tensor&, const Tensor&, const Tensor&) {}

}  // namespace

Tensor embedding(const Tensor& ids, const Tensor& table) { return embedding_op().call(ids, table); }

TORCH_LIBRARY_FRAGMENT(glam, m) {
  m.def("embedding(Tensor ids, Tensor table) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("_embedding_backward(Tensor grad, Tensor ids, SymInt num_rows) -> Tensor", {at::Tag::pt2_compliant_tag});
  // Adds to the table's gradient.
  m.def("_embedding_backward_into(Tensor grad, Tensor ids, Tensor(a!) grad_table) -> ()", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("embedding", embedding_autograd);
  m.impl("_embedding_backward", refuse_double_backward());
  m.impl("_embedding_backward_into", not_differentiable());
}
TORCH_LIBRARY_IMPL(glam, ADInplaceOrView, m) { m.impl("_embedding_backward_into", bump_mutated_versions()); }
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("embedding", embedding_meta);
  m.impl("_embedding_backward", backward_meta);
  m.impl("_embedding_backward_into", backward_into_meta);
}

}  // namespace glam
