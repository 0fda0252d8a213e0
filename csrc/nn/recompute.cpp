#include "nn/recompute.h"

#include <torch/torch.h>

namespace glam::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What the second run needs besides tensors. The block outlives the graph's use of it as the model does.
struct Call : torch::CustomClassHolder {
  Call(std::shared_ptr<BlockImpl> block_, const Randomness& random_) : block(std::move(block_)), random(random_) {}
  std::shared_ptr<BlockImpl> block;
  Randomness random;
};

std::optional<Tensor> optional(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

variable_list as_list(const BlockOutput& out) {
  variable_list list = {out.x_BSD};
  if (out.aux.defined()) list.insert(list.end(), {out.aux, out.router_z, out.statistics});
  return list;
}

struct RecomputeFunction : torch::autograd::Function<RecomputeFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x_BSD, const variable_list&,
                               const std::optional<Tensor>& segment_ids, const std::optional<Tensor>& token_mask,
                               const c10::intrusive_ptr<Call>& call) {
    ctx->save_for_backward({x_BSD, segment_ids.value_or(Tensor()), token_mask.value_or(Tensor())});
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    ctx->set_materialize_grads(false);
    return as_list(call->block->forward(x_BSD, segment_ids, token_mask, call->random));
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    const torch::AutoGradMode record(true);
    const Tensor x_BSD = saved[0].detach().requires_grad_(true);
    const variable_list outputs =
        as_list(call->block->forward(x_BSD, optional(saved[1]), optional(saved[2]), call->random));
    variable_list reached, reached_grads;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!grads[i].defined() || !outputs[i].requires_grad()) continue;
      reached.push_back(outputs[i]);
      reached_grads.push_back(grads[i]);
    }
    variable_list inputs = {x_BSD};
    variable_list result(1 + call->block->parameters().size() + 3);
    std::vector<size_t> slots = {0};
    const auto parameters = call->block->parameters();
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (!parameters[i].requires_grad()) continue;
      inputs.push_back(parameters[i]);
      slots.push_back(1 + i);
    }
    if (reached.empty()) return result;
    const variable_list gradients = torch::autograd::grad(reached, inputs, reached_grads, /*retain_graph=*/false,
                                                          /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < slots.size(); ++i) result[slots[i]] = gradients[i];
    return result;
  }
};

}  // namespace

BlockOutput forward_with_recompute(BlockImpl& block, const Tensor& x_BSD, const std::optional<Tensor>& segment_ids,
                                   const std::optional<Tensor>& token_mask, const Randomness& random) {
  const auto owner = std::dynamic_pointer_cast<BlockImpl>(block.shared_from_this());
  const variable_list out = RecomputeFunction::apply(x_BSD, block.parameters(), segment_ids, token_mask,
                                                     c10::make_intrusive<Call>(owner, random));
  if (out.size() == 1) return {out[0], {}, {}, {}};
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace glam::nn
