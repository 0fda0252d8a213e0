// exchange_mlp: rows go to the ranks that hold their experts, through the experts' networks, and come back.
//
//   out = exchange(expert_mlp(exchange(rows)))
//
// in one op, so that transfers and products overlap: the experts of a rank are cut into chunks, and while one chunk is
// computed, the next is on its way in and the last on its way back; in the backward pass the same. Letters: P ranks of
// the group, N chunks, E_local experts held, E_chunk = E_local / N, R rows here, Q rows received, D model dim.
//
// rows [R, D] are in order (chunk, receiving rank, expert of the chunk); received rows in order (chunk, sending rank,
// expert of the chunk), which is what offsets int32 [N * P * E_chunk + 1] says of them. Splits are host integers in
// order (chunk, rank): in_splits rows go, out_splits come; empty ones mean R / (N P) to and from each rank. Rows after
// the sent ones give zeros. A chunk has its own slice of the weights and of their gradients, which are computed while
// the rows' gradient travels. Only the received rows and their pre-activations are saved. The group's ranks must all make
// the call, with the same N.

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include <numeric>
#include <span>

#include "distributed/collectives.h"
#include "glam/ops.h"
#include "ops/checks.h"
#include "ops/experts.h"
#include "ops/route.h"

namespace glam {
namespace {

constexpr auto kOp = "glam::exchange_mlp";

using Signature = Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef, c10::SymIntArrayRef, const Tensor&,
                         const Tensor&, const OptionalTensor&, c10::string_view, c10::string_view, int64_t);
using ForwardResult = std::tuple<Tensor, std::vector<Tensor>>;
using Forward = ForwardResult(const Tensor&, const Tensor&, c10::SymIntArrayRef, c10::SymIntArrayRef, const Tensor&,
                              const Tensor&, const OptionalTensor&, c10::string_view, c10::string_view, int64_t);
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = BackwardResult(const Tensor&, at::TensorList, const Tensor&, c10::SymIntArrayRef, c10::SymIntArrayRef,
                                const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view, c10::string_view,
                                int64_t);
const auto& op() {
  static const auto handle = find_op<Signature>(kOp);
  return handle;
}
const auto& forward_op() {
  static const auto handle = find_op<Forward>("glam::_exchange_mlp_forward");
  return handle;
}
const auto& backward_op() {
  static const auto handle = find_op<Backward>("glam::_exchange_mlp_backward");
  return handle;
}

void check(const Tensor& rows, const Tensor& offsets, c10::SymIntArrayRef out_splits, c10::SymIntArrayRef in_splits,
           const Tensor& wi, const Tensor& wo, const OptionalTensor& wg, c10::string_view activation,
           c10::string_view group, int64_t chunks) {
  checks::expert_mlp(kOp, rows, offsets, wi, wo, wg, activation);
  TORCH_CHECK(chunks >= 1, kOp, ": expected chunks to be 1 or more, got ", chunks);
  const SymInt E = wi.sym_size(0), P = collectives::group_size(std::string(group));
  TORCH_SYM_CHECK((E % chunks).sym_eq(0), kOp, ": expected chunks to divide the ", E, " experts, got ", chunks);
  TORCH_SYM_CHECK(offsets.sym_size(0).sym_eq(P * E + 1), kOp, ": expected offsets to be [P * E + 1] with P = ", P,
                  " ranks and E = ", E, " experts, got [", offsets.sym_size(0), "]");
  checked_route(kOp, rows.sym_size(0), out_splits, in_splits, group, chunks);
}

// One chunk: which rows of the sent and of the received tensor, and which segments and experts.
struct Chunk {
  std::span<const int64_t> sent, received;
  int64_t first_sent, num_sent, first_received, num_received;
  int64_t first_segment, num_segments, first_expert, num_experts;

