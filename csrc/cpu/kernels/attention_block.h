// The parts of attention over one block of kQueries queries and the keys [key_begin, key_begin + num_keys) that any of
// them may attend to: scores [keys][queries], softmax across keys, and the gradients of both.
#pragma once

#include "cpu/kernels/attention.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/math.h"

namespace glam::cpu::GLAM_ISA {

// As many queries as a packed panel of the product core has columns.
template <class T>
inline constexpr int64_t kQueries = kTileColumns<T>;
static_assert(kQueries<float> <= kLinePadding, "the bias line is padded for a whole block of queries");

template <class T>
inline constexpr T infinity = static_cast<T>(__builtin_inf());

inline constexpr int64_t rounded(int64_t elements) { return (elements + 15) / 16 * 16; }

template <class T>
struct Carver {
  T* next;
  T* operator()(int64_t elements) {
    T* const part = next;
    next += rounded(elements);
    return part;
  }
};

template <class T>
struct Block {
  int64_t query;      // first row of q
  int64_t valid;      // how many queries there are; the rest of the block is empty
  int64_t position;   // of the first query
  int64_t key_begin;  // a multiple of kTileRows
  int64_t num_keys;
  int32_t segments[kQueries<T>];  // of the queries; 0 for padding and empty columns
};

template <class T>
inline Operand query_rows(const AttentionHead<T>& head, int64_t query) {
  return {.data = advance(head.q, head.type, query * head.q_stride), .type = head.type, .row_stride = head.q_stride};
}
// Outer index: key.
template <class T>
inline Operand key_rows(const AttentionHead<T>& head) {
  return {.data = head.k, .type = head.type, .row_stride = head.k_stride};
}
// Outer index: column of v.
template <class T>
inline Operand value_columns(const AttentionHead<T>& head) {
  return {.data = head.v, .type = head.type, .row_stride = head.v_stride, .rows_are_k = true};
}

template <class T>
inline Block<T> make_block(const AttentionHead<T>& head, int64_t query, int64_t end) {
  Block<T> block;
  block.query = query;
  block.valid = end - query < kQueries<T> ? end - query : kQueries<T>;
  block.position = head.query_position + query;
  const int64_t key_end = block.position + block.valid;
  block.key_begin = 0;
  if (head.segments) {
    for (int64_t i = 0; i < kQueries<T>; ++i) {
      block.segments[i] = i < block.valid ? head.segments[block.position + i] : 0;
    }
    // Keys before the block's segments are left out.
    int64_t key = 0;
    for (bool used = false; key < key_end && !used; key += !used) {
      const int32_t segment = head.segments[key];
      for (int64_t i = 0; i < kQueries<T>; ++i) used |= segment != 0 && block.segments[i] == segment;
    }
    block.key_begin = key == key_end ? key_end : key / kTileRows * kTileRows;
  }
  block.num_keys = key_end - block.key_begin;
  return block;
}

template <class T>
GLAM_INLINE T finish_logit(const AttentionHead<T>& head, T logit) {
  return head.logit_cap > T(0) ? head.logit_cap * tanh(logit / head.logit_cap) : logit;
}
// A probability below the smallest normal number is 0: a product with a subnormal costs the CPU a hundred times another.
template <class T>
GLAM_INLINE T flush(T probability) {
  constexpr T smallest = sizeof(T) == sizeof(double) ? T(2.2250738585072014e-308) : T(1.17549435e-38f);
  return probability < smallest ? T(0) : probability;
}
// 0 where nothing is attended to; a NaN stays.
template <class T>
GLAM_INLINE T inverse_of_sum(T sum) {
  return sum == T(0) ? T(0) : T(1) / sum;
}
template <class T>
GLAM_INLINE T log_of_sum(T sum, T shift) {
  return sum == T(0) ? infinity<T> : shift + log(sum);
}

// scores[key][query] = cap(<k, q> + bias), -infinity where masked.
template <class T>
inline void block_scores(const AttentionHead<T>& head, const Block<T>& block, const T* k_panels, T* q_panel,
                         T* scores) {
  constexpr int64_t Q = kQueries<T>;
  pack_strips<FullPrecision<T>, Q>(query_rows(head, block.query), 0, block.valid, head.A, q_panel);
  multiply_panels(block.num_keys, Q, head.A, k_panels + block.key_begin * head.A, q_panel, scores, Q);
  for (int64_t i = 0; i < block.num_keys; ++i) {
    const int64_t key = block.key_begin + i, ahead = key - block.position;
    T* const row = scores + i * Q;
    const T* const bias = head.line - ahead;
    for (int64_t q = 0; q < Q; ++q) row[q] += bias[q];
    if (head.logit_cap > T(0)) {
      for (int64_t q = 0; q < Q; ++q) row[q] = finish_logit(head, row[q]);
    }
    if (ahead > 0) {
      for (int64_t q = 0; q < Q; ++q) row[q] = q < ahead ? -infinity<T> : row[q];
    }
    if (head.segments) {
      const int32_t segment = head.segments[key];
      for (int64_t q = 0; q < Q; ++q) row[q] = block.segments[q] == segment && segment != 0 ? row[q] : -infinity<T>;
    }
  }
}

// scores <- probabilities, rounded to the head's type. The extra logit 0 comes first in the sum.
template <class T>
inline void softmax(const AttentionHead<T>& head, const Block<T>& block, T* scores, T* shift, T* sum) {
  constexpr int64_t Q = kQueries<T>;
  for (int64_t q = 0; q < Q; ++q) shift[q] = head.extra_logit ? T(0) : -infinity<T>;
  for (int64_t i = 0; i < block.num_keys; ++i) {
    const T* const row = scores + i * Q;
    for (int64_t q = 0; q < Q; ++q) shift[q] = row[q] > shift[q] ? row[q] : shift[q];
  }
  for (int64_t q = 0; q < Q; ++q) shift[q] = shift[q] == -infinity<T> ? T(0) : shift[q];
  for (int64_t q = 0; q < Q; ++q) sum[q] = head.extra_logit ? exp(-shift[q]) : T(0);
  for (int64_t i = 0; i < block.num_keys; ++i) {
    T* const row = scores + i * Q;
    for (int64_t q = 0; q < Q; ++q) row[q] = exp(row[q] - shift[q]);
    for (int64_t q = 0; q < Q; ++q) sum[q] += row[q];
  }
  T inverse[Q];
  for (int64_t q = 0; q < Q; ++q) inverse[q] = inverse_of_sum(sum[q]);
  for (int64_t i = 0; i < block.num_keys * Q; i += Q) {
    for (int64_t q = 0; q < Q; ++q) scores[i + q] = flush(scores[i + q] * inverse[q]);
  }
  if (head.type == Type::bf16) {
    for (int64_t i = 0; i < block.num_keys * Q; ++i) scores[i] = round_to_bf16(scores[i]);
  }
}

// scores <- probabilities as the forward rounded them; grad_scores: d loss / d probabilities becomes d loss / d (<k, q> +
// bias), which is also added to grad_line.
template <class T>
inline void score_gradients(const AttentionHead<T>& head, const Block<T>& block, const T* lse, T* scores,
                            T* grad_scores, T* grad_line) {
  constexpr int64_t Q = kQueries<T>;
  T shift[Q], delta[Q], cap_slope[Q];
  for (int64_t q = 0; q < Q; ++q) shift[q] = q < block.valid ? lse[q] : infinity<T>;
  for (int64_t q = 0; q < Q; ++q) delta[q] = T(0);
  for (int64_t i = 0; i < block.num_keys; ++i) {
    const T *const row = scores + i * Q, *const grad = grad_scores + i * Q;
    for (int64_t q = 0; q < Q; ++q) delta[q] += exp(row[q] - shift[q]) * grad[q];
  }
  for (int64_t i = 0; i < block.num_keys; ++i) {
    T *const row = scores + i * Q, *const grad = grad_scores + i * Q;
    for (int64_t q = 0; q < Q; ++q) {
      const T capped = head.logit_cap > T(0) ? row[q] / head.logit_cap : T(0);
      cap_slope[q] = T(1) - capped * capped;
    }
    for (int64_t q = 0; q < Q; ++q) row[q] = flush(exp(row[q] - shift[q]));
    // A masked score is -infinity and has no slope.
    for (int64_t q = 0; q < Q; ++q) {
      grad[q] = row[q] == T(0) ? T(0) : row[q] * (grad[q] - delta[q]) * cap_slope[q];
    }
    if (head.type == Type::bf16) {
      for (int64_t q = 0; q < Q; ++q) row[q] = round_to_bf16(row[q]);
    }
    T* const line = grad_line + (block.position - block.key_begin - i);
    for (int64_t q = 0; q < Q; ++q) line[q] += grad[q];
  }
}

// c[A][queries] = sum over the block's keys of panels[a][key] * scores[key][query]; the panels hold all `depth` keys.
template <class T>
inline void multiply_transposed(int64_t A, int64_t depth, const Block<T>& block, const T* panels, const T* scores,
                                T* c) {
  constexpr int64_t Q = kQueries<T>;
  for (int64_t a = 0; a < A; a += kTileRows) {
    const int64_t rows = A - a < kTileRows ? A - a : kTileRows;
    multiply_panels(rows, Q, block.num_keys, panels + a * depth + block.key_begin * kTileRows, scores, c + a * Q, Q);
  }
}

// out[query][a] = c[a][query]
template <class T>
inline void store_transposed(const T* c, int64_t valid, int64_t A, T* row, void* out, Type type, int64_t out_stride) {
  for (int64_t i = 0; i < valid; ++i) {
    for (int64_t a = 0; a < A; ++a) row[a] = c[a * kQueries<T> + i];
    store_values(row, A, advance(out, type, i * out_stride), type);
  }
}

// c[key][a] += sum over the block's queries, in order, of scores[key][query] * rows[query][a]; rows is packed.
template <class T>
inline void accumulate_over_queries(const Block<T>& block, int64_t A, const T* scores, const T* rows, T* strip, T* c) {
  const Operand operand{.data = scores, .type = sizeof(T) == 8 ? Type::f64 : Type::f32, .row_stride = kQueries<T>};
  const int64_t stride = padded_columns<T>(A);
  for (int64_t key = 0; key < block.num_keys; key += kTileRows) {
    const int64_t count = block.num_keys - key < kTileRows ? block.num_keys - key : kTileRows;
    pack_strips<FullPrecision<T>, kTileRows>(operand, key, key + count, block.valid, strip);
    for (int64_t a = 0; a < A; a += kTileColumns<T>) {
      multiply_tile<kTileRows>(block.valid, strip, rows + a * block.valid, c + key * stride + a, stride, false);
    }
  }
}

}  // namespace glam::cpu::GLAM_ISA
