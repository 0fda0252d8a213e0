// Products of few rows of A, as in decoding: B is read once, where it lies, and nothing of it is packed. Reading it is all
// that takes time, so the rows come along for nothing.
//
// The chains of kernels/gemm.h, step by step in the same order: the bits are those of the same rows among many.
#pragma once

#include "cpu/kernels/stored.h"

namespace glam::cpu::GLAM_ISA {

inline constexpr int kFewRows = 8;

// Whether B can be read where it lies.
template <class Format>
inline bool can_stream(const Operand& a, const Operand& b) {
  using Sum = typename Format::Sum;
  if (a.rows_are_k || !is_plain(b) || b.row_index) return false;
  if (b.stored) return true;
  if constexpr (std::is_same_v<Format, Bf16Precision>) {
    return b.type == Type::bf16 || b.type == Type::f32;
  } else {
    return b.type == (sizeof(Sum) == 8 ? Type::f64 : Type::f32);
  }
}

// As many rows as the kernels are made for: the others are zeros.
inline int64_t padded_few(int64_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : kFewRows; }

#if !GLAM_AMX  // which has gemm_few_tiles.h

// B's rows are k: steps pass over a stretch of columns, a few at a time, with the sums in the L1 cache.
inline constexpr int64_t kStepsAtOnce = 4;  // more rows, often a power of two apart, would share a cache set
// Vectors of sums of each row of A that are kept at once: chains to fill the time that an addition takes.
template <int M>
inline constexpr int kChains = M == 1   ? 4
                               : M <= 4 ? 2
                                        : 1;

// A vector at any address. Not memcpy, which GCC takes apart.
template <class Vector>
struct Unaligned {
  Vector value;
} __attribute__((packed, may_alias));

template <class Vector>
inline Vector load_vector(const void* data) {
  return static_cast<const Unaligned<Vector>*>(data)->value;
}

// The first `count` elements of a vector, then zeros.
template <class Vector, class Value>
inline Vector load_part(const Value* data, int64_t count) {
  Vector values = {};
  std::memcpy(&values, data, static_cast<size_t>(count) * sizeof(Value));
  return values;
}

// A vector of bfloat16 numbers, as they are or rounded, in the upper halves of words: as floats.
struct Bf16Row {
  using Words __attribute__((vector_size(kVectorBytes))) = uint32_t;
  using Halves __attribute__((vector_size(kVectorBytes / 2))) = uint16_t;