  Tensor sent_rows(const Tensor& rows) const { return rows.narrow(0, first_sent, num_sent); }
  Tensor received_rows(const Tensor& rows) const { return rows.narrow(0, first_received, num_received); }
  Tensor weight(const Tensor& weight) const { return weight.narrow(0, first_expert, num_experts); }
  OptionalTensor weight(const OptionalTensor& weight) const {
    return weight ? OptionalTensor(this->weight(*weight)) : std::nullopt;
  }
  // Counted from the chunk's first row; the experts' op refuses them where they do not begin there.
  Tensor segments(const Tensor& offsets) const {
    const Tensor own = offsets.narrow(0, first_segment, num_segments + 1);
    return first_received == 0 ? own : own - first_received;
  }
};

// The chunks of a call with concrete splits.
class Schedule {
 public:
  Schedule(const Route& route, const Tensor& wi, const std::string& group, int64_t chunks)
      : sent_(C10_AS_INTARRAYREF_SLOW(route.sent).vec()), received_(C10_AS_INTARRAYREF_SLOW(route.received).vec()) {
    const int64_t P = collectives::group_size(group), per_chunk = wi.size(0) / chunks;
    int64_t first_sent = 0, first_received = 0;
    for (int64_t n = 0; n < chunks; ++n) {
      const std::span<const int64_t> sent(sent_.data() + n * P, P), received(received_.data() + n * P, P);
      const auto total = [](std::span<const int64_t> splits) {
        return std::accumulate(splits.begin(), splits.end(), int64_t{0});
      };
      chunks_.push_back({.sent = sent,
                         .received = received,
                         .first_sent = first_sent,
                         .num_sent = total(sent),
                         .first_received = first_received,
                         .num_received = total(received),
                         .first_segment = n * P * per_chunk,
                         .num_segments = P * per_chunk,
                         .first_expert = n * per_chunk,
                         .num_experts = per_chunk});
      first_sent += chunks_.back().num_sent;
      first_received += chunks_.back().num_received;
    }
    num_sent_ = first_sent;
    num_received_ = first_received;
  }
  Schedule(const Schedule&) = delete;  // the chunks point into the splits
  Schedule& operator=(const Schedule&) = delete;
  auto begin() const { return chunks_.begin(); }
  auto end() const { return chunks_.end(); }
  int64_t num_sent() const { return num_sent_; }
  int64_t num_received() const { return num_received_; }

