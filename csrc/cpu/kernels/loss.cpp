#include "cpu/kernels/loss.h"

#include "cpu/kernels/lanes.h"
#include "cpu/kernels/math.h"
#include "cpu/kernels/vector.h"

namespace glam::cpu::GLAM_ISA {
namespace {

// values <- logits; returns them for one row of the block.
template <class T>
T* to_logits(const LogitBlock<T>& block, int64_t i) {
  T* const logits = block.values + i * block.stride;
  for (int64_t j = 0; j < block.columns; ++j) logits[j] *= block.scale;
  if (block.logit_cap > T(0)) {
    for (int64_t j = 0; j < block.columns; ++j) logits[j] = block.logit_cap * tanh(logits[j] / block.logit_cap);
  }
  return logits;
}

// The largest of scale * values; a NaN is passed over where it is not the first. Left to the compiler it goes element by
// element.
template <class T>
T largest_of(const T* values, int64_t count, T scale) {
  using Vector = typename VectorOf<T>::type;
  constexpr int lanes = VectorOf<T>::lanes;
  const auto larger = [](auto a, auto b) { return a > b ? a : b; };
  T result = scale * values[0];
  int64_t j = 0;
  if (count >= lanes) {
    Vector largest = Vector{} + result;
    for (; j + lanes <= count; j += lanes) {
      largest = larger(scale * *reinterpret_cast<const Vector*>(values + j), largest);
    }
    for (int l = 0; l < lanes; ++l) result = larger(largest[l], result);
  }
  for (; j < count; ++j) result = larger(scale * values[j], result);
  return result;
}

template <class T>
void reduce(const LogitBlock<T>& block, bool keep, T* maximum, T* exp_sum, T* logit_sum, T* target_logit) {
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t token = block.row + i;
    // Without a cap the products stay as they are, and the scale is part of the exponent.
    const bool capped = block.logit_cap > T(0);
    T* const values = capped ? to_logits(block, i) : block.values + i * block.stride;
    const T* const logits = values;
    const T scale = capped ? T(1) : block.scale;
    const T largest = largest_of(logits, block.columns, scale);

    LaneSums<T> exps, sums;
    sums.add(block.columns, [&](int64_t c) { return logits[c]; });
    const int64_t target = block.targets[token] - block.column;
    if (target >= 0 && target < block.columns) target_logit[token] = scale * logits[target];
    const T shift = -largest, cap = block.logit_cap;  // no stores to values can change these
    const auto exp_at = [&](int64_t c) { return exp(multiply_add(logits[c], scale, shift)); };
    if (keep && capped) {
      exps.add(block.columns, [&](int64_t c) {
        const T exp_c = exp_at(c), share = logits[c] / cap;
        values[c] = exp_c * (T(1) - share * share);
        return exp_c;
      });
    } else if (keep) {
      exps.add(block.columns, [&](int64_t c) { return values[c] = exp_at(c); });
    } else {
      exps.add(block.columns, exp_at);
    }
    maximum[token] = largest;
    exp_sum[token] = exps.total();
    logit_sum[token] = scale * sums.total();
  }
}

template <class T>
void differentiate(const LogitBlock<T>& block, const T* lse, const T* row_softmax, const T* row_target,
                   const T* row_uniform) {
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t token = block.row + i;
    if (row_softmax[token] == T(0) && row_target[token] == T(0) && row_uniform[token] == T(0)) {
      // Padding: nothing of it passes, not even a NaN.
      for (int64_t j = 0; j < block.columns; ++j) block.values[i * block.stride + j] = T(0);
      continue;
    }
    const bool capped = block.logit_cap > T(0);
    T* const values = capped ? to_logits(block, i) : block.values + i * block.stride;
    const T shift = lse[token], softmax = row_softmax[token], uniform = row_uniform[token];
    const int64_t target = block.targets[token] - block.column;
    const bool here = target >= 0 && target < block.columns;
    const T target_cap = here && capped ? values[target] / block.logit_cap : T(0);
    if (capped) {
      for (int64_t j = 0; j < block.columns; ++j) {
        const T share = values[j] / block.logit_cap;
        values[j] = (softmax * exp(values[j] - shift) - uniform) * (T(1) - share * share) * block.scale;
      }
    } else {
      const T scale = block.scale, factor = softmax * scale, less = -uniform * scale;
      const int64_t columns = block.columns;
      for (int64_t j = 0; j < columns; ++j) {
        values[j] = multiply_add(factor, exp(multiply_add(values[j], scale, -shift)), less);
      }
    }
    if (here) values[target] -= row_target[token] * (T(1) - target_cap * target_cap) * block.scale;
  }
}

template <class T>
void differentiate_kept(const void* kept, Type type, int64_t count, T factor, T less, T* out) {
  load_values(kept, type, count, out);
  for (int64_t i = 0; i < count; ++i) out[i] = multiply_add(factor, out[i], -less);
}

}  // namespace

extern const LossTable loss_table = {
    {&reduce<float>, &differentiate<float>, &differentiate_kept<float>},
    {&reduce<double>, &differentiate<double>, &differentiate_kept<double>},
};

}  // namespace glam::cpu::GLAM_ISA
