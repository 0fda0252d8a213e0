// Every kernel of csrc/cuda/kernels on small inputs, without torch: kernels_program [--once] [PART OF A CASE'S NAME...]
//
// Each case runs with threads in forward, reverse and two random orders and must leave the same bits. Built with
// ThreadSanitizer or AddressSanitizer it is also searched for races and accesses out of bounds, for which one order does
// (--once). Whether the values are right is for the ops' own tests to say.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/emulator/config.h"
#include "cuda/kernels/adafactor.h"
#include "cuda/kernels/attention.h"
#include "cuda/kernels/cache.h"
#include "cuda/kernels/embedding.h"
#include "cuda/kernels/experts.h"
#include "cuda/kernels/gating.h"
#include "cuda/kernels/loss.h"
#include "cuda/kernels/model.h"
#include "cuda/kernels/norm.h"
#include "cuda/kernels/routing.h"
#include "cuda/kernels/sampling.h"

namespace glam::cuda {
namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 16;
  }
  double unit() { return static_cast<double>(next() % (1 << 24)) / (1 << 24); }  // [0, 1)
  double centred() { return 4 * unit() - 2; }

 private:
  uint64_t state_;
};

// Memory of its own for each array, so that AddressSanitizer sees its ends.
using Bytes = std::vector<unsigned char>;

Bytes unwritten(int64_t count, int64_t element) { return Bytes(static_cast<size_t>(count * element), 0xFF); }

template <class T>
T* as(Bytes& bytes) {
  return reinterpret_cast<T*>(bytes.data());
}

template <class T>
Bytes integers(uint64_t seed, int64_t count, int64_t low, int64_t high) {
  Random random(seed);
  Bytes bytes = unwritten(count, sizeof(T));
  for (int64_t i = 0; i < count; ++i)
    as<T>(bytes)[i] = static_cast<T>(low + static_cast<int64_t>(random.next() % (high - low)));
  return bytes;
}

Bytes numbers(uint64_t seed, Type type, int64_t count, bool positive = false) {
  Random random(seed);
  Bytes bytes = unwritten(count, size_of(type));
  for (int64_t i = 0; i < count; ++i) {
    const double x = positive ? random.unit() + 0.1 : random.centred();
    switch (type) {
      case Type::f16:
        as<__half>(bytes)[i] = __float2half_rn(static_cast<float>(x));
        break;
      case Type::bf16:
        as<__nv_bfloat16>(bytes)[i] = __float2bfloat16_rn(static_cast<float>(x));
        break;
      case Type::f32:
        as<float>(bytes)[i] = static_cast<float>(x);
        break;
      case Type::f64:
        as<double>(bytes)[i] = x;
        break;
    }
  }
  return bytes;
}