  static Words upper(Halves halves) { return __builtin_convertvector(halves, Words) << 16; }
  static Words upper(Words bits) {
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    const Words quiet = (bits | 0x400000u) & 0xffff0000u;
    const Words is_nan = (Words)((bits & 0x7fffffffu) > 0x7f800000u);
    return (is_nan & quiet) | (~is_nan & rounded);
  }
  template <bool whole, class Value>
  static Words upper(const Value* row, int64_t count) {
    using Stored = std::conditional_t<std::is_same_v<Value, float>, Words, Halves>;
    return upper(whole ? load_vector<Stored>(row) : load_part<Stored>(row, count));
  }
};

// A step's elements in `count` columns, from the row of its k or, where it holds two, of the even one and the odd one
// (null beyond the depth).
template <bool whole, class Value>
inline auto step_of_rows(FullPrecision<Value>, const Value* row, const Value*, int64_t count) {
  using Vector = typename VectorOf<Value>::type;
  return whole ? load_vector<Vector>(row) : load_part<Vector>(row, count);
}
template <bool whole, class Value>
inline auto step_of_rows(Bf16Precision, const Value* row, [[maybe_unused]] const Value* odd, int64_t count) {
  using Right = typename VectorOf<Bf16Precision::Element>::type;
  if constexpr (Bf16Precision::kDepth == 2) {
    const auto even = Bf16Row::upper<whole>(row, count) >> 16;
    return (Right)(odd ? even | Bf16Row::upper<whole>(odd, count) : even);
  } else {
    return (Right)Bf16Row::upper<whole>(row, count);
  }
}

template <class Format, int M, class Value>
inline void stream_columns(const typename Format::Element* a, int64_t depth, const Value* b, int64_t b_stride,
                           int64_t columns, typename Format::Sum* c, int64_t c_stride) {
  using Sum = typename Format::Sum;
  using Vector = typename VectorOf<Sum>::type;
  constexpr int lanes = VectorOf<Sum>::lanes;
  const int64_t steps = Format::steps(depth);
  for (int i = 0; i < M; ++i) {
    for (int64_t j = 0; j < (columns + lanes - 1) / lanes * lanes; ++j) c[i * c_stride + j] = Sum(0);
  }
  for (int64_t step = 0; step < steps; step += kStepsAtOnce) {
    const int64_t part = steps - step < kStepsAtOnce ? steps - step : kStepsAtOnce;
    const Value *rows[kStepsAtOnce] = {}, *odd[kStepsAtOnce] = {};
    for (int64_t s = 0; s < part; ++s) {
      const int64_t k = Format::first_k(step + s);
      rows[s] = k < depth ? b + k * b_stride : nullptr;
      odd[s] = Format::kDepth == 2 && k + 1 < depth ? b + (k + 1) * b_stride : nullptr;
    }
    const int64_t ahead = kStepsAtOnce * Format::kDepth * b_stride;
    const auto run = [&]<bool kWhole, int kVectors>(std::bool_constant<kWhole>, std::integral_constant<int, kVectors>,
                                                    int64_t j, int64_t count) {
      Vector sum[M][kVectors];
      for (int i = 0; i < M; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          sum[i][v] = *reinterpret_cast<const Vector*>(c + i * c_stride + j + v * lanes);
        }
      }
#pragma GCC unroll 4
      for (int64_t s = 0; s < (kWhole ? kStepsAtOnce : part); ++s) {
        if (!kWhole && !rows[s]) continue;  // adds nothing
        for (int64_t byte = 0; kWhole && byte < kVectors * lanes * static_cast<int64_t>(sizeof(Value)); byte += kLine) {
          __builtin_prefetch(reinterpret_cast<const char*>(rows[s] + j + ahead) + byte);
          if (Format::kDepth == 2) __builtin_prefetch(reinterpret_cast<const char*>(odd[s] + j + ahead) + byte);
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const int64_t column = j + v * lanes;
          const auto right =
              step_of_rows<kWhole>(Format(), rows[s] + column, odd[s] ? odd[s] + column : nullptr, count);
          for (int i = 0; i < M; ++i) accumulate(a[(step + s) * M + i], right, sum[i][v]);
        }
      }
      for (int i = 0; i < M; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          *reinterpret_cast<Vector*>(c + i * c_stride + j + v * lanes) = sum[i][v];
        }
      }
    };
    using One = std::integral_constant<int, 1>;
    using Many = std::integral_constant<int, kChains<M>>;
    const bool whole = part == kStepsAtOnce && (step + part) * Format::kDepth <= depth;
    int64_t j = 0;
    for (; whole && j + kChains<M> * lanes <= columns; j += kChains<M> * lanes) run(std::true_type(), Many(), j, lanes);
    for (; whole && j + lanes <= columns; j += lanes) run(std::true_type(), One(), j, lanes);
    for (; j < columns; j += lanes) run(std::false_type(), One(), j, columns - j < lanes ? columns - j : lanes);
  }
}

// B's rows are columns of the product: squares of as many rows as a vector has elements are transposed in registers, of
// bfloat16 in pairs.
template <class Format, int M, class Value>
inline void stream_rows(const typename Format::Element* a, int64_t depth, const Value* b, int64_t b_stride,
                        int64_t columns, typename Format::Sum* c, int64_t c_stride) {
  using Sum = typename Format::Sum;
  using Element = typename Format::Element;
  using Vector = typename VectorOf<Sum>::type;
  constexpr bool kIsBf16 = std::is_same_v<Format, Bf16Precision>;
  using Word = std::conditional_t<kIsBf16, uint32_t, Sum>;
  using Words = typename VectorOf<Word>::type;
  constexpr int lanes = VectorOf<Sum>::lanes, kPerWord = sizeof(Word) / sizeof(Value);
  constexpr int64_t kAhead = 512 / sizeof(Value);
  constexpr int64_t kSquare = lanes * kPerWord;  // columns of it
  for (int64_t j = 0; j < columns; j += lanes) {
    const Value* rows[lanes];
    for (int l = 0; l < lanes; ++l) rows[l] = b + (j + l < columns ? j + l : columns - 1) * b_stride;
    Vector sum[M] = {};
    // `count` words of each row, transposed, the first of which is word `first`.
    const auto add = [&](const Words* square, int64_t first, int64_t count) {
      const auto step = [&](int64_t index, auto right) {
        for (int i = 0; i < M; ++i) accumulate(a[index * M + i], (typename VectorOf<Element>::type)right, sum[i]);
      };
#pragma GCC unroll 16
      for (int64_t l = 0; l < count; ++l) {
        if constexpr (!kIsBf16 || (kPerWord == 2 && Format::kDepth == 2)) {
          step(first + l, square[l]);
        } else if constexpr (kPerWord == 2) {
          step(2 * (first + l), square[l] & 0xffff0000u);
          step(2 * (first + l) + 1, square[l] << 16);
        } else if constexpr (Format::kDepth == 1) {
          step(first + l, Bf16Row::upper(square[l ^ 1]));
        } else if (l % 2 == 0) {
          step((first + l) / 2, Bf16Row::upper(square[l]) >> 16 | Bf16Row::upper(square[l + 1]));
        }
      }
    };
    int64_t k = 0;
    for (; k + kSquare <= depth; k += kSquare) {
      Words square[lanes];
      // What comes next: further along these rows, or in the rows after them.
      const bool beyond = k + kAhead >= depth;
      const int64_t next = !beyond ? k + kAhead : lanes * b_stride + (depth > kAhead ? k + kAhead - depth : k);
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) {
        square[l] = load_vector<Words>(rows[l] + k);
        __builtin_prefetch(rows[l] + next);
      }
      exchange_halves<Words, lanes, 1>(square, std::make_index_sequence<lanes>());
      add(square, k / kPerWord, lanes);
    }
    if (k < depth) {
      Words square[lanes];
      for (int l = 0; l < lanes; ++l) square[l] = load_part<Words>(rows[l] + k, depth - k);
      exchange_halves<Words, lanes, 1>(square, std::make_index_sequence<lanes>());
      const int64_t words = (depth - k + kPerWord - 1) / kPerWord;
      add(square, k / kPerWord, kIsBf16 && kPerWord == 1 ? (words + 1) / 2 * 2 : words);  // steps come in pairs
    }
    for (int i = 0; i < M; ++i) {
      std::memcpy(c + i * c_stride + j, &sum[i],
                  static_cast<size_t>(columns - j < lanes ? columns - j : lanes) * sizeof(Sum));
    }
  }
}

