// What every op file shares: argument checks in one voice, typed access to registered ops, and the three boxed
// kernels (autocast of the leading arguments, refusal of double backward, version bump of mutated arguments).
//
// An op file registers: a schema (TORCH_LIBRARY_FRAGMENT), Autograd (a torch::autograd::Function), Meta, Autocast. It
// knows no device; the CPU and CUDA keys are filled in by csrc/cpu and csrc/cuda.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymIntArrayRef.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace glam {

using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

// As autograd saves an absent tensor, and as an op takes it.
inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// The typed handle of a registered op; `Signature` is its C++ signature. Keep the result in a function-local static.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

// Checks. `op` is the full name ("glam::combine"), `letters` the shape as the documentation writes it ("[T, K]").
// A size of -1 in `shape` admits any size. All work on symbolic shapes, so CPU and Meta share them.
void check_shape(const char* op, const char* name, const Tensor& tensor, const char* letters,
                 const std::vector<SymInt>& shape);
void check_dim(const char* op, const char* name, const Tensor& tensor, const char* letters, int64_t dim);
void check_dtype(const char* op, const char* name, const Tensor& tensor, at::ScalarType dtype);
// Whether float16 is taken on the CPU: not by the CPU's kernels, but by CUDA's where tests put them behind its key.
bool& half_on_cpu();
// float64, float32 or bfloat16 (float16 too on CUDA).
void check_floating(const char* op, const char* name, const Tensor& tensor);
// A weight: float32 or a 16-bit type, or the dtype of the activations it meets (so float64 meets float64 alone).
void check_weight_dtype(const char* op, const char* name, const Tensor& weight, const Tensor& x);
void check_same_dtype(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                      const Tensor& other);
void check_same_device(const char* op, const Tensor& tensor, const Tensor& other);

// float32 for float32 and bfloat16, float64 for float64: where sums, softmaxes and statistics are kept.
at::ScalarType accumulation_dtype(at::ScalarType dtype);

// Boxed kernels, registered as  m.impl("name", refuse_double_backward()).
// Runs the op below autograd; a gradient that later arrives at its outputs raises "<op>: double backward is not
// supported".
torch::CppFunction refuse_double_backward();
// Casts the first `count` tensor arguments to the autocast dtype, then redispatches. float64 stays as it is.
template <int count>
torch::CppFunction autocast_leading_arguments();
// Casts every floating tensor argument to float32 (float64 stays), then redispatches.
torch::CppFunction autocast_to_float32();
// ADInplaceOrView kernel for an op that declares mutated arguments: bumps their version counters.
torch::CppFunction bump_mutated_versions();
// Autograd kernel for an op that is not differentiable at all and mutates nothing it tracks (routing plans, optimiser
// steps): runs below autograd; refuses a mutated argument that requires grad while gradients are being recorded.
torch::CppFunction not_differentiable();

namespace detail {
void autocast_arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack, int count);

template <int count>
void autocast_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  autocast_arguments(op, stack, count);
}
}  // namespace detail

template <int count>
torch::CppFunction autocast_leading_arguments() {
  return torch::CppFunction::makeFromBoxedFunction<&detail::autocast_kernel<count>>();
}

}  // namespace glam
