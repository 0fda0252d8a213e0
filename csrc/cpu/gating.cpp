// CPU kernel of top-2 gating. Letters and formulas: ops/gating.cpp.
//
// Forward, per group: (1) every token on its own, over threads: softmax, the two choices, their gates; (2) slots, which
// depend on all earlier tokens of the group, in one pass for the first and one for the second choices. The sums of p that
// aux_loss needs are taken over chunks of a fixed number of tokens and then over the chunks in order, so they are the
// same for every number of threads. Memory beside the outputs: E values per thread and per chunk.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <vector>

#include "cpu/indices.h"
#include "cpu/kernels/gating.h"
#include "ops/routing.h"

namespace glam::cpu {
namespace {

constexpr int64_t kChunk = 128;  // tokens of one partial sum; part of the result's definition, not a tuning knob
constexpr int64_t kParallelWork = 8192;  // logits that justify a thread
constexpr double kTiny = 1e-9;
constexpr double kExcluded = -0.7 * std::numeric_limits<float>::max();  // logit of the first expert when sampling

constexpr int32_t kNoSlot = -1;  // masked, or skipped by the policy
constexpr int32_t kOverCapacity = -2;
constexpr int32_t kZeroGate = -3;

// p = softmax(logits). False (and p undefined) if a logit is not finite.
template <class Scalar, class Sum>
bool softmax(const Scalar* logits_E, int64_t E, Sum* p_E) {
  constexpr Type type = sizeof(Scalar) == 8 ? Type::f64 : sizeof(Scalar) == 4 ? Type::f32 : Type::bf16;
  return gating_functions<Sum>().softmax(logits_E, type, E, p_E);
}

struct Problem {
  int64_t E;
  int64_t group_size;
  int64_t capacity;
  SecondPolicy policy;
  double second_threshold;
  bool normalize_before_capacity;
  const bool* mask_T;  // null: every token is real
};

// Gumbel-max over the logits with the first expert excluded. In double, so that the draw does not hang on rounding.
template <class Scalar>
int64_t sample_second(const Scalar* logits_E, const double* noise_E, int64_t E, int64_t first) {
  int64_t best = 0;
  double best_value = -std::numeric_limits<double>::infinity();
  for (int64_t e = 0; e < E; ++e) {
    const double gumbel = -std::log(-std::log(std::clamp(noise_E[e], 0., 1.)));
    const double value = (e == first ? kExcluded : static_cast<double>(logits_E[e])) + gumbel;
    if (value > best_value) {  // not a NaN
      best = e;
      best_value = value;
    }
  }
  return best;
}

// One token: ids, its two gates before slots are given, and positions 0 (wants a slot) or -1. Adds p to p_sum_E.
template <class Scalar, class Sum>
void choose(const Problem& problem, int64_t t, const Scalar* logits_E, const double* noise, Sum* p_E, double* p_sum_E,
            Sum* gates_2, int32_t* ids_2, int32_t* positions_2) {
  const int64_t E = problem.E;
  const bool real = !problem.mask_T || problem.mask_T[t];
  gates_2[0] = gates_2[1] = 0;
  positions_2[0] = positions_2[1] = real ? 0 : kNoSlot;
  if (!softmax(logits_E, E, p_E)) {
    TORCH_CHECK(!real || !checks::raise_on_nonfinite(),
                "glam::top2_gating: expected logits to be finite (GLAM_DEBUG_NONFINITE=1), got ",
                "a NaN or an infinity in token ", t);
    ids_2[0] = 0;
    ids_2[1] = E > 1 ? 1 : 0;
    if (real) {
      gates_2[0] = gates_2[1] = std::numeric_limits<Sum>::quiet_NaN();
      for (int64_t e = 0; e < E; ++e) p_sum_E[e] = std::numeric_limits<double>::quiet_NaN();
    }
    return;
  }
  if (real) {
    for (int64_t e = 0; e < E; ++e) p_sum_E[e] += static_cast<double>(p_E[e]);
  }
  const int64_t first = gating_functions<Sum>().first_largest(p_E, E);
  const Sum g1 = p_E[first];
  if (real) p_E[first] = 0;
  const int64_t second = problem.policy == SecondPolicy::sampling ? sample_second(logits_E, noise + t * E, E, first)
                                                                  : gating_functions<Sum>().first_largest(p_E, E);
  ids_2[0] = static_cast<int32_t>(first);
  ids_2[1] = static_cast<int32_t>(second);
  if (!real) return;
  const Sum g2 = p_E[second];
  const Sum total = g1 + g2 + static_cast<Sum>(kTiny);
  gates_2[0] = problem.normalize_before_capacity ? g1 / total : g1;
  gates_2[1] = problem.normalize_before_capacity ? g2 / total : g2;
  if (problem.policy == SecondPolicy::random) {
    const double threshold = std::max(problem.second_threshold, kTiny);
    if (!(noise[t] * threshold < static_cast<double>(g2 / total))) positions_2[1] = kNoSlot;
  }
}

// Slots of one group in token order, first choices first; first_count_E: first choices before capacity.
template <class Sum>
void assign_slots(const Problem& problem, int64_t begin, int64_t end, const Sum* gates_T2, const int32_t* ids_T2,
                  int32_t* positions_T2, int64_t* first_count_E) {
  std::vector<int32_t> used_E(problem.E, 0);
  const auto take_slot = [&](int32_t expert) {
    const bool free = problem.capacity < 0 || used_E[expert] < problem.capacity;
    return free ? used_E[expert]++ : kOverCapacity;
  };
  for (int64_t t = begin; t < end; ++t) {
    if (positions_T2[2 * t] == kNoSlot) continue;
    ++first_count_E[ids_T2[2 * t]];
    positions_T2[2 * t] = take_slot(ids_T2[2 * t]);
  }
  for (int64_t i = 2 * begin + 1; i < 2 * end; i += 2) {
    if (positions_T2[i] == kNoSlot) continue;
    const int32_t slot = take_slot(ids_T2[i]);
    positions_T2[i] = slot >= 0 && gates_T2[i] == 0 ? kZeroGate : slot;
  }
}

// Gates of choices without a row become zero; what is left is normalised now unless it was before.
template <class Sum>
void finish_gates(bool normalize, int64_t begin, int64_t end, const int32_t* positions_T2, Sum* gates_T2) {
  for (int64_t t = begin; t < end; ++t) {
    Sum* const gates_2 = gates_T2 + 2 * t;
    const bool kept[2] = {positions_T2[2 * t] >= 0, positions_T2[2 * t + 1] >= 0};
    for (int k = 0; k < 2; ++k) gates_2[k] = kept[k] ? gates_2[k] : Sum(0);
    const Sum total = gates_2[0] + gates_2[1];
    for (int k = 0; k < 2 && normalize; ++k) gates_2[k] = kept[k] ? gates_2[k] / total : Sum(0);
  }
}

template <class Scalar, class Sum>
void gate_group(const Problem& problem, int64_t group, const Scalar* logits_TE, const double* noise, Sum* gates_T2,
                int32_t* ids_T2, int32_t* positions_T2, Sum* aux_G) {
  const int64_t E = problem.E, size = problem.group_size;
  const int64_t begin = group * size, end = begin + size;
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  std::vector<double> p_sums(chunks * E, 0.);
  at::parallel_for(0, chunks, std::max<int64_t>(1, kParallelWork / (kChunk * E)), [&](int64_t first, int64_t last) {
    std::vector<Sum> p_E(E);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t stop = std::min(begin + (chunk + 1) * kChunk, end);
      for (int64_t t = begin + chunk * kChunk; t < stop; ++t) {
        choose(problem, t, logits_TE + t * E, noise, p_E.data(), p_sums.data() + chunk * E, gates_T2 + 2 * t,
               ids_T2 + 2 * t, positions_T2 + 2 * t);
      }
    }
  });
  std::vector<int64_t> first_count_E(E, 0);
  assign_slots(problem, begin, end, gates_T2, ids_T2, positions_T2, first_count_E.data());
  finish_gates(!problem.normalize_before_capacity, begin, end, positions_T2, gates_T2);