// A's rows, [steps][padded_few].
template <class Format>
inline void load_few(const Operand& a, int64_t rows, int64_t depth, typename Format::Element* out) {
  constexpr int64_t kChunk = 256;
  typename Format::Element buffer[kChunk];
  const int64_t steps = Format::steps(depth), width = padded_few(rows);
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t step = 0; step < steps; step += kChunk) {
      const int64_t part = steps - step < kChunk ? steps - step : kChunk;
      const auto* const values = i < rows ? load_steps(Format(), a, i, step, part, depth, buffer) : nullptr;
      for (int64_t s = 0; s < part; ++s) out[(step + s) * width + i] = values ? values[s] : 0;
    }
  }
}

// c[padded_few(rows)][columns] = A times columns [column, column + columns) of B, for rows <= kFewRows and can_stream
// operands. c holds vectors: c_stride is a multiple of them.
template <class Format>
inline void multiply_few(int64_t rows, const typename Format::Element* a, const Operand& b, int64_t column,
                         int64_t columns, int64_t depth, typename Format::Sum* c, int64_t c_stride) {
  using Sum = typename Format::Sum;
  const auto with_rows = [&](auto run) {
    const int64_t width = padded_few(rows);
    if (width == 1) {
      run(std::integral_constant<int, 1>());
    } else if (width == 2) {
      run(std::integral_constant<int, 2>());
    } else if (width == 4) {
      run(std::integral_constant<int, 4>());
    } else {
      run(std::integral_constant<int, kFewRows>());
    }
  };
  const auto over_columns = [&]<class Value>(const Value* data) {
    with_rows([&](auto m) {
      stream_columns<Format, decltype(m)::value>(a, depth, data + column, b.row_stride, columns, c, c_stride);
    });
  };
  const auto over_rows = [&]<class Value>(const Value* data) {
    with_rows([&](auto m) {
      stream_rows<Format, decltype(m)::value>(a, depth, data + column * b.row_stride, b.row_stride, columns, c,
                                              c_stride);
    });
  };
  if constexpr (std::is_same_v<Sum, float>) {
    if (b.stored) {
      with_rows([&](auto m) {
        if (b.type == Type::i8) {
          stream_strips<Format, decltype(m)::value, PairOfInt8>(a, depth, b, column, columns, c, c_stride);
          scale_columns(b, rows, column, columns, c, c_stride);
        } else {
          stream_strips<Format, decltype(m)::value, PairOfBf16>(a, depth, b, column, columns, c, c_stride);
        }
      });
      return;
    }
  }
  if constexpr (std::is_same_v<Format, Bf16Precision>) {
    if (b.type == Type::f32) {
      const auto* const data = static_cast<const float*>(b.data);
      b.rows_are_k ? over_columns(data) : over_rows(data);
    } else {
      const auto* const data = static_cast<const uint16_t*>(b.data);
      b.rows_are_k ? over_columns(data) : over_rows(data);
    }
  } else if (b.rows_are_k) {
    over_columns(static_cast<const Sum*>(b.data));
  } else {
    over_rows(static_cast<const Sum*>(b.data));
  }
}

#endif  // !GLAM_AMX

}  // namespace glam::cpu::GLAM_ISA
