// The parts of attention over one block of kQueries queries and one block of keys: products on rows as they lie, scores
// [keys][queries] with bias, cap and mask, and their gradients. Everything is vectorised across queries.
#pragma once

#include <utility>

#include "cpu/kernels/attention.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/math.h"

namespace glam::cpu::GLAM_ISA {

// As many queries as a packed panel of the product core has columns.
template <class T>
inline constexpr int64_t kQueries = kTileColumns<T>;
static_assert(kQueries<float> <= kLinePadding, "the bias line is padded for a whole block of queries");

// Rows of a register tile, and keys at a time: whole tiles of them, whose scores, gradients and panels stay in the L1 and
// L2 caches. Even, for bfloat16 takes pairs.
#if defined(__AVX512F__)
inline constexpr int kMostRows = 14;
inline constexpr int64_t kKeys = 4 * kMostRows;
#elif defined(__AVX2__)
inline constexpr int kMostRows = 6;
inline constexpr int64_t kKeys = 9 * kMostRows;
#else
inline constexpr int kMostRows = 4;
inline constexpr int64_t kKeys = 14 * kMostRows;
#endif
inline constexpr int64_t round_up_to_tiles(int64_t rows) { return (rows + kMostRows - 1) / kMostRows * kMostRows; }

template <class T>
inline constexpr T infinity = static_cast<T>(__builtin_inf());

// Elements of `depth` numbers, without the padding that a tile register would want.
template <class Format>
inline constexpr int64_t steps_of(int64_t depth) {
  return std::is_same_v<Format, Bf16Precision> ? (depth + 1) / 2 * 2 / Format::kDepth : depth;
}

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

// Products -------------------------------------------------------------------------------------------------------

// Element (row, step) of A at a[row * kRowStride + step * step_stride].
template <int ROWS, int kRowStride, class Element, class Sum>
inline void multiply_rows_tile(int64_t steps, const Element* a, int64_t step_stride, const Element* panel, Sum* c,
                               int64_t c_stride, bool first) {
  using Vector = typename VectorOf<Sum>::type;
  constexpr int lanes = VectorOf<Sum>::lanes, kVectors = kTileColumns<Sum> / lanes;
  Vector sum[ROWS][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = first ? Vector{} : *reinterpret_cast<const Vector*>(c + i * c_stride + j * lanes);
    }
  }
  for (int64_t step = 0; step < steps; ++step, a += step_stride) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        const Element* const right = panel + step * kTileColumns<Sum> + j * lanes;
        accumulate(a[i * kRowStride], *reinterpret_cast<const typename VectorOf<Element>::type*>(right), sum[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) *reinterpret_cast<Vector*>(c + i * c_stride + j * lanes) = sum[i][j];
  }
}

// `rows` of such rows, 1 to kMostRows.
template <int kRowStride, class Element, class Sum>
inline void multiply_some_rows(int64_t rows, int64_t steps, const Element* a, int64_t step_stride, const Element* panel,
                               Sum* c, int64_t c_stride, bool first) {
  const auto run = [&]<int... kRows>(std::integer_sequence<int, kRows...>) {
    ((rows == kRows + 1 &&
      (multiply_rows_tile<kRows + 1, kRowStride>(steps, a, step_stride, panel, c, c_stride, first), true)) ||
     ...);
  };
  run(std::make_integer_sequence<int, kMostRows>());
}

// c[rows][the panel's columns] (+)= A B for any number of rows, in tiles of nearly one size: the chains of kernels/gemm.h.
template <int kRowStride, class Element, class Sum>
inline void multiply_rows(int64_t rows, int64_t steps, const Element* a, int64_t step_stride, const Element* panel,
                          Sum* c, int64_t c_stride, bool first) {
  const int64_t tiles = (rows + kMostRows - 1) / kMostRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = rows * tile / tiles, count = rows * (tile + 1) / tiles - row;
    multiply_some_rows<kRowStride>(count, steps, a + row * kRowStride, step_stride, panel, c + row * c_stride, c_stride,
                                   first);
  }
}

// The same for A in strips of kMostRows rows, `strip` elements apart.
template <class Element, class Sum>
inline void multiply_strips(int64_t rows, int64_t steps, const Element* a, int64_t strip, const Element* panel, Sum* c,
                            int64_t c_stride) {
  for (int64_t row = 0; row < rows; row += kMostRows, a += strip) {
    const int64_t count = rows - row < kMostRows ? rows - row : kMostRows;
    multiply_some_rows<1>(count, steps, a, kMostRows, panel, c + row * c_stride, c_stride, true);
  }
}

// out[step][width] = steps whose k are the operand's rows, columns [0, width).
template <class Format>
inline void load_columns(const Operand& operand, int64_t width, int64_t depth, typename Format::Element* out) {
  using Sum = typename Format::Sum;
  const int64_t steps = steps_of<Format>(depth);
  constexpr int64_t kChunk = kTileColumns<Sum>;
  for (int64_t step = 0; step < steps; ++step, out += width) {
    for (int64_t column = 0; column < width; column += kChunk) {
      const int64_t part = width - column < kChunk ? width - column : kChunk;
      Sum values[2][kChunk] = {};
      for (int half = 0; half < Format::kDepth; ++half) {
        const int64_t k = Format::first_k(step) + half;
        if (k < depth) load_row(operand, k, column, part, values[half]);
      }
      typename Format::Element elements[kChunk];
      store_step<kChunk>(Format(), values[0], values[1], elements);
      for (int64_t i = 0; i < part; ++i) out[column + i] = elements[i];
    }
  }
}

// Scores as the left side of a product over queries: rows, kQueries / kDepth elements apart.
template <class T>
inline const T* rows_of_scores(FullPrecision<T>, const T* scores, int64_t, T*) {
  return scores;
}
inline const Bf16Precision::Element* rows_of_scores(Bf16Precision, const float* scores, int64_t rows,
                                                    Bf16Precision::Element* out) {
  constexpr int64_t Q = kQueries<float>, kSteps = Q / Bf16Precision::kDepth;
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