  double aux = 0;
  for (int64_t e = 0; e < E && size > 0; ++e) {
    double p_sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) p_sum += p_sums[chunk * E + e];
    aux += static_cast<double>(first_count_E[e]) / size * (p_sum / size);
  }
  aux_G[group] = static_cast<Sum>(static_cast<double>(E) * aux);
}

template <class F>
void dispatch_logits(at::ScalarType dtype, F&& f) {
  if (dtype == at::kDouble) {
    f(double{}, double{});
  } else if (dtype == at::kFloat) {
    f(float{}, float{});
  } else {
    f(at::BFloat16{}, float{});
  }
}

// Many groups: one thread each. Few: they run one after another, each over all threads.
template <class F>
void for_each_group(int64_t G, F&& f) {
  if (G < 2 * at::get_num_threads()) {
    for (int64_t g = 0; g < G; ++g) f(g);
    return;
  }
  at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) f(g);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> top2_gating(const Tensor& logits_, const OptionalTensor& token_mask,
                                                       const OptionalTensor& noise_, int64_t group_size,
                                                       int64_t capacity, c10::string_view second_policy,
                                                       double second_threshold, bool normalize_before_capacity) {
  constexpr auto kOp = "glam::top2_gating";
  checks::top2_gating(logits_, token_mask, noise_, capacity, second_policy, second_threshold);
  const int64_t T = logits_.size(0), E = logits_.size(1);
  const int64_t G = checks::num_groups(kOp, T, group_size).expect_int();
  TORCH_CHECK(T <= std::numeric_limits<int32_t>::max() / 2, kOp, ": expected T to be below 2^30, got ", T);

  const Tensor logits = logits_.contiguous();
  const Tensor mask = token_mask ? token_mask->contiguous() : Tensor();
  const Tensor noise = noise_ ? noise_->to(at::kDouble).contiguous() : Tensor();
  const auto options = logits.options().dtype(accumulation_dtype(logits.scalar_type()));
  Tensor gates = at::empty({T, 2}, options), aux = at::empty({G}, options);
  Tensor ids = at::empty({T, 2}, options.dtype(at::kInt)), positions = at::empty({T, 2}, options.dtype(at::kInt));
  const Problem problem{.E = E,
                        .group_size = group_size == -1 ? T : group_size,
                        .capacity = capacity,
                        .policy = checks::second_policy(kOp, second_policy),
                        .second_threshold = second_threshold,
                        .normalize_before_capacity = normalize_before_capacity,
                        .mask_T = mask.defined() ? mask.const_data_ptr<bool>() : nullptr};
  dispatch_logits(logits.scalar_type(), [&]<class Scalar, class Sum>(Scalar, Sum) {
    for_each_group(G, [&](int64_t group) {
      gate_group(problem, group, logits.const_data_ptr<Scalar>(),
                 noise.defined() ? noise.const_data_ptr<double>() : nullptr, gates.mutable_data_ptr<Sum>(),
                 ids.mutable_data_ptr<int32_t>(), positions.mutable_data_ptr<int32_t>(), aux.mutable_data_ptr<Sum>());
    });
  });
  return {gates, ids, positions, aux};
}

