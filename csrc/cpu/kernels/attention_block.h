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
//
// In full precision a block's rows of scores are at once the left side of a product over queries, and the right side, a
// panel [steps of the keys][kQueries], of one over keys. In bfloat16 both are made of them, a row or two at a time.

template <class Format>
inline constexpr bool kScoresInPlace = !std::is_same_v<Format, Bf16Precision>;

// The left side has its rows kQueries / kDepth elements apart.
inline void put_left_row(const float* row, int64_t i, Bf16Precision::Element* left) {
  constexpr int64_t Q = kQueries<float>, kSteps = Q / Bf16Precision::kDepth;
  if constexpr (Bf16Precision::kDepth == 2) {
    store_values(row, Q, left + i * kSteps, Type::bf16);
  } else {
    for (int64_t q = 0; q < Q; ++q) left[i * kSteps + q] = round_to_bf16(row[Bf16Precision::first_k(q)]);
  }
}
// After the last of `rows`: zeros in the rest of a tile.
inline void finish_left(int64_t rows, Bf16Precision::Element* left) {
  constexpr int64_t kSteps = kQueries<float> / Bf16Precision::kDepth;
  for (int64_t i = rows * kSteps; GLAM_AMX && i < round_up_to_tiles(rows) * kSteps; ++i) left[i] = 0;
}
// Rows `key`, an even one, and the next.
inline void put_panel_rows(const float (&rows)[2][kQueries<float>], int64_t key, Bf16Precision::Element* panel) {
  constexpr int64_t Q = kQueries<float>;
  for (int64_t step = 0; step < 2 / Bf16Precision::kDepth; ++step) {
    store_step<Q>(Bf16Precision(), rows[Bf16Precision::first_k(step)], rows[1],
                  panel + (key / Bf16Precision::kDepth + step) * Q);
  }
}
inline void finish_panel(int64_t keys, Bf16Precision::Element* panel) {
  constexpr int64_t Q = kQueries<float>, kDepth = Bf16Precision::kDepth;
  for (int64_t i = (keys + 1) / 2 * 2 / kDepth * Q; i < steps_of<Bf16Precision>(keys) * Q; ++i) panel[i] = 0;
}

// Calls make(i, out) for each row of scores, which it writes to `out`, and makes those sides of products that are not null.
template <class Format, class T, class F>
inline void make_rows(int64_t count, T* scores, typename Format::Element* left, typename Format::Element* panel,
                      F&& make) {
  constexpr int64_t Q = kQueries<T>;
  if constexpr (kScoresInPlace<Format>) {
    for (int64_t i = 0; i < count; ++i) make(i, scores + i * Q);
  } else {
    T rows[2][Q];
    for (int64_t i = 0; i < count; i += 2) {
      for (int64_t j = 0; j < 2; ++j) {
        if (i + j < count) {
          make(i + j, rows[j]);
          if (left) put_left_row(rows[j], i + j, left);
        } else {
          for (T& value : rows[j]) value = T(0);
        }
      }
      if (panel) put_panel_rows(rows, i, panel);
    }
    if (left) finish_left(count, left);
    if (panel) finish_panel(count, panel);
  }
}
template <class Format, class T>
inline const typename Format::Element* side_of(const T* scores, const typename Format::Element* made) {
  if constexpr (kScoresInPlace<Format>) {
    return scores;
  } else {
    return made;
  }
}

// out[query][a] = factor[query] * c[a][query]
template <class T>
inline void store_transposed(const T* c, int64_t queries, int64_t A, const T* factor, void* out, Type type,
                             int64_t out_stride) {
  constexpr int64_t Q = kQueries<T>;
  constexpr int lanes = VectorOf<T>::lanes;
  for (int64_t a = 0; a < A; a += lanes) {
    const int64_t part = A - a < lanes ? A - a : lanes;
    const T* rows[lanes];
    for (int64_t l = 0; l < lanes; ++l) rows[l] = c + (l < part ? a + l : a) * Q;
    T transposed[Q * lanes];
    interleave<lanes, lanes>(rows, Q, transposed);
    for (int64_t i = 0; i < queries; ++i) {
      T* const values = transposed + i * lanes;
      for (int l = 0; l < lanes; ++l) values[l] *= factor[i];
      store_values(values, part, advance(out, type, i * out_stride + a), type);
    }
  }
}

