// pack_weight and unpack_weight, and what the ops ask about packed weights.
//
// pack_weight: float32 or bfloat16 [K, N] or [E, K, N] to bfloat16 (rounded to nearest even) or int8. Integers are
// symmetric per column: scale[n] = max_k |w[k, n]| / 127, value = round(w / scale), a weight then is scale * value; a
// column of zeros has the scale 0, one that is not finite the scale NaN. K must be even and N a multiple of 32.

#include "ops/packed_weight.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include "glam/ops.h"

namespace glam {

SymInt packed::depth(const Tensor& weight) {
  return weight.scalar_type() == at::kChar ? weight.sym_size(-2) - kScaleRows : weight.sym_size(-2) * 2;
}
SymInt packed::columns(const Tensor& weight) { return weight.sym_size(-3) * kStripColumns; }
SymInt packed::columns(const Tensor& weight, int64_t plain_dim) {
  return is_packed(weight, plain_dim) ? columns(weight) : weight.sym_size(-1);
}
SymInt packed::table_rows(const Tensor& table) { return is_packed(table, 2) ? columns(table) : table.sym_size(0); }

void packed::check_weight(const char* op, const char* name, const Tensor& weight, const char* letters,
                          const std::vector<SymInt>& shape, const Tensor& x) {
  check_same_device(op, weight, x);
  if (!is_packed(weight, static_cast<int64_t>(shape.size()))) {
    check_shape(op, name, weight, letters, shape);
    check_weight_dtype(op, name, weight, x);
    return;
  }
  const bool is_int8 = weight.scalar_type() == at::kChar;
  TORCH_CHECK(is_int8 || weight.scalar_type() == at::kBFloat16, op, ": expected ", name, " to be ", letters,
              ", or BFloat16 or Char as pack_weight makes it, got ", weight.scalar_type(), " ", weight.sym_sizes());
  TORCH_CHECK(x.scalar_type() != at::kDouble, op, ": expected a packed ", name,
              " with float32 or bfloat16, got Double");
  TORCH_SYM_CHECK(weight.sym_size(-1).sym_eq(is_int8 ? kStripColumns : 2 * kStripColumns), op, ": expected ", name,
                  " as pack_weight makes it, got ", weight.sym_sizes());
  TORCH_CHECK(weight.is_contiguous(), op, ": expected a packed ", name, " to be contiguous, got strides ",
              weight.sym_strides());
  auto sizes = weight.sym_sizes().slice(0, weight.dim() - 3).vec();
  sizes.insert(sizes.end(), {depth(weight), columns(weight)});
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i].maybe_as_int() == -1) continue;
    TORCH_SYM_CHECK(sizes[i].sym_eq(shape[i]), op, ": expected ", name, " to be ", letters, " ",
                    c10::SymIntArrayRef(shape), ", got one packed from ", c10::SymIntArrayRef(sizes));
  }
}

void packed::refuse_gradients(const char* op, at::TensorList tensors) {
  if (!at::GradMode::is_enabled()) return;
  for (const Tensor& tensor : tensors) {
    TORCH_CHECK(
        !tensor.defined() || !tensor.requires_grad(), op,
        ": expected no gradient to be wanted with packed weights, which are for inference, got an argument that "
        "requires one; call it under torch.no_grad()");
  }
}

packed::Shape packed::packed_shape(const Tensor& weight, at::ScalarType dtype) {
  constexpr auto op = "glam::pack_weight";
  TORCH_CHECK(weight.dim() == 2 || weight.dim() == 3, op, ": expected weight to be [K, N] or [E, K, N], got ",
              weight.sym_sizes());
  TORCH_CHECK(weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16, op,
              ": expected weight to be Float or BFloat16, got ", weight.scalar_type());
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kChar, op, ": expected dtype to be BFloat16 or Char, got ", dtype);
  const SymInt K = weight.sym_size(-2), N = weight.sym_size(-1);
  TORCH_SYM_CHECK((K % 2).sym_eq(0), op, ": expected weight to have an even K, got ", weight.sym_sizes());
  TORCH_SYM_CHECK((N % kStripColumns).sym_eq(0), op, ": expected weight to have an N that is a multiple of ",
                  kStripColumns, ", got ", weight.sym_sizes());
  auto sizes = weight.sym_sizes().slice(0, weight.dim() - 2).vec();
  if (dtype == at::kChar) {
    sizes.insert(sizes.end(), {N / kStripColumns, K + kScaleRows, kStripColumns});
  } else {
    sizes.insert(sizes.end(), {N / kStripColumns, K / 2, 2 * kStripColumns});
  }
  return {std::move(sizes), dtype};
}

packed::Shape packed::unpacked_shape(const Tensor& packed) {
  constexpr auto op = "glam::unpack_weight";
  const bool is_int8 = packed.scalar_type() == at::kChar;
  TORCH_CHECK((packed.dim() == 3 || packed.dim() == 4) && (is_int8 || packed.scalar_type() == at::kBFloat16) &&
                  packed.is_contiguous(),
              op, ": expected packed to be as pack_weight makes it, got ", packed.scalar_type(), " ",
              packed.sym_sizes());
  TORCH_SYM_CHECK(packed.sym_size(-1).sym_eq(is_int8 ? kStripColumns : 2 * kStripColumns), op,
                  ": expected packed to be as pack_weight makes it, got ", packed.scalar_type(), " ",
                  packed.sym_sizes());
  auto sizes = packed.sym_sizes().slice(0, packed.dim() - 3).vec();
  sizes.insert(sizes.end(), {depth(packed), columns(packed)});
  return {std::move(sizes), value_dtype(packed)};
}

namespace {

Tensor pack_meta(const Tensor& weight, at::ScalarType dtype) {
  const auto shape = packed::packed_shape(weight, dtype);
  return at::empty_symint(shape.sizes, weight.options().dtype(shape.dtype));
}
Tensor unpack_meta(const Tensor& packed) {
  const auto shape = packed::unpacked_shape(packed);
  return at::empty_symint(shape.sizes, packed.options().dtype(shape.dtype));
}

}  // namespace

Tensor pack_weight(const Tensor& weight, at::ScalarType dtype) {
  static const auto op = find_op<Tensor(const Tensor&, at::ScalarType)>("glam::pack_weight");
  return op.call(weight, dtype);
}
Tensor unpack_weight(const Tensor& packed) {
  static const auto op = find_op<Tensor(const Tensor&)>("glam::unpack_weight");
  return op.call(packed);
}

TORCH_LIBRARY_FRAGMENT(glam, m) {
  m.def("pack_weight(Tensor weight, ScalarType dtype) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("unpack_weight(Tensor packed) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("pack_weight", not_differentiable());
  m.impl("unpack_weight", not_differentiable());
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("pack_weight", pack_meta);
  m.impl("unpack_weight", unpack_meta);
}

}  // namespace glam