// What aux_loss contributes to dL/dp_e of every real token of a group: scale * count_E[e], the number of first choices.
template <class Sum>
struct AuxGradient {
  Sum scale = 0;
  std::vector<Sum> count_E;
};

template <class Sum>
AuxGradient<Sum> aux_gradient(int64_t E, int64_t begin, int64_t end, const int32_t* ids_T2, const int32_t* positions_T2,
                              Sum grad_aux) {
  const double size = static_cast<double>(end - begin);
  AuxGradient<Sum> gradient{.scale = grad_aux * static_cast<Sum>(E / (size * size)), .count_E = std::vector<Sum>(E, 0)};
  for (int64_t t = begin; t < end; ++t) {
    if (positions_T2[2 * t] != kNoSlot) gradient.count_E[ids_T2[2 * t]] += 1;
  }
  return gradient;
}

// Gradient of the logits of one token: dL/dz_e = p_e (dL/dp_e - sum over j of p_j dL/dp_j).
//
// Gates p_k / total with total = p_1 + p_2 + tiny: dL/dp_1 = (G_1 (p_2 + tiny) - G_2 p_2) / total^2, likewise dL/dp_2,
// and their mean is tiny (G_1 p_1 + G_2 p_2) / total^2, where G_k is the incoming gradient, 0 for a choice without a row.
// Normalised after capacity, tiny is 0 and a gate that is left alone is the constant 1. In this form, and with counts
// taken relative to the first choice's, nothing cancels when p_1 is nearly 1.
template <class Scalar, class Sum>
void backward_of_token(int64_t E, bool normalize_before_capacity, const Scalar* logits_E, const Sum* grad_gates_2,
                       const int32_t* ids_2, const int32_t* positions_2, const AuxGradient<Sum>* aux, Sum* p_E,
                       Scalar* grad_E) {
  if (positions_2[0] == kNoSlot) {  // only a masked token has no first choice
    std::fill_n(grad_E, E, Scalar(0));
    return;
  }
  if (!softmax(logits_E, E, p_E)) {
    std::fill_n(grad_E, E, static_cast<Scalar>(std::numeric_limits<Sum>::quiet_NaN()));
    return;
  }
  const int64_t first = ids_2[0], second = ids_2[1];
  Sum grad_first = 0, grad_second = 0, mean = 0;  // of the gates, with respect to p
  const bool kept_first = positions_2[0] >= 0, kept_second = positions_2[1] >= 0;
  if (grad_gates_2 && (normalize_before_capacity || (kept_first && kept_second))) {
    const Sum tiny = normalize_before_capacity ? static_cast<Sum>(kTiny) : Sum(0);
    const Sum g1 = kept_first ? grad_gates_2[0] : Sum(0), g2 = kept_second ? grad_gates_2[1] : Sum(0);
    const Sum p1 = p_E[first], p2 = second == first ? Sum(0) : p_E[second];
    const Sum total = p1 + p2 + tiny, square = total * total;
    grad_first = (g1 * (p2 + tiny) - g2 * p2) / square;
    grad_second = second == first ? Sum(0) : (g2 * (p1 + tiny) - g1 * p1) / square;
    mean = tiny * (g1 * p1 + g2 * p2) / square;
  }
  Sum mean_count = 0;
  for (int64_t e = 0; e < E && aux; ++e) mean_count += p_E[e] * (aux->count_E[e] - aux->count_E[first]);
  for (int64_t e = 0; e < E; ++e) {
    Sum grad_p = aux ? aux->scale * ((aux->count_E[e] - aux->count_E[first]) - mean_count) : Sum(0);
    if (e == first) grad_p += grad_first;
    if (e == second) grad_p += grad_second;
    grad_E[e] = static_cast<Scalar>(p_E[e] * (grad_p - mean));
  }
}

