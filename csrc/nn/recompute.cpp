#include "nn/recompute.h"

#include <ATen/autocast_mode.h>
#include <torch/torch.h>

namespace glam::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class AutocastState {
 public:
  explicit AutocastState(at::DeviceType device)
      : device_(device),
        enabled_(at::autocast::is_autocast_enabled(device)),
        cache_(at::autocast::is_autocast_cache_enabled()),
        dtype_(at::autocast::get_autocast_dtype(device)) {}
  void restore() const {
    at::autocast::set_autocast_enabled(device_, enabled_);
    at::autocast::set_autocast_cache_enabled(cache_);
    at::autocast::set_autocast_dtype(device_, dtype_);
  }
  // The cache of casted weights lives until an autocast scope ends; outside of one it would only grow.
  AutocastState without_cache() const {
    AutocastState state = *this;
    state.cache_ = false;
    return state;
  }

 private:
  at::DeviceType device_;
  bool enabled_, cache_;
  at::ScalarType dtype_;
};

class AutocastGuard {
 public:
  AutocastGuard(const AutocastState& state, at::DeviceType device) : outer_(device) { state.without_cache().restore(); }
  ~AutocastGuard() { outer_.restore(); }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  AutocastState outer_;
};

// What the second run needs besides tensors.
struct Call : torch::CustomClassHolder {
  Call(std::shared_ptr<BlockImpl> block_, bool training_, const Randomness& random_, AutocastState autocast_)
      : block(std::move(block_)), training(training_), random(random_), autocast(autocast_) {}
  std::shared_ptr<BlockImpl> block;
  bool training;
  Randomness random;
  AutocastState autocast;
};

// Every parameter of a block, in a fixed order.
std::vector<Tensor*> tensors_of(BlockImpl& block) {
  AttentionImpl& a = *block.attention;
  std::vector<Tensor*> tensors = {&block.attention_norm->scale, &a.q, &a.k, &a.v, &a.o, &a.relative_bias,
                                  &block.ffn_norm->scale};
  if (block.moe) {
    for (Tensor* tensor : {&block.moe->router, &block.moe->wi, &block.moe->wo, &block.moe->wg}) {
      if (tensor->defined()) tensors.push_back(tensor);
    }
  } else {
    tensors.insert(tensors.end(), {&block.ffn->w0, &block.ffn->w1, &block.ffn->wo});
  }
  return tensors;
}

variable_list parameters_of(BlockImpl& block) {
  variable_list list;
  for (const Tensor* tensor : tensors_of(block)) list.push_back(*tensor);
  return list;
}

template <class Holder>
Holder copy_of(const Holder& holder) {
  return holder ? Holder(std::make_shared<typename Holder::ContainedType>(*holder)) : Holder(nullptr);
}

// The same block over other tensors.
std::shared_ptr<BlockImpl> with_parameters(const BlockImpl& block, const variable_list& parameters) {
  auto copy = std::make_shared<BlockImpl>(block);
  copy->attention_norm = copy_of(block.attention_norm);
  copy->attention = copy_of(block.attention);
  copy->ffn_norm = copy_of(block.ffn_norm);
  copy->moe = copy_of(block.moe);
  copy->ffn = copy_of(block.ffn);
  const auto tensors = tensors_of(*copy);
  for (size_t i = 0; i < tensors.size(); ++i) *tensors[i] = parameters[i];
  return copy;
}

std::optional<Tensor> optional(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

variable_list as_list(const BlockOutput& out) {
  variable_list list = {out.x_BSD};
  if (out.aux.defined()) list.insert(list.end(), {out.aux, out.router_z, out.statistics});
  return list;
}

struct RecomputeFunction : torch::autograd::Function<RecomputeFunction> {
  static constexpr size_t kOtherArguments = 3;  // after x and the parameters; they get no gradient

  // The parameters come as a TensorList: torch does not look for variables in any other container.
  static variable_list forward(AutogradContext* ctx, const Tensor& x_BSD, const at::TensorList& parameters,
                               const std::optional<Tensor>& segment_ids, const std::optional<Tensor>& token_mask,
                               const c10::intrusive_ptr<Call>& call) {
    variable_list saved = {segment_ids.value_or(Tensor()), token_mask.value_or(Tensor()), x_BSD};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    ctx->set_materialize_grads(false);
    return as_list(call->block->forward(x_BSD, segment_ids, token_mask, call->training, call->random));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!torch::GradMode::is_enabled(), "glam::GLaM: double backward is not supported");
    const auto saved = ctx->get_saved_variables();
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    const variable_list inputs(saved.begin() + 2, saved.end());
    variable_list leaves, wanted;
    for (size_t i = 0; i < inputs.size(); ++i) {
      leaves.push_back(inputs[i].detach().requires_grad_(ctx->needs_input_grad(i)));
      if (ctx->needs_input_grad(i)) wanted.push_back(leaves.back());
    }
    const auto block = with_parameters(*call->block, {leaves.begin() + 1, leaves.end()});
    const torch::AutoGradMode record(true);
    const AutocastGuard autocast(call->autocast, leaves[0].device().type());
    const variable_list outputs =
        as_list(block->forward(leaves[0], optional(saved[0]), optional(saved[1]), call->training, call->random));
    variable_list reached, reached_grads;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!grads[i].defined() || !outputs[i].requires_grad()) continue;
      reached.push_back(outputs[i]);
      reached_grads.push_back(grads[i]);
    }
    variable_list result(inputs.size() + kOtherArguments);
    if (reached.empty() || wanted.empty()) return result;
    const variable_list gradients = torch::autograd::grad(reached, wanted, reached_grads, /*retain_graph=*/false,
                                                          /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0, next = 0; i < inputs.size(); ++i) {
      if (leaves[i].requires_grad()) result[i] = gradients[next++];
    }
    return result;
  }
};

}  // namespace

BlockOutput forward_with_recompute(BlockImpl& block, const Tensor& x_BSD, const std::optional<Tensor>& segment_ids,
                                   const std::optional<Tensor>& token_mask, bool training, const Randomness& random) {
  const auto owner = std::dynamic_pointer_cast<BlockImpl>(block.shared_from_this());
  const variable_list parameters = parameters_of(block);
  const variable_list out = RecomputeFunction::apply(
      x_BSD, at::TensorList(parameters), segment_ids, token_mask,
      c10::make_intrusive<Call>(owner, training, random, AutocastState(x_BSD.device().type())));
  if (out.size() == 1) return {out[0], {}, {}, {}};
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace glam::nn
