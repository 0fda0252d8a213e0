// The parts of attention over one block of kQueries queries and one block of keys: scores [keys][queries] with bias, cap
// and mask, and their gradients. Everything is vectorised across queries.
#pragma once

#include "cpu/kernels/attention.h"
#include "cpu/kernels/attention_products.h"
#include "cpu/kernels/math.h"

namespace glam::cpu::GLAM_ISA {

template <class T>
inline constexpr T infinity = static_cast<T>(__builtin_inf());

// Parts of the caller's scratch, each on a cache line of its own; without scratch it counts bytes.
class Carver {
 public:
  explicit Carver(char* scratch) : begin_(scratch) {}
  template <class Element>
  Element* take(int64_t elements) {
    auto* const part = reinterpret_cast<Element*>(begin_ + bytes_);
    bytes_ += (elements * static_cast<int64_t>(sizeof(Element)) + kLine - 1) / kLine * kLine;
    return part;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* begin_;
  int64_t bytes_ = 0;
};

// Scores in products ---------------------------------------------------------------------------------------------

// Scores as the left side of a product over queries: rows, kQueries / kDepth elements apart.
template <class T>
inline const T* rows_of_scores(FullPrecision<T>, const T* scores, int64_t, T*) {
  return scores;
}
inline const Bf16Precision::Element* rows_of_scores(Bf16Precision, const float* scores, int64_t rows,
                                                    Bf16Precision::Element* out) {
  constexpr int64_t Q = kQueries<float>, kSteps = Q / Bf16Precision::kDepth;
  if constexpr (GLAM_AMX) {  // whole tiles
    for (int64_t i = rows * kSteps; i < round_up_to_tiles(rows) * kSteps; ++i) out[i] = 0;
  }
  for (int64_t i = 0; i < rows; ++i) {
    if constexpr (Bf16Precision::kDepth == 2) {
      store_values(scores + i * Q, Q, out + i * kSteps, Type::bf16);
    } else {
      for (int64_t q = 0; q < Q; ++q) {
        out[i * kSteps + q] = round_to_bf16(scores[i * Q + Bf16Precision::first_k(q)]);
      }
    }
  }
  return out;
}

// Scores as the right side of a product over keys: a panel [steps of the keys][kQueries].
template <class T>
inline const T* panel_of_scores(FullPrecision<T>, const T* scores, int64_t, T*) {
  return scores;
}
inline const Bf16Precision::Element* panel_of_scores(Bf16Precision, const float* scores, int64_t keys,
                                                     Bf16Precision::Element* out) {
  constexpr int64_t Q = kQueries<float>;
  static constexpr float zeros[Q] = {};
  const auto row = [&](int64_t key) { return key < keys ? scores + key * Q : zeros; };
  for (int64_t step = 0; step < steps_of<Bf16Precision>(keys); ++step) {
    const int64_t k = Bf16Precision::first_k(step);
    store_step<Q>(Bf16Precision(), row(k), row(k + 1), out + step * Q);
  }
  return out;
}

// out[query][a] = factor[query] * c[a][query]
template <class T>
inline void store_transposed(const T* c, int64_t queries, int64_t A, const T* factor, T* row, void* out, Type type,
                             int64_t out_stride) {
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t a = 0; a < A; ++a) row[a] = factor[i] * c[a * kQueries<T> + i];
    store_values(row, A, advance(out, type, i * out_stride), type);
  }
}

// Blocks ---------------------------------------------------------------------------------------------------------

template <class T>
struct Block {
  int64_t query;      // first row of q
  int64_t valid;      // how many queries there are; the rest of the block is empty
  int64_t position;   // of the first query
  int64_t key_begin;  // a multiple of kKeys
  int64_t key_end;
  int32_t segments[kQueries<T>];  // of the queries; 0 for padding and empty columns
};

inline Operand rows_at(const void* data, Type type, int64_t stride, int64_t first, bool rows_are_k = false) {
  return {.data = advance(data, type, first * stride), .type = type, .row_stride = stride, .rows_are_k = rows_are_k};
}

template <class T>
inline Block<T> make_block(const AttentionHead<T>& head, int64_t query, int64_t end) {
  Block<T> block;
  block.query = query;
  block.valid = end - query < kQueries<T> ? end - query : kQueries<T>;
  block.position = head.query_position + query;
  block.key_end = block.position + block.valid;
  block.key_begin = 0;
  if (head.segments) {
    for (int64_t i = 0; i < kQueries<T>; ++i) {
      block.segments[i] = i < block.valid ? head.segments[block.position + i] : 0;
    }
    // Keys before the block's segments are left out.
    int64_t key = 0;
    for (bool used = false; key < block.key_end && !used; key += !used) {
      const int32_t segment = head.segments[key];
      for (int64_t i = 0; i < kQueries<T>; ++i) used |= segment != 0 && block.segments[i] == segment;
    }
    block.key_begin = key == block.key_end ? block.key_end : key / kKeys * kKeys;
  }
  return block;
}

// Calls f(first key, keys) for the block's keys in order.
template <class T, class F>
inline void for_keys(const Block<T>& block, F&& f) {
  for (int64_t key = block.key_begin; key < block.key_end; key += kKeys) {
    f(key, block.key_end - key < kKeys ? block.key_end - key : kKeys);
  }
}

// Scores -----------------------------------------------------------------------------------------------------------

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

// scores[key][query]: <k, q> becomes cap(<k, q> + bias), -infinity where masked. finish(row, i) gets each row then.
template <class T, class F>
inline void finish_scores(const AttentionHead<T>& head, const Block<T>& block, int64_t first, int64_t keys, T* scores,
                          F&& finish) {
  constexpr int64_t Q = kQueries<T>;
  for (int64_t i = 0; i < keys; ++i) {
    const int64_t key = first + i, ahead = key - block.position;
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
    finish(row, i);
  }
}

// One row of scores becomes probabilities; delta += probability * d loss / d probability. With a cap, slope receives
// d score / d (<k, q> + bias).
template <class T>
inline void reduce_scores(const AttentionHead<T>& head, const T* shift, const T* grad, T* row, T* slope, T* delta) {
  constexpr int64_t Q = kQueries<T>;
  if (head.logit_cap > T(0)) {
    for (int64_t q = 0; q < Q; ++q) {
      const T capped = row[q] / head.logit_cap;
      slope[q] = T(1) - capped * capped;
    }
  }
  for (int64_t q = 0; q < Q; ++q) row[q] = flush(exp(row[q] - shift[q]));
  for (int64_t q = 0; q < Q; ++q) delta[q] += row[q] * grad[q];
}

// d loss / d probability becomes d loss / d (<k, q> + bias), which is also added to `line`.
template <class T>
inline void differentiate_scores(const AttentionHead<T>& head, const T* delta, const T* row, const T* slope, T* grad,
                                 T* line) {
  constexpr int64_t Q = kQueries<T>;
  // What is masked has no probability and no slope.
  for (int64_t q = 0; q < Q; ++q) grad[q] = row[q] == T(0) ? T(0) : row[q] * (grad[q] - delta[q]);
  if (head.logit_cap > T(0)) {
    for (int64_t q = 0; q < Q; ++q) grad[q] = row[q] == T(0) ? T(0) : grad[q] * slope[q];
  }
  for (int64_t q = 0; q < Q; ++q) line[q] += grad[q];
}

}  // namespace glam::cpu::GLAM_ISA
