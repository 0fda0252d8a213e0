#include "ops/common.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <sstream>

namespace glam {
namespace {

std::string shape_text(c10::SymIntArrayRef sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

// "[T, K] = [128, 2]", with * for a free size.
std::string expected_text(const char* letters, const std::vector<SymInt>& shape) {
  std::ostringstream text;
  text << letters << " = [";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i) text << ", ";
    if (shape[i].maybe_as_int() == -1) {
      text << '*';
    } else {
      text << shape[i];
    }
  }
  text << ']';
  return text.str();
}

const std::string& op_name(const c10::OperatorHandle& op) { return op.operator_name().name; }

bool any_requires_grad(const torch::jit::Stack& stack, size_t count) {
  for (size_t i = stack.size() - count; i < stack.size(); ++i) {
    if (stack[i].isTensor() && stack[i].toTensor().defined() && stack[i].toTensor().requires_grad()) return true;
  }
  return false;
}

void run_below_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

// Its outputs hang on all tensor inputs, so that a gradient on its way to any of them meets the refusal.
struct RefuseFunction : torch::autograd::Function<RefuseFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList /*inputs*/, const c10::OperatorHandle& op,
                               c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    ctx->saved_data["op"] = op_name(op);
    run_below_autograd(op, keys, stack);
    variable_list outputs;
    for (const auto& value : *stack) outputs.push_back(value.isTensor() ? value.toTensor() : Tensor());
    return outputs;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& /*grads*/) {
    TORCH_CHECK(false, ctx->saved_data["op"].toStringRef(), ": double backward is not supported");
  }
};

void refuse_double_backward_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  if (!at::GradMode::is_enabled() || !any_requires_grad(*stack, count)) {
    run_below_autograd(op, keys, stack);
    return;
  }
  torch::jit::Stack arguments = torch::jit::last(*stack, count).vec();
  torch::jit::drop(*stack, count);
  variable_list inputs;
  for (const auto& value : arguments) {
    if (value.isTensor() && value.toTensor().defined()) inputs.push_back(value.toTensor());
  }
  for (const Tensor& output : RefuseFunction::apply(at::TensorList(inputs), op, keys, &arguments))
    stack->emplace_back(output);
}

// The tensors that the call mutates, alone or in lists, each with its argument's name.
std::vector<std::pair<Tensor, std::string_view>> mutated_tensors(const c10::OperatorHandle& op,
                                                                 const torch::jit::Stack& stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack.size() - arguments.size();
  std::vector<std::pair<Tensor, std::string_view>> mutated;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = stack[first + i];
    const auto* alias = arguments[i].alias_info();
    if (!alias || !alias->isWrite()) continue;
    if (value.isTensor()) mutated.emplace_back(value.toTensor(), arguments[i].name());
    if (!value.isTensorList()) continue;
    for (const Tensor& tensor : value.toTensorVector()) mutated.emplace_back(tensor, arguments[i].name());
  }
  return mutated;
}

void not_differentiable_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  for (const auto& [tensor, name] : mutated_tensors(op, *stack)) {
    TORCH_CHECK(!at::GradMode::is_enabled() || !tensor.requires_grad(), op_name(op), ": expected ", name,
                " not to require grad, or the call to be under torch.no_grad(); it is mutated");
  }
  // Mutated arguments still pass the ADInplaceOrView key, which bumps their versions.
  at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

void bump_mutated_versions_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto mutated = mutated_tensors(op, *stack);
  run_below_autograd(op, keys, stack);
  for (const auto& [tensor, name] : mutated) tensor.unsafeGetTensorImpl()->bump_version();
}

void autocast_to_float32_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const size_t count = op.schema().arguments().size();
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    const Tensor& tensor = value.toTensor();
    value = at::autocast::cached_cast(at::kFloat, tensor, tensor.device().type());
  }
  op.callBoxed(stack);
}

}  // namespace

void detail::autocast_arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack, int count) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const size_t first = stack->size() - op.schema().arguments().size();
  for (size_t i = first; i < first + count; ++i) {
    auto& value = (*stack)[i];
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    const Tensor& tensor = value.toTensor();
    const auto device = tensor.device().type();
    value = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
  }
  op.callBoxed(stack);
}

torch::CppFunction refuse_double_backward() {
  return torch::CppFunction::makeFromBoxedFunction<&refuse_double_backward_kernel>();
}
torch::CppFunction not_differentiable() {
  return torch::CppFunction::makeFromBoxedFunction<&not_differentiable_kernel>();
}
torch::CppFunction bump_mutated_versions() {
  return torch::CppFunction::makeFromBoxedFunction<&bump_mutated_versions_kernel>();
}
torch::CppFunction autocast_to_float32() {
  return torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32_kernel>();
}

void check_shape(const char* op, const char* name, const Tensor& tensor, const char* letters,
                 const std::vector<SymInt>& shape) {
  const auto sizes = tensor.sym_sizes();
  TORCH_CHECK(sizes.size() == shape.size(), op, ": expected ", name, " to be ", expected_text(letters, shape), ", got ",
              shape_text(sizes));
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i].maybe_as_int() == -1) continue;
    TORCH_SYM_CHECK(sizes[i].sym_eq(shape[i]), op, ": expected ", name, " to be ", expected_text(letters, shape),
                    ", got ", shape_text(sizes));
  }
}

void check_dim(const char* op, const char* name, const Tensor& tensor, const char* letters, int64_t dim) {
  TORCH_CHECK(tensor.dim() == dim, op, ": expected ", name, " to be ", letters, " with ", dim, " dimensions, got ",
              shape_text(tensor.sym_sizes()));
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK(tensor.scalar_type() == dtype, op, ": expected ", name, " to be ", dtype, ", got ", tensor.scalar_type());
}

bool& half_on_cpu() {
  static bool taken = false;
  return taken;
}

namespace {
bool is_half_taken(const Tensor& tensor) { return !tensor.is_cpu() || half_on_cpu(); }
}  // namespace

void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  const bool half = dtype == at::kHalf && is_half_taken(tensor);
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble || half, op, ": expected ", name,
              " to be Double, Float or BFloat16, got ", dtype);
}

void check_weight_dtype(const char* op, const char* name, const Tensor& weight, const Tensor& x) {
  const auto dtype = weight.scalar_type();
  const bool exact = dtype == at::kFloat || dtype == at::kBFloat16 || (dtype == at::kHalf && is_half_taken(weight));
  TORCH_CHECK(dtype == x.scalar_type() || (exact && x.scalar_type() != at::kDouble), op, ": expected ", name,
              " to be Float, BFloat16 or the activations' ", x.scalar_type(), ", got ", dtype);
}

void check_same_dtype(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                      const Tensor& other) {
  TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), op, ": expected ", name, " to have the dtype of ",
              other_name, ", ", other.scalar_type(), ", got ", tensor.scalar_type());
}

void check_same_device(const char* op, const Tensor& tensor, const Tensor& other) {
  TORCH_CHECK(tensor.device() == other.device(), op, ": expected all tensors on ", other.device(), ", got ",
              tensor.device());
}

at::ScalarType accumulation_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace glam