// Blocks ---------------------------------------------------------------------------------------------------------

// As wide as T: compared in vectors of as many lanes.
template <class T>
using IntegersAs = std::conditional_t<sizeof(T) == sizeof(double), int64_t, int32_t>;

template <class T>
struct Block {
  int64_t query;      // first row of q
  int64_t valid;      // how many queries there are; the rest of the block is empty
  int64_t position;   // of the first query
  int64_t key_begin;  // a multiple of kKeys
  int64_t key_end;
  IntegersAs<T> segments[kQueries<T>];  // of the queries; 0 for padding and empty columns
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
inline constexpr T smallest_normal = sizeof(T) == sizeof(double) ? T(2.2250738585072014e-308) : T(1.17549435e-38f);
template <class T>
GLAM_INLINE T flush(T probability) {
  return probability < smallest_normal<T> ? T(0) : probability;
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

// A row of scores in vectors, one after the other.
template <class T>
inline constexpr int kRowVectors = kQueries<T> / VectorOf<T>::lanes;
template <class T>
GLAM_INLINE typename VectorOf<T>::type& part_of(T* row, int v) {
  return *reinterpret_cast<typename VectorOf<T>::type*>(row + v * VectorOf<T>::lanes);
}
template <class T>
GLAM_INLINE typename VectorOf<T>::type part_of(const T* row, int v) {
  return *reinterpret_cast<const typename VectorOf<T>::type*>(row + v * VectorOf<T>::lanes);
}
template <class T>
GLAM_INLINE typename VectorOf<T>::type all_of(T value) {
  return typename VectorOf<T>::type{} + value;
}
template <class T>
GLAM_INLINE typename VectorOf<T>::type flush(typename VectorOf<T>::type probability) {
  return probability < all_of(smallest_normal<T>) ? typename VectorOf<T>::type{} : probability;
}

// Part v of a key's row of scores: <k, q> becomes cap(<k, q> + bias), -infinity where masked.
template <class T>
GLAM_INLINE typename VectorOf<T>::type finish_scores(const AttentionHead<T>& head, const Block<T>& block, int64_t key,
                                                     int v, typename VectorOf<T>::type score) {
  using Vector = typename VectorOf<T>::type;
  using Integers = typename VectorOf<IntegersAs<T>>::type;
  constexpr int lanes = VectorOf<T>::lanes;
  const int64_t ahead = key - block.position;
  score += part_of(head.line - ahead, v);
  if (head.logit_cap > T(0)) {
    for (int l = 0; l < lanes; ++l) score[l] = finish_logit(head, score[l]);
  }
  const Vector masked = all_of(-infinity<T>);
  if (ahead > 0) {
    const auto query = [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
      return Integers{kLane...} + static_cast<IntegersAs<T>>(v * lanes);
    }(std::make_integer_sequence<int, lanes>());
    score = query < static_cast<IntegersAs<T>>(ahead) ? masked : score;
  }
  if (head.segments) {
    const IntegersAs<T> segment = head.segments[key];
    score = part_of(block.segments, v) == segment && segment != 0 ? score : masked;
  }
  return score;
}

// With a cap, of part v of a row: d score / d (<k, q> + bias).
template <class T, class Vector>
GLAM_INLINE void put_slopes(const AttentionHead<T>& head, Vector score, T* slopes, int v) {
  const Vector capped = score / head.logit_cap;
  part_of(slopes, v) = T(1) - capped * capped;
}

}  // namespace glam::cpu::GLAM_ISA
