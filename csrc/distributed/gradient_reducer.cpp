#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <map>
#include <tuple>

#include "distributed/collectives.h"
#include "glam/distributed.h"

namespace glam::distributed {
namespace {

using at::Tensor;
using torch::autograd::variable_list;
using GradAccumulator = decltype(torch::autograd::impl::grad_accumulator(std::declval<const Tensor&>()));

struct Bucket {
  std::string group;
  std::vector<Tensor> parameters;
  size_t missing = 0;  // gradients that have not arrived in this pass
  Tensor flat;         // what travels when there are several
  collectives::Pending transfer;

  void send() {
    for (const Tensor& parameter : parameters) {
      Tensor& grad = parameter.mutable_grad();
      if (!grad.defined()) grad = at::zeros_like(parameter);
    }
    if (parameters.size() == 1) {
      Tensor& grad = parameters[0].mutable_grad();
      if (!grad.is_contiguous()) grad = grad.contiguous();
      transfer = collectives::start_all_reduce(grad, group);
      return;
    }
    int64_t size = 0;
    for (const Tensor& parameter : parameters) size += parameter.numel();
    flat = at::empty({size}, parameters[0].options().requires_grad(false));
    each_part([](const Tensor& part, Tensor& grad) { part.copy_(grad); });
    transfer = collectives::start_all_reduce(flat, group);
  }

  void receive() {
    transfer.wait();
    if (parameters.size() > 1) each_part([](const Tensor& part, Tensor& grad) { grad.copy_(part); });
    flat.reset();
  }

 private:
  template <class Copy>
  void each_part(Copy&& copy) {
    int64_t begin = 0;
    for (const Tensor& parameter : parameters) {
      copy(flat.narrow(0, begin, parameter.numel()).view(parameter.sizes()), parameter.mutable_grad());
      begin += parameter.numel();
    }
  }
};

}  // namespace

struct GradientReducer::State {
  std::vector<Bucket> buckets;  // in the order in which every rank sends them
  size_t next = 0;              // the first that has not been sent
  bool started = false;
  std::vector<std::pair<GradAccumulator, uintptr_t>> hooks;

  void arrived(size_t bucket) {
    if (!started) return;
    --buckets[bucket].missing;
    while (next < buckets.size() && buckets[next].missing == 0) buckets[next++].send();
  }
};

namespace {

template <class State>
struct ArrivalHook : torch::autograd::FunctionPostHook {
  ArrivalHook(std::weak_ptr<State> state_, size_t bucket_) : state(std::move(state_)), bucket(bucket_) {}
  variable_list operator()(const variable_list& outputs, const variable_list& /*inputs*/) override {
    const at::NoGradGuard no_grad;
    if (const auto alive = state.lock()) alive->arrived(bucket);
    return outputs;
  }
  std::weak_ptr<State> state;
  size_t bucket;
};

}  // namespace

GradientReducer::GradientReducer(const std::vector<ReducedParameter>& parameters, int64_t bucket_bytes)
    : state_(std::make_shared<State>()) {
  using Kind = std::tuple<std::string, at::ScalarType, at::Device>;
  const auto less = [](const Kind& a, const Kind& b) {
    return std::tuple(std::get<0>(a), std::get<1>(a), std::get<2>(a).str()) <
           std::tuple(std::get<0>(b), std::get<1>(b), std::get<2>(b).str());
  };
  std::map<Kind, std::pair<Bucket, int64_t>, decltype(less)> open(less);  // with its bytes
  for (auto item = parameters.rbegin(); item != parameters.rend(); ++item) {
    const auto& [parameter, group] = *item;
    TORCH_CHECK(parameter.is_leaf() && parameter.requires_grad(),
                "glam::GradientReducer: expected parameters to be leaves that require grad, got one that is not: ",
                parameter.scalar_type(), " ", parameter.sizes());
    if (group.empty()) continue;
    const Kind kind(group, parameter.scalar_type(), parameter.device());
    if (static_cast<int64_t>(parameter.nbytes()) >= bucket_bytes) {
      state_->buckets.push_back({.group = group, .parameters = {parameter}});
      continue;
    }
    auto& [bucket, bytes] = open[kind];
    bucket.group = group;
    bucket.parameters.push_back(parameter);
    bytes += static_cast<int64_t>(parameter.nbytes());
    if (bytes >= bucket_bytes) {
      state_->buckets.push_back(std::move(bucket));
      open.erase(kind);
    }
  }
  for (auto& [kind, bucket] : open) state_->buckets.push_back(std::move(bucket.first));
  for (size_t bucket = 0; bucket < state_->buckets.size(); ++bucket) {
    for (const Tensor& parameter : state_->buckets[bucket].parameters) {
      auto accumulator = torch::autograd::impl::grad_accumulator(parameter);
      const auto key = accumulator->add_post_hook(std::make_unique<ArrivalHook<State>>(state_, bucket));
      state_->hooks.emplace_back(std::move(accumulator), key);
    }
  }
}

GradientReducer::~GradientReducer() {
  for (const auto& [accumulator, key] : state_->hooks) accumulator->del_post_hook(key);
}

void GradientReducer::start() {
  for (Bucket& bucket : state_->buckets) bucket.missing = bucket.parameters.size();
  state_->next = 0;
  state_->started = true;
}

void GradientReducer::finish() {
  TORCH_CHECK(state_->started, "glam::GradientReducer.finish: expected a start before the backward pass, got none");
  const at::NoGradGuard no_grad;
  state_->started = false;
  while (state_->next < state_->buckets.size()) state_->buckets[state_->next++].send();
  for (Bucket& bucket : state_->buckets) bucket.receive();
}

}  // namespace glam::distributed