 private:
  std::vector<int64_t> sent_, received_;
  std::vector<Chunk> chunks_;
  int64_t num_sent_, num_received_;
};

// The pipeline of both passes. `outward` [num sent or more, D] goes to the experts' ranks and becomes `received`;
// compute(n, chunk, send) turns rows of it into rows of the same number, which `send` lets come back into a tensor shaped
// like outward; what compute does after that runs while they travel.
template <class Compute>
Tensor through_experts(const Tensor& outward, const Tensor& received, const Schedule& schedule,
                       const std::string& group, Compute&& compute) {
  const Tensor source = outward.contiguous();
  Tensor returned = at::empty(source.sizes(), source.options());
  returned.narrow(0, schedule.num_sent(), source.size(0) - schedule.num_sent()).zero_();
  std::vector<collectives::Pending> incoming, outgoing;
  for (const Chunk& chunk : schedule) {
    incoming.push_back(collectives::start_all_to_all(chunk.received_rows(received), chunk.sent_rows(source),
                                                     chunk.received, chunk.sent, group));
  }
  size_t n = 0;
  for (const Chunk& chunk : schedule) {
    incoming[n].wait();
    compute(n, chunk, [&](const Tensor& result) {
      outgoing.push_back(
          collectives::start_all_to_all(chunk.sent_rows(returned), result, chunk.sent, chunk.received, group));
    });
    ++n;
  }
  for (auto& transfer : outgoing) transfer.wait();
  return returned;
}

ForwardResult forward(const Tensor& rows, const Tensor& offsets, c10::SymIntArrayRef out_splits,
                      c10::SymIntArrayRef in_splits, const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                      c10::string_view activation, c10::string_view group_name, int64_t chunks) {
  const std::string group(group_name);
  const Schedule schedule(checked_route(kOp, rows.size(0), out_splits, in_splits, group, chunks), wi, group, chunks);
  const Tensor received = at::empty({schedule.num_received(), rows.size(1)}, rows.options());
  std::vector<Tensor> saved = {received};
  const Tensor out = through_experts(rows, received, schedule, group, [&](size_t, const Chunk& chunk, auto&& send) {
    const auto [result, pre, pre_gate] =
        experts::forward(chunk.received_rows(received), chunk.segments(offsets), chunk.weight(wi), chunk.weight(wo),
                         chunk.weight(wg), activation);
    send(result);
    saved.insert(saved.end(), {pre, pre_gate});
  });
  return {out, std::move(saved)};
}

// The gradients of the weights go where `weights` says and are returned with the others.
BackwardResult backward_into(const Tensor& grad, at::TensorList saved, const Tensor& offsets,
                             c10::SymIntArrayRef out_splits, c10::SymIntArrayRef in_splits, const Tensor& wi,
                             const Tensor& wo, const OptionalTensor& wg, c10::string_view activation,
                             c10::string_view group_name, int64_t chunks, const experts::WeightGradients& weights) {
  const std::string group(group_name);
  const Schedule schedule(checked_route(kOp, grad.size(0), out_splits, in_splits, group, chunks), wi, group, chunks);
  const Tensor& received = saved[0];
  const Tensor grad_results = at::empty(received.sizes(), received.options());
  const Tensor grad_rows =
      through_experts(grad, grad_results, schedule, group, [&](size_t n, const Chunk& chunk, auto&& send) {
        const Tensor grad_result = chunk.received_rows(grad_results), segments = chunk.segments(offsets);
        const Tensor &pre = saved[1 + 2 * n], &pre_gate = saved[2 + 2 * n];
        const auto [grad_received, grad_pre, grad_pre_gate] = experts::backward_rows(
            grad_result, segments, pre, pre_gate, chunk.weight(wi), chunk.weight(wo), chunk.weight(wg), activation);
        send(grad_received);
        experts::backward_weights(grad_result, chunk.received_rows(received), segments, pre, pre_gate, grad_pre,
                                  grad_pre_gate, activation,
                                  {chunk.weight(weights.wi), chunk.weight(weights.wo),
                                   wg ? chunk.weight(weights.wg) : weights.wg, weights.add});
      });
  return {grad_rows, weights.wi, weights.wo, weights.wg};
}
BackwardResult backward(const Tensor& grad, at::TensorList saved, const Tensor& offsets, c10::SymIntArrayRef out_splits,
                        c10::SymIntArrayRef in_splits, const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                        c10::string_view activation, c10::string_view group, int64_t chunks) {
  return backward_into(grad, saved, offsets, out_splits, in_splits, wi, wo, wg, activation, group, chunks,
                       experts::WeightGradients::empty(wi, wo, wg));
}

struct ExchangeMlpFunction : torch::autograd::Function<ExchangeMlpFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& offsets, const Splits& out_splits,
                        const Splits& in_splits, const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                        const std::string& activation, const std::string& group, int64_t chunks) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, saved] = forward_op().call(rows, offsets, out_splits, in_splits, wi, wo, wg, activation, group, chunks);
    saved.insert(saved.end(), {offsets, wi, wo, wg.value_or(Tensor())});
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["out_splits"] = out_splits;
    ctx->saved_data["in_splits"] = in_splits;
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["group"] = group;
    ctx->saved_data["chunks"] = chunks;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto tensors = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto* const inputs = tensors.data() + tensors.size() - 4;
    const at::TensorList saved(tensors.data(), tensors.size() - 4);
    const auto& [offsets, wi, wo, wg_] = std::tie(inputs[0], inputs[1], inputs[2], inputs[3]);
    const OptionalTensor wg = optional(wg_);
    const auto out_splits = data["out_splits"].toSymIntVector(), in_splits = data["in_splits"].toSymIntVector();
    const std::string &activation = data["activation"].toStringRef(), &group = data["group"].toStringRef();
    const int64_t chunks = data["chunks"].toInt();
    const auto taken = experts::WeightGradients::taken_from(wi, wo, wg);
    const auto [grad_rows, grad_wi, grad_wo, grad_wg] =
        taken ? backward_into(grads[0], saved, offsets, out_splits, in_splits, wi, wo, wg, activation, group, chunks,
                              *taken)
              : backward_op().call(grads[0], saved, offsets, out_splits, in_splits, wi, wo, wg, activation, group,
                                   chunks);
    const auto if_needed = [&](size_t index, const Tensor& gradient) {
      return ctx->needs_input_grad(index) ? gradient : Tensor();
    };
    return {if_needed(0, grad_rows), Tensor(), Tensor(), Tensor(),
            // Two arguments before these are no tensors and have no index.
            if_needed(2, grad_wi), if_needed(3, grad_wo), wg ? if_needed(4, grad_wg) : Tensor(), Tensor(), Tensor(),
            Tensor()};
  }
};

Tensor autograd(const Tensor& rows, const Tensor& offsets, c10::SymIntArrayRef out_splits,
                c10::SymIntArrayRef in_splits, const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                c10::string_view activation, c10::string_view group, int64_t chunks) {
  check(rows, offsets, out_splits, in_splits, wi, wo, wg, activation, group, chunks);
  if (group.empty() && chunks == 1) return expert_mlp(rows, offsets, wi, wo, wg, activation);
  return ExchangeMlpFunction::apply(rows, offsets, out_splits.vec(), in_splits.vec(), wi, wo, wg,
                                    std::string(activation), std::string(group), chunks);
}
Tensor below_autograd(const Tensor& rows, const Tensor& offsets, c10::SymIntArrayRef out_splits,
                      c10::SymIntArrayRef in_splits, const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                      c10::string_view activation, c10::string_view group, int64_t chunks) {
  check(rows, offsets, out_splits, in_splits, wi, wo, wg, activation, group, chunks);
  return std::get<0>(forward_op().call(rows, offsets, out_splits, in_splits, wi, wo, wg, activation, group, chunks));
}