Tensor top2_gating_backward(const OptionalTensor& grad_gates_, const OptionalTensor& grad_aux_, const Tensor& logits_,
                            const Tensor& expert_ids, const Tensor& positions_, int64_t group_size,
                            bool normalize_before_capacity) {
  const int64_t T = logits_.size(0), E = logits_.size(1);
  const int64_t G = checks::num_groups("glam::_top2_gating_backward", T, group_size).expect_int();
  checks::top2_gating_backward(grad_gates_, grad_aux_, logits_, expert_ids, positions_, G);
  const int64_t size = group_size == -1 ? T : group_size;
  const Tensor logits = logits_.contiguous(), ids = expert_ids.contiguous(), positions = positions_.contiguous();
  check_indices("glam::_top2_gating_backward", "expert_ids", ids, E);
  const Tensor grad_gates = grad_gates_ ? grad_gates_->contiguous() : Tensor();
  const Tensor grad_aux = grad_aux_ ? grad_aux_->contiguous() : Tensor();
  Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  const auto* const ids_T2 = ids.const_data_ptr<int32_t>();
  const auto* const positions_T2 = positions.const_data_ptr<int32_t>();

  dispatch_logits(logits.scalar_type(), [&]<class Scalar, class Sum>(Scalar, Sum) {
    const auto* const logits_TE = logits.const_data_ptr<Scalar>();
    const auto* const grad_gates_T2 = grad_gates.defined() ? grad_gates.const_data_ptr<Sum>() : nullptr;
    auto* const grad_TE = grad_logits.mutable_data_ptr<Scalar>();
    for_each_group(G, [&](int64_t group) {
      const int64_t begin = group * size, end = begin + size;
      AuxGradient<Sum> aux;
      if (grad_aux.defined()) {
        aux = aux_gradient(E, begin, end, ids_T2, positions_T2, grad_aux.const_data_ptr<Sum>()[group]);
      }
      at::parallel_for(begin, end, std::max<int64_t>(1, kParallelWork / E), [&](int64_t first, int64_t last) {
        std::vector<Sum> p_E(E);
        for (int64_t t = first; t < last; ++t) {
          backward_of_token(E, normalize_before_capacity, logits_TE + t * E,
                            grad_gates_T2 ? grad_gates_T2 + 2 * t : nullptr, ids_T2 + 2 * t, positions_T2 + 2 * t,
                            grad_aux.defined() ? &aux : nullptr, p_E.data(), grad_TE + t * E);
        }
      });
    });
  });
  return grad_logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("top2_gating", top2_gating);
  m.impl("_top2_gating_backward", top2_gating_backward);
}

}  // namespace glam::cpu
