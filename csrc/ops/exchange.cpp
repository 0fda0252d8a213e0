// Rows between the ranks of an expert-parallel group: exchange_counts says how many, exchange moves them.
//
// Letters: P ranks of the group, E_local experts on each, R rows here. offsets [P * E_local + 1] are those of the plan,
// whose rows are ordered by the global expert and therefore by the rank that holds it. Splits are host integers, one per
// rank: in_splits[p] rows go to rank p, out_splits[p] come from it; empty splits mean R / P to and from each.
// The group is named, never held; an empty name is one process alone. The gradient is the same transfer backwards, and
// rows that were not sent get zeros. ordered_all_reduce is a sum over the ranks in rank order: every rank of a group gets
// the same bits, and so does every other group that adds the same numbers, whichever way the transport goes.

#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>

#include "distributed/collectives.h"
#include "glam/ops.h"
#include "ops/route.h"

namespace glam {
namespace {

constexpr auto kCounts = "glam::exchange_counts";
constexpr auto kExchange = "glam::exchange";
constexpr auto kExchangeBackward = "glam::_exchange_backward";
constexpr auto kOrderedAllReduce = "glam::ordered_all_reduce";

using CountsSignature = Tensor(const Tensor&, c10::string_view);
using ExchangeSignature = Tensor(const Tensor&, c10::SymIntArrayRef, c10::SymIntArrayRef, c10::string_view);
using ExchangeBackwardSignature = Tensor(const Tensor&, c10::SymIntArrayRef, c10::SymIntArrayRef, SymInt,
                                         c10::string_view);

const auto& exchange_op() {
  static const auto op = find_op<ExchangeSignature>(kExchange);
  return op;
}
const auto& exchange_backward_op() {
  static const auto op = find_op<ExchangeBackwardSignature>(kExchangeBackward);
  return op;
}

std::vector<int64_t> concrete(c10::SymIntArrayRef splits) { return C10_AS_INTARRAYREF_SLOW(splits).vec(); }

Tensor transfer(const Tensor& rows, const Route& route, c10::string_view group) {
  const Tensor sent = rows.narrow_symint(0, 0, sum(route.sent));
  if (group.empty()) return sent.clone(at::MemoryFormat::Contiguous);
  auto sizes = rows.sym_sizes().vec();
  sizes[0] = sum(route.received);
  const Tensor received = at::empty_symint(sizes, rows.options());
  collectives::start_all_to_all(received, sent.contiguous(), concrete(route.received), concrete(route.sent),
                                std::string(group))
      .wait();
  return received;
}

void check_rows(const char* op, const Tensor& rows) {
  TORCH_CHECK(rows.dim() >= 1, op, ": expected rows to be [R, ...], got a scalar");
}

SymInt checked_local_experts(const Tensor& offsets, int64_t P) {
  check_dtype(kCounts, "offsets", offsets, at::kInt);
  check_dim(kCounts, "offsets", offsets, "[P * E_local + 1]", 1);
  const SymInt segments = offsets.sym_size(0) - 1;
  TORCH_SYM_CHECK(segments.sym_ge(1), kCounts, ": expected offsets to be [P * E_local + 1], got [", offsets.sym_size(0),
                  "]");
  TORCH_SYM_CHECK((segments % P).sym_eq(0), kCounts, ": expected offsets to be [P * E_local + 1] with P = ", P,
                  " ranks, got [", offsets.sym_size(0), "]");
  return segments / P;
}

Tensor counts(const Tensor& offsets, c10::string_view group) {
  const int64_t P = collectives::group_size(std::string(group));
  const SymInt E_local = checked_local_experts(offsets, P);
  const SymInt segments = offsets.sym_size(0) - 1;
  const Tensor ends = offsets.narrow_symint(0, 1, segments), begins = offsets.narrow_symint(0, 0, segments);
  const Tensor sent = at::sub(ends, begins).view_symint({P, E_local});
  return at::stack({sent, transfer(sent, {Splits(P, 1), Splits(P, 1)}, group)});
}

Tensor exchange_rows(const Tensor& rows, c10::SymIntArrayRef out_splits, c10::SymIntArrayRef in_splits,
                     c10::string_view group) {
  check_rows(kExchange, rows);
  return transfer(rows, checked_route(kExchange, rows.sym_size(0), out_splits, in_splits, group), group);
}

// grad [sum(out_splits), ...] -> [num_rows, ...]: back to the senders, zeros for the rows that stayed.
Tensor exchange_backward(const Tensor& grad, c10::SymIntArrayRef out_splits, c10::SymIntArrayRef in_splits,
                         SymInt num_rows, c10::string_view group) {
  check_rows(kExchangeBackward, grad);
  const Route route = checked_route(kExchangeBackward, num_rows, out_splits, in_splits, group);
  const Tensor returned = transfer(grad, route.reversed(), group);
  const SymInt num_sent = sum(route.sent);
  if (num_sent == num_rows) return returned;
  auto sizes = grad.sym_sizes().vec();
  sizes[0] = num_rows;
  Tensor grad_rows = at::zeros_symint(sizes, grad.options());
  grad_rows.narrow_symint(0, 0, num_sent).copy_(returned);
  return grad_rows;
}

struct ExchangeFunction : torch::autograd::Function<ExchangeFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Splits& out_splits, const Splits& in_splits,
                        const std::string& group) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["out_splits"] = out_splits;
    ctx->saved_data["in_splits"] = in_splits;
    ctx->saved_data["num_rows"] = rows.sym_size(0);
    ctx->saved_data["group"] = group;
    return exchange_op().call(rows, out_splits, in_splits, group);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    Tensor grad_rows;
    if (ctx->needs_input_grad(0)) {
      auto& saved = ctx->saved_data;
      grad_rows = exchange_backward_op().call(grads[0], saved["out_splits"].toSymIntVector(),
                                              saved["in_splits"].toSymIntVector(), saved["num_rows"].toSymInt(),
                                              saved["group"].toStringRef());
    }
    return {grad_rows, Tensor(), Tensor(), Tensor()};
  }
};