Type sum_type(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

// What a case leaves, one array after the other.
class Results {
 public:
  void add(const Bytes& bytes) { all_.insert(all_.end(), bytes.begin(), bytes.end()); }
  template <class... More>
  void add(const Bytes& first, const More&... more) {
    add(first);
    add(more...);
  }
  bool operator==(const Results&) const = default;

 private:
  Bytes all_;
};

using Case = std::function<Results()>;

struct Plan {
  int64_t T, K, R, E;
  Bytes ids, positions;
  Bytes row_of_choice = {}, choice_of_row = {}, offsets = {};
};

// One choice in five gets no row.
Plan tight(int64_t T, int64_t K, int64_t E) {
  Plan plan{.T = T,
            .K = K,
            .R = T * K,
            .E = E,
            .ids = integers<int32_t>(1, T * K, 0, E),
            .positions = integers<int32_t>(2, T * K, -1, 4)};
  plan.row_of_choice = plan.choice_of_row = unwritten(T * K, 4);
  plan.offsets = unwritten(E + 1, 4);
  Bytes counts = unwritten((T * K + kSortChunk - 1) / kSortChunk * E, 4);
  tight_plan(as<int32_t>(plan.ids), as<int32_t>(plan.positions), T * K, E, as<int32_t>(counts),
             as<int32_t>(plan.row_of_choice), as<int32_t>(plan.choice_of_row), as<int32_t>(plan.offsets), nullptr);
  return plan;
}

Results plans() {
  Results results;
  for (const int64_t T : {1, 40, 2600}) {
    const Plan plan = tight(T, 2, 7);
    results.add(plan.row_of_choice, plan.choice_of_row, plan.offsets);
  }
  const int64_t T = 60, E = 5, G = 3, C = 20;
  Bytes ids = integers<int32_t>(3, 2 * T, 0, E), positions = unwritten(2 * T, 4);
  for (int i = 0; i < 2 * T; ++i) as<int32_t>(positions)[i] = i % 7 == 0 ? -1 : i / 2 % (T / G);  // each slot once
  for (int i = 1; i < 2 * T; i += 2) as<int32_t>(positions)[i] = -1;
  Bytes rows = unwritten(2 * T, 4), choices = unwritten(E * G * C, 4), offsets = unwritten(E + 1, 4);
  slotted_plan(as<int32_t>(ids), as<int32_t>(positions), 2 * T, E, G, C, 2 * T / G, as<int32_t>(rows),
               as<int32_t>(choices), as<int32_t>(offsets), nullptr);
  results.add(rows, choices, offsets);
  return results;
}

Results rows(Type type, int64_t D) {
  Plan plan = tight(21, 2, 5);
  const int64_t T = plan.T, K = plan.K, R = plan.R, size = size_of(type);
  Bytes x = numbers(4, type, T * D), gates = numbers(5, sum_type(type), T * K), grad = numbers(6, type, T * D);
  Bytes moved = unwritten(R * D, size), y = unwritten(T * D, size), grad_rows = unwritten(R * D, size);
  Bytes grad_gates(gates.size(), 0);
  dispatch(x.data(), type, as<int32_t>(plan.choice_of_row), T, K, R, D, moved.data(), nullptr);
  combine(moved.data(), type, gates.data(), as<int32_t>(plan.row_of_choice), T, K, R, D, y.data(), type, nullptr);
  combine_backward(grad.data(), moved.data(), type, gates.data(), as<int32_t>(plan.choice_of_row), T, K, R, D,
                   grad_rows.data(), grad_gates.data(), nullptr);
  Results results;
  results.add(moved, y, grad_rows, grad_gates);
  return results;
}

Results gating(Type type, int64_t E, SecondChoice second) {
  const GatingProblem problem{.T = 600,
                              .E = E,
                              .G = 2,
                              .group_size = 300,
                              .capacity = 70,
                              .second = second,
                              .second_threshold = 0.5,
                              .normalize_before_capacity = E % 2 == 0};
  const int64_t T = problem.T, chunks = problem.chunks();
  Bytes logits = numbers(7, type, T * E), mask = integers<bool>(8, T, 0, 2);
  Bytes noise = numbers(9, Type::f32, second == SecondChoice::sampling ? T * E : T, true);
  Bytes p_sums = unwritten(chunks * E, 8), counts = unwritten(2 * chunks * E, 4);
  Bytes parts = unwritten(problem.G * ((E + 31) / 32), 8);
  const int64_t sum = size_of(sum_type(type));
  Bytes gates = unwritten(2 * T, sum), ids = unwritten(2 * T, 4), positions = ids, aux = unwritten(problem.G, sum);
  top2_gating(problem, logits.data(), type, as<bool>(mask), second == SecondChoice::all ? nullptr : noise.data(), false,
              {as<double>(p_sums), as<int32_t>(counts), as<int32_t>(counts) + chunks * E, as<double>(parts)},
              gates.data(), as<int32_t>(ids), as<int32_t>(positions), aux.data(), nullptr);
  Bytes grad_gates = numbers(10, sum_type(type), 2 * T), grad_aux = numbers(11, sum_type(type), problem.G);
  Bytes first_counts(static_cast<size_t>(problem.G * E * 4), 0), grad = unwritten(T * E, size_of(type));
  top2_gating_backward(problem, grad_gates.data(), grad_aux.data(), logits.data(), type, as<int32_t>(ids),
                       as<int32_t>(positions), as<int32_t>(first_counts), grad.data(), nullptr);
  Results results;
  results.add(gates, ids, positions, aux, grad);
  return results;
}

Results experts(Type type, Type weight_type, Activation activation) {
  Plan plan = tight(75, 2, 3);
  const int64_t T = plan.T, K = plan.K, R = plan.R, D = 37, F = 70, E = 3, size = size_of(type);
  const bool geglu = activation == Activation::geglu;
  const ExpertProblem problem{.R = R,
                              .D = D,
                              .F = F,
                              .E = E,
                              .S = E,
                              .offsets = as<int32_t>(plan.offsets),
                              .activation = activation,
                              .type = type,
                              .weight_type = weight_type};
  Bytes x = numbers(12, type, T * D), dy = numbers(13, type, T * D), gates = numbers(14, sum_type(type), T * K);
  Bytes wi = numbers(15, weight_type, E * D * F), wg = numbers(16, weight_type, E * D * F);
  Bytes wo = numbers(17, weight_type, E * F * D);
  const auto gathered = [&](Bytes& tokens) {
    return RowSource{
        .data = tokens.data(), .choice_of_row = as<int32_t>(plan.choice_of_row), .num_choices = K, .num_tokens = T};
  };
  const int64_t sum = size_of(sum_type(type));
  Bytes pre = unwritten(R * F, size), pre_gate = pre, grad_pre = pre, grad_pre_gate = pre;
  Bytes out = unwritten(R * D, sum), grad_rows = out, parts = unwritten(R * gate_parts(F), sum);
  Bytes grad_gates = unwritten(T * K, sum);
  Bytes grad_wi = unwritten(E * D * F, size_of(weight_type)), grad_wg = grad_wi, grad_wo = grad_wi;
  expert_up(problem, gathered(x), wi.data(), geglu ? wg.data() : nullptr, pre.data(), pre_gate.data(), nullptr);
  expert_down(problem, pre.data(), pre_gate.data(), wo.data(), out.data(), true, nullptr);
  expert_backward_hidden(problem, gathered(dy), pre.data(), pre_gate.data(), wo.data(), gates.data(), grad_pre.data(),
                         grad_pre_gate.data(), parts.data(), nullptr);
  gate_gradients(problem, as<int32_t>(plan.row_of_choice), T * K, parts.data(), grad_gates.data(), nullptr);
  expert_backward_rows(problem, grad_pre.data(), grad_pre_gate.data(), wi.data(), geglu ? wg.data() : nullptr,
                       grad_rows.data(), true, nullptr);
  expert_backward_weights(problem, gathered(dy), gathered(x), pre.data(), pre_gate.data(), grad_pre.data(),
                          grad_pre_gate.data(), gates.data(), false, grad_wi.data(), grad_wo.data(), grad_wg.data(),
                          nullptr);
  Results results;
  results.add(pre, out, grad_pre, grad_gates, grad_rows, grad_wi, grad_wo);
  if (geglu) results.add(pre_gate, grad_pre_gate, grad_wg);
  return results;
}

Results norm(Type type, int64_t T, int64_t D) {
  Bytes x = numbers(18, type, T * D), grad = numbers(19, type, T * D), scale = numbers(20, sum_type(type), D);
  const int64_t sum = size_of(sum_type(type));
  Bytes y = unwritten(T * D, size_of(type)), grad_x = y, grad_scale = unwritten(D, sum);
  Bytes partial = unwritten(rms_norm_blocks(T) * D, sum);
  rms_norm(x.data(), type, scale.data(), 1e-6, T, D, y.data(), nullptr);
  rms_norm_backward(grad.data(), x.data(), type, scale.data(), 1e-6, T, D, grad_x.data(), partial.data(),
                    grad_scale.data(), nullptr);
  Results results;
  results.add(y, grad_x, grad_scale);
  return results;
}

Results embeddings(Type type, int64_t D) {
  const int64_t T = 300, V = 9;
  Bytes table = numbers(21, type, V * D), grad = numbers(22, type, T * D), grad_table(table.size(), 0);
  Bytes ids = integers<int64_t>(23, T, -1, V), sorted = ids, order = unwritten(T, 8);
  for (int64_t i = 0; i < T; ++i) as<int64_t>(order)[i] = i;
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (int64_t i = 0; i < T; ++i)
    pairs.emplace_back(as<int64_t>(ids)[i] % 3 ? 4 : as<int64_t>(ids)[i], i);  // one often
  std::sort(pairs.begin(), pairs.end());
  for (int64_t i = 0; i < T; ++i) std::tie(as<int64_t>(sorted)[i], as<int64_t>(order)[i]) = pairs[i];
  Bytes y = unwritten(T * D, size_of(type)), partial = unwritten(embedding_partial_size(T, D), size_of(sum_type(type)));
  embedding(as<int64_t>(ids), table.data(), type, T, V, D, y.data(), nullptr);
  for (const bool add : {false, true}) {
    embedding_backward(grad.data(), type, as<int64_t>(sorted), as<int64_t>(order), T, V, D, partial.data(), add,
                       grad_table.data(), nullptr);
  }
  Results results;
  results.add(y, grad_table);
  return results;
}

// Two factored parameters, whose rows are vectors and are not, one that is not factored, and one without elements; often
// enough for two launches.
Results adafactor(Type type) {
  struct Shape {
    bool factored;
    int64_t N, R, C;
  };
  std::vector<Shape> shapes = {{true, 2, 70, 152}, {false, 1, 1, 3001}, {true, 3, 2, 0}, {true, 1, 33, 9}};
  shapes.resize(70, {true, 1, 3, 4});
  std::vector<AdafactorParameter> parameters;
  std::vector<Bytes> weights, grads, row_vars, col_vars;
  std::vector<int64_t> num_matrices;
  const auto P = static_cast<int64_t>(shapes.size()), size = size_of(type);
  int64_t rows = 0, columns = 0, matrices = 0;
  for (const auto& [factored, N, R, C] : shapes) {
    const uint64_t seed = 24 + 4 * weights.size();
    weights.push_back(numbers(seed, type, N * R * C));
    grads.push_back(numbers(seed + 1, type, N * R * C));
    row_vars.push_back(numbers(seed + 2, type, factored ? N * R : C, true));
    col_vars.push_back(numbers(seed + 3, type, factored ? N * C : 0, true));
    num_matrices.push_back(N);
    parameters.push_back({factored, N, R, C, R, C, N * R * C, rows, columns, matrices, grads.back().data(),
                          weights.back().data(), row_vars.back().data(), col_vars.back().data()});
    rows += factored ? N * R : 0;
    columns += factored ? N * C : 0;
    matrices += N;
  }
  Bytes row_sums(rows * size, 0), col_sums(columns * size, 0), weight_squares = unwritten(P, 8);
  Bytes step = integers<int64_t>(29, 1, 3, 4), skip(1, 0), lr = numbers(30, Type::f64, 1, true);
  Bytes row_means = unwritten(matrices, 8), scaled = row_means, update_squares = unwritten(P, 8);
  Bytes first = unwritten(adafactor_sums_partial_bytes(parameters, type), 1);
  adafactor_sums(parameters, type, first.data(), row_sums.data(), col_sums.data(), as<double>(weight_squares), nullptr);
  const AdafactorDecay decay{as<int64_t>(step), as<bool>(skip), -0.8, 1e-30};
  Bytes second = unwritten(adafactor_stats_partial_bytes(parameters, type), 1);
  adafactor_stats(parameters, type, row_sums.data(), col_sums.data(), decay, second.data(), as<double>(row_means),
                  as<double>(scaled), nullptr);
  adafactor_update_squares(as<double>(row_means), as<double>(scaled), num_matrices, as<double>(update_squares),
                           nullptr);
  const AdafactorUpdate update{as<double>(row_means),
                               as<double>(weight_squares),
                               as<double>(update_squares),
                               as<double>(lr),
                               as<bool>(skip),
                               1.,
                               1e-3};
  adafactor_apply(parameters, type, update, nullptr);
  Results results;
  results.add(row_sums, col_sums, weight_squares, row_means, scaled, update_squares);
  for (const auto* bytes : {&weights, &row_vars, &col_vars}) {
    for (const Bytes& array : *bytes) results.add(array);
  }
  return results;
}

Results reductions(Type type, int64_t count) {
  Bytes x = numbers(31, type, count), sum = unwritten(3, 8), nonfinite = unwritten(3, 1);
  const std::vector<Array> arrays = {{x.data(), type, count}, {x.data(), type, 0}, {x.data(), type, count / 2}};
  Bytes partial = unwritten(squared_norm_partial_bytes(arrays), 1), sums = unwritten(kSumPartials, 8);
  Bytes total = unwritten(1, size_of(type)), counts = unwritten(5 + 6, 8);
  squared_norm(arrays, partial.data(), as<double>(sum), as<bool>(nonfinite), nullptr);
  ordered_sum(x.data(), type, count, as<double>(sums), total.data(), nullptr);
  Bytes ids = integers<int32_t>(32, 2 * count, 0, 5), positions = integers<int32_t>(33, 2 * count, -3, 4);
  router_statistics(as<int32_t>(ids), as<int32_t>(positions), count, 5, as<int64_t>(counts), nullptr);
  Results results;
  results.add(sum, nonfinite, total, counts);
  return results;
}

Results sampling(Type type) {
  const int64_t B = 5, V = 300;
  Bytes index = integers<int64_t>(34, 100, 0, 1 << 30), uniform = unwritten(100, 4);
  counter_uniform(7, 8, as<int64_t>(index), 100, as<float>(uniform), nullptr);
  Bytes logits = numbers(35, type, B * V), order = unwritten(B * V, 8), largest = unwritten(B, 8), chosen = largest;
  choose_largest(logits.data(), type, as<float>(uniform), B, V, as<int64_t>(largest), nullptr);
  for (int64_t b = 0; b < B; ++b) {
    const auto sort = [&]<class T>(T) {
      T* const row = as<T>(logits) + b * V;
      std::sort(row, row + V, std::greater<>());
    };
    type == Type::f64 ? sort(double{}) : sort(float{});
    for (int64_t v = 0; v < V; ++v) as<int64_t>(order)[b * V + v] = (v * 7 + b) % V;
  }
  sample_sorted(logits.data(), type, as<int64_t>(order), as<float>(uniform), B, V, 0.7, 200, 0.9, as<int64_t>(chosen),
                nullptr);
  Results results;
  results.add(uniform, largest, chosen);
  return results;
}

Results caches(Type type) {
  const int64_t B = 5, N = 3, L = 11, columns = 9, row_bytes = L * columns * size_of(type);
  Bytes cache = numbers(36, type, B * L * columns), x = numbers(37, type, B * N * columns), out = cache;
  Bytes beams = integers<int64_t>(38, B, 0, B), workspace = unwritten(reorder_workspace_bytes(B), 1);
  Bytes positions = integers<int32_t>(39, B, -1, L - N + 1);
  reorder_cache(cache.data(), as<int64_t>(beams), B, row_bytes, workspace.data(), nullptr);
  write_cache(x.data(), type, B, N, L, columns, as<int32_t>(positions), cache.data(), nullptr);
  read_cache(cache.data(), type, B, N, L, columns, as<int32_t>(positions), out.data(), nullptr);
  Results results;
  results.add(cache, out);
  return results;
}

Results loss(Type type) {
  const int64_t rows = 13, columns = 301, stride = 304, sum = size_of(sum_type(type));
  Bytes products = numbers(40, sum_type(type), rows * stride), targets = integers<int64_t>(41, rows, 0, columns);
  Bytes weights = numbers(42, sum_type(type), rows, true), lse = unwritten(rows, sum), target_logit = lse;
  Bytes logit_sum = lse, nll = lse, total = unwritten(1, sum), partial = unwritten(loss_sum_blocks(rows), 8);
  Bytes gradient = unwritten(rows * stride, size_of(type));
  const LogitBlock block{.products = products.data(),
                         .type = type,
                         .rows = rows,
                         .columns = columns,
                         .stride = stride,
                         .first_column = 0,
                         .vocabulary = columns,
                         .targets = as<int64_t>(targets),
                         .scale = 0.5,
                         .logit_cap = 3.};
  loss_statistics(block, true, lse.data(), target_logit.data(), logit_sum.data(), nullptr);
  loss_gradient(block, lse.data(), weights.data(), 1e-3, 0.1, gradient.data(), nullptr);
  loss_sum(lse.data(), target_logit.data(), logit_sum.data(), weights.data(), sum_type(type), 1e-3, 0.1, columns, rows,
           nll.data(), as<double>(partial), total.data(), nullptr);
  Results results;
  results.add(lse, target_logit, logit_sum, nll, total);
  for (int64_t row = 0; row < rows; ++row) {  // what lies beyond the columns may hold anything
    const auto begin = gradient.begin() + row * stride * size_of(type);
    results.add(Bytes(begin, begin + columns * size_of(type)));
  }
  return results;
}

Results attention(Type type, double logit_cap) {
  const int64_t B = 2, N = 37, H = 2, sum = size_of(sum_type(type)), stride = 48;
  Bytes segments = integers<int32_t>(43, B * N, 0, 3), table = numbers(44, sum_type(type), H * 32);
  const AttentionShape shape{
      .B = B, .N = N, .L = N, .H = H, .segments = as<int32_t>(segments), .positions = nullptr, .extra_logit = true};
  const AttentionPart part{0, B, 0, H};
  Bytes lines = unwritten(H * N, sum), bias = unwritten(B * H * N * stride, size_of(type));
  Bytes scores = numbers(45, sum_type(type), B * H * N * N), grads = numbers(46, sum_type(type), B * H * N * N);
  Bytes products = scores, lse = unwritten(B * H * N, sum), factor = lse;
  attention_lines(table.data(), type, H, N, lines.data(), nullptr);
  attention_bias(shape, type, lines.data(), stride, bias.data(), nullptr);
  attention_softmax(shape, part, type, lines.data(), logit_cap, scores.data(), lse.data(), factor.data(), nullptr);
  attention_score_gradient(shape, part, type, lines.data(), logit_cap, lse.data(), products.data(), grads.data(),
                           nullptr);
  Bytes partial = unwritten(B * H * bias_gradient_chunks(N) * 32, sum), grad = unwritten(H * 32, sum);
  bias_gradient_partial(grads.data(), sum_type(type), B * H, N, N, partial.data(), nullptr);
  bias_gradient(partial.data(), sum_type(type), B, H, N, grad.data(), nullptr);
  Bytes raw = numbers(47, Type::f32, B * H * 64), factors = unwritten(B * H * N, 4), full_lse = factors;
  attention_factors(shape, as<float>(raw), 64, as<float>(full_lse), as<float>(factors), nullptr);
  Results results;
  results.add(lines, bias, scores, lse, factor, products, grads, grad, factors, full_lse);
  return results;
}

std::map<std::string, Case> cases() {
  std::map<std::string, Case> all = {{"plans", plans}};
  const std::map<std::string, Type> types = {
      {"f16", Type::f16}, {"bf16", Type::bf16}, {"f32", Type::f32}, {"f64", Type::f64}};
  for (const auto& [name, type] : types) {
    const Type t = type;
    all["rows_" + name] = [t] { return rows(t, 24); };
    all["rows_odd_" + name] = [t] { return rows(t, 35); };
    all["norm_" + name] = [t] { return norm(t, 20, 1100); };
    all["norm_odd_" + name] = [t] { return norm(t, 9, 71); };
    all["embedding_" + name] = [t] { return embeddings(t, 40); };
    all["embedding_odd_" + name] = [t] { return embeddings(t, 13); };
    all["gating_" + name] = [t] { return gating(t, 6, SecondChoice::all); };
    all["reductions_" + name] = [t] { return reductions(t, 3000); };
    all["loss_" + name] = [t] { return loss(t); };
    all["attention_" + name] = [t] { return attention(t, t == Type::f32 ? 2. : 0.); };
    all["caches_" + name] = [t] { return caches(t); };
  }
  for (const auto& [name, type] : {std::pair{"f32", Type::f32}, {"f64", Type::f64}}) {
    const Type t = type;
    all[std::string("adafactor_") + name] = [t] { return adafactor(t); };
    all[std::string("sampling_") + name] = [t] { return sampling(t); };
  }
  all["gating_random"] = [] { return gating(Type::f32, 33, SecondChoice::random); };
  all["gating_sampling"] = [] { return gating(Type::bf16, 70, SecondChoice::sampling); };
  all["experts_geglu"] = [] { return experts(Type::f32, Type::f32, Activation::geglu); };
  all["experts_relu_wide_weights"] = [] { return experts(Type::bf16, Type::f32, Activation::relu); };
  return all;
}

// In every order the same bits.
bool repeats(const Case& run) {
  auto& config = emulator::config();
  config = {.order = emulator::Order::forward};
  const Results expected = run();
  for (const emulator::Config& other :
       {emulator::Config{emulator::Order::reverse, 1}, emulator::Config{emulator::Order::random, 1},
        emulator::Config{emulator::Order::random, 2}}) {
    config = other;
    if (!(run() == expected)) return false;
  }
  return true;
}

bool runs(const Case& run) {
  emulator::config() = {.order = emulator::Order::random, .seed = 1};
  run();
  return true;
}

}  // namespace
}  // namespace glam::cuda

int main(int count, char** arguments) {
  std::vector<std::string> parts(arguments + 1, arguments + count);
  const bool once = !parts.empty() && parts.front() == "--once";
  if (once) parts.erase(parts.begin());
  bool all_pass = true;
  for (const auto& [name, run] : glam::cuda::cases()) {
    const auto has = [&name](const std::string& part) { return name.find(part) != std::string::npos; };
    if (!parts.empty() && std::none_of(parts.begin(), parts.end(), has)) continue;
    const bool passes = once ? glam::cuda::runs(run) : glam::cuda::repeats(run);
    std::printf("%s %s\n", name.c_str(), passes ? "ok" : "differs");
    std::fflush(stdout);
    all_pass &= passes;
  }
  return all_pass ? 0 : 1;
}
