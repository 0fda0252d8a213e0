#include "ops/accumulate.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <utility>

#include "glam/ops.h"

namespace glam {
namespace {

thread_local bool enabled = false;

// The last announcement of this thread. Weak: the engine alone holds the gradient.
struct Announcement {
  const at::TensorImpl* leaf = nullptr;
  int graph_task = -1;
  c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl> gradient{
      c10::intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>()};
};
thread_local Announcement last;

bool is_plain_leaf(const Tensor& leaf) {
  return leaf.is_leaf() && leaf.requires_grad() && torch::autograd::impl::hooks(leaf).empty();
}
bool fits(const Tensor& leaf, const Tensor& gradient) {
  return gradient.layout() == at::kStrided && gradient.scalar_type() == leaf.scalar_type() &&
         gradient.device() == leaf.device() && gradient.sizes() == leaf.sizes() && gradient.is_contiguous() &&
         !gradient.requires_grad();
}

}  // namespace

bool accumulate::applies() {
  const auto* const partial_graph = torch::autograd::get_current_graph_task_exec_info();  // of autograd::grad
  return enabled && !at::GradMode::is_enabled() && partial_graph && partial_graph->empty();
}

bool accumulate::can_take(const Tensor& leaf) {
  return is_plain_leaf(leaf) && leaf.grad().defined() && fits(leaf, leaf.grad());
}

Tensor accumulate::take(const Tensor& leaf) {
  Tensor& grad = leaf.mutable_grad();
  Tensor taken = grad.detach();
  grad.reset();
  return taken;
}

void accumulate::announce(const Tensor& leaf, const Tensor& gradient) {
  if (!applies() || !is_plain_leaf(leaf) || !fits(leaf, gradient)) return;
  last.leaf = leaf.unsafeGetTensorImpl();
  last.graph_task = torch::autograd::get_current_graph_task_id();
  last.gradient = c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>(gradient.getIntrusivePtr());
}

Tensor accumulate::announced(const Tensor& leaf) {
  const bool here = applies() && last.leaf == leaf.unsafeGetTensorImpl() &&
                    last.graph_task == torch::autograd::get_current_graph_task_id();
  if (!here) return {};
  const auto held = last.gradient.lock();
  if (!held) return {};
  Tensor gradient(held);
  constexpr size_t kHolders = 3;  // the engine, `held` and `gradient`
  return gradient.use_count() == kHolders ? gradient : Tensor();
}

AccumulateInPlace::AccumulateInPlace() : before_(std::exchange(enabled, true)) {}
AccumulateInPlace::~AccumulateInPlace() { enabled = before_; }

}  // namespace glam