Tensor exchange_autograd(const Tensor& rows, c10::SymIntArrayRef out_splits, c10::SymIntArrayRef in_splits,
                         c10::string_view group) {
  check_rows(kExchange, rows);
  return ExchangeFunction::apply(rows, out_splits.vec(), in_splits.vec(), std::string(group));
}
Tensor counts_meta(const Tensor& offsets, c10::string_view group) {
  const int64_t P = collectives::group_size(std::string(group));
  return at::empty_symint({2, P, checked_local_experts(offsets, P)}, offsets.options());
}

Tensor exchange_meta(const Tensor& rows, c10::SymIntArrayRef out_splits, c10::SymIntArrayRef in_splits,
                     c10::string_view group) {
  check_rows(kExchange, rows);
  auto sizes = rows.sym_sizes().vec();
  sizes[0] = sum(checked_route(kExchange, sizes[0], out_splits, in_splits, group).received);
  return at::empty_symint(sizes, rows.options());
}

Tensor exchange_backward_meta(const Tensor& grad, c10::SymIntArrayRef out_splits, c10::SymIntArrayRef in_splits,
                              SymInt num_rows, c10::string_view group) {
  check_rows(kExchangeBackward, grad);
  checked_route(kExchangeBackward, num_rows, out_splits, in_splits, group);
  auto sizes = grad.sym_sizes().vec();
  sizes[0] = std::move(num_rows);
  return at::empty_symint(sizes, grad.options());
}

Tensor ordered_sum_of_ranks(const Tensor& x, c10::string_view group) {
  check_floating(kOrderedAllReduce, "x", x);
  const Tensor parts = collectives::all_gather(x, std::string(group));
  Tensor sum = parts.select(0, 0).clone();
  for (int64_t rank = 1; rank < parts.size(0); ++rank) sum.add_(parts.select(0, rank));
  return sum;
}

Tensor ordered_sum_of_ranks_meta(const Tensor& x, c10::string_view) {
  check_floating(kOrderedAllReduce, "x", x);
  return at::empty_symint(x.sym_sizes(), x.options());
}

}  // namespace