ForwardResult forward_meta(const Tensor& rows, const Tensor&, c10::SymIntArrayRef out_splits,
                           c10::SymIntArrayRef in_splits, const Tensor& wi, const Tensor&, const OptionalTensor& wg,
                           c10::string_view, c10::string_view group_name, int64_t chunks) {
  const std::string group(group_name);
  const Route route = checked_route(kOp, rows.sym_size(0), out_splits, in_splits, group, chunks);
  const auto P = static_cast<size_t>(collectives::group_size(group));
  const auto rows_of = [&](const SymInt& count, const SymInt& width) {
    return at::empty_symint({count, width}, rows.options());
  };
  std::vector<Tensor> saved = {rows_of(sum(route.received), rows.sym_size(1))};
  for (size_t n = 0; n < static_cast<size_t>(chunks); ++n) {
    const SymInt count = sum(c10::SymIntArrayRef(route.received).slice(n * P, P));
    saved.push_back(rows_of(count, wi.sym_size(2)));
    saved.push_back(wg ? rows_of(count, wi.sym_size(2)) : at::empty_symint({0}, rows.options()));
  }
  return {at::empty_symint(rows.sym_sizes(), rows.options()), std::move(saved)};
}

BackwardResult backward_meta(const Tensor& grad, at::TensorList, const Tensor&, c10::SymIntArrayRef,
                             c10::SymIntArrayRef, const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                             c10::string_view, c10::string_view, int64_t) {
  const auto weights = experts::WeightGradients::empty(wi, wo, wg);
  return {at::empty_symint(grad.sym_sizes(), grad.options()), weights.wi, weights.wo, weights.wg};
}

}  // namespace

Tensor exchange_mlp(const Tensor& rows, const Tensor& offsets, at::IntArrayRef out_splits, at::IntArrayRef in_splits,
                    const Tensor& wi, const Tensor& wo, const OptionalTensor& wg, std::string_view activation,
                    std::string_view group, int64_t chunks) {
  return op().call(rows, offsets, c10::fromIntArrayRefSlow(out_splits), c10::fromIntArrayRefSlow(in_splits), wi, wo, wg,
                   activation, group, chunks);
}

TORCH_LIBRARY_FRAGMENT(glam, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "exchange_mlp(Tensor rows, Tensor offsets, SymInt[] out_splits, SymInt[] in_splits, Tensor wi, Tensor wo, "
      "Tensor? wg, str activation, str group, int chunks=1) -> Tensor",
      tags);
  // saved: the received rows, then pre and pre_gate (empty without wg) of each chunk.
  m.def(
      "_exchange_mlp_forward(Tensor rows, Tensor offsets, SymInt[] out_splits, SymInt[] in_splits, Tensor wi, "
      "Tensor wo, Tensor? wg, str activation, str group, int chunks) -> (Tensor out, Tensor[] saved)",
      tags);
  m.def(
      "_exchange_mlp_backward(Tensor grad, Tensor[] saved, Tensor offsets, SymInt[] out_splits, SymInt[] in_splits, "
      "Tensor wi, Tensor wo, Tensor? wg, str activation, str group, int chunks) -> "
      "(Tensor rows, Tensor wi, Tensor wo, Tensor wg)",
      tags);
}
// Every device: all that happens is the experts' ops and collectives.
TORCH_LIBRARY_IMPL(glam, CompositeExplicitAutograd, m) {
  m.impl("exchange_mlp", below_autograd);
  m.impl("_exchange_mlp_forward", forward);
  m.impl("_exchange_mlp_backward", backward);
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("exchange_mlp", autograd);
  m.impl("_exchange_mlp_forward", refuse_double_backward());
  m.impl("_exchange_mlp_backward", refuse_double_backward());
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("_exchange_mlp_forward", forward_meta);
  m.impl("_exchange_mlp_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(glam, AutocastCPU, m) { m.impl("exchange_mlp", autocast_leading_arguments<1>()); }
TORCH_LIBRARY_IMPL(glam, AutocastCUDA, m) { m.impl("exchange_mlp", autocast_leading_arguments<1>()); }

}  // namespace glam