SymInt sum(c10::SymIntArrayRef splits) {
  SymInt total = 0;
  for (const SymInt& split : splits) total = total + split;
  return total;
}

Route checked_route(const char* op, const SymInt& num_rows, c10::SymIntArrayRef out_splits,
                    c10::SymIntArrayRef in_splits, c10::string_view group_name, int64_t chunks) {
  const std::string group(group_name);
  const int64_t P = collectives::group_size(group), parts = chunks * P;
  if (out_splits.empty() && in_splits.empty()) {
    TORCH_SYM_CHECK((num_rows % parts).sym_eq(0), op, ": expected the number of rows to be a multiple of the ", parts,
                    " parts (", chunks, " chunks of ", P, " ranks) when splits are empty, got ", num_rows);
    const Splits equal(static_cast<size_t>(parts), num_rows / parts);
    return {.sent = equal, .received = equal};
  }
  TORCH_CHECK(static_cast<int64_t>(out_splits.size()) == parts && static_cast<int64_t>(in_splits.size()) == parts, op,
              ": expected out_splits and in_splits to have one entry for each of the ", parts, " parts (", chunks,
              " chunks of ", P, " ranks), got ", out_splits.size(), " and ", in_splits.size());
  for (const auto splits : {out_splits, in_splits}) {
    for (const SymInt& split : splits) {
      TORCH_SYM_CHECK(split.sym_ge(0), op, ": expected splits to be 0 or more, got ", split);
    }
  }
  TORCH_SYM_CHECK(sum(in_splits).sym_le(num_rows), op, ": expected in_splits to add up to at most the ", num_rows,
                  " rows, got ", sum(in_splits));
  for (auto own = static_cast<size_t>(collectives::group_rank(group)); own < in_splits.size(); own += P) {
    TORCH_SYM_CHECK(in_splits[own].sym_eq(out_splits[own]), op, ": expected out_splits[", own, "] to equal in_splits[",
                    own, "], the rows that this rank sends to itself, got ", out_splits[own], " and ", in_splits[own]);
  }
  return {.sent = in_splits.vec(), .received = out_splits.vec()};
}

Tensor exchange_counts(const Tensor& offsets, std::string_view group) {
  static const auto op = find_op<CountsSignature>(kCounts);
  return op.call(offsets, group);
}

Tensor exchange(const Tensor& rows, at::IntArrayRef out_splits, at::IntArrayRef in_splits, std::string_view group) {
  return exchange_op().call(rows, c10::fromIntArrayRefSlow(out_splits), c10::fromIntArrayRefSlow(in_splits), group);
}

Tensor ordered_all_reduce(const Tensor& x, std::string_view group) {
  static const auto op = find_op<CountsSignature>(kOrderedAllReduce);
  return op.call(x, group);
}

TORCH_LIBRARY_FRAGMENT(glam, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("ordered_all_reduce(Tensor x, str group) -> Tensor", tags);
  m.def("exchange_counts(Tensor offsets, str group) -> Tensor", tags);
  m.def("exchange(Tensor rows, SymInt[] out_splits, SymInt[] in_splits, str group) -> Tensor", tags);
  m.def(
      "_exchange_backward(Tensor grad, SymInt[] out_splits, SymInt[] in_splits, SymInt num_rows, str group) -> Tensor",
      tags);
}
// Every device: all that happens is torch's own ops and collectives.
TORCH_LIBRARY_IMPL(glam, CompositeExplicitAutograd, m) {
  m.impl("ordered_all_reduce", ordered_sum_of_ranks);
  m.impl("exchange_counts", counts);
  m.impl("exchange", exchange_rows);
  m.impl("_exchange_backward", exchange_backward);
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("ordered_all_reduce", not_differentiable());
  m.impl("exchange_counts", not_differentiable());
  m.impl("exchange", exchange_autograd);
  m.impl("_exchange_backward", refuse_double_backward());
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("ordered_all_reduce", ordered_sum_of_ranks_meta);
  m.impl("exchange_counts", counts_meta);
  m.impl("exchange", exchange_meta);
  m.impl("_exchange_backward", exchange_backward_meta);
}

}  // namespace glam
