// Panels: what the product core multiplies, packed from operands whose rows may be gathered, activated, scaled and rounded
// on the way.
//
// A in strips of MR rows, [steps][MR]; B in strips of NR columns, [steps][NR]; both padded with zeros. An operand's rows
// are either the outer index of a panel, which is then a transpose, or steps, which are copied. For AMX, A is in blocks
// of tile registers instead: [steps / 16][MR][16].
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/kernels/activation.h"
#include "cpu/kernels/tiles.h"
#include "cpu/kernels/vector.h"

namespace glam::cpu::GLAM_ISA {

// Register tile: MR x (2 vectors); MR * 2 accumulators, 2 loads and a broadcast fill the register file. With AMX: four
// tile registers of sums, two of A and two of B.
#if GLAM_AMX
inline constexpr int kTileRows = 2 * tiles::kRows;
#elif defined(__AVX512F__) || defined(GLAM_EMULATE_AVX512BF16)
inline constexpr int kTileRows = 14;
#elif defined(__AVX2__)
inline constexpr int kTileRows = 6;
#else
inline constexpr int kTileRows = 4;
#endif
#if GLAM_AMX
inline constexpr int kTileVectors = 2 * tiles::kColumns / VectorOf<float>::lanes;
#else
inline constexpr int kTileVectors = 2;
#endif
template <class T>
inline constexpr int kTileColumns = kTileVectors * VectorOf<T>::lanes;
inline constexpr int64_t kLoadChunk = 512;  // even
inline constexpr int64_t kLine = 64;        // bytes

template <class T>
inline constexpr int64_t padded_rows(int64_t rows) {
  return (rows + kTileRows - 1) / kTileRows * kTileRows;
}
template <class T>
inline constexpr int64_t padded_columns(int64_t columns) {
  return (columns + kTileColumns<T> - 1) / kTileColumns<T> * kTileColumns<T>;
}

// What panels hold: an Element for each step of the kernel, which adds kDepth products to a Sum.
template <class T>
struct FullPrecision {
  using Sum = T;
  using Element = T;
  static constexpr int kDepth = 1;
  static constexpr int64_t steps(int64_t depth) { return depth; }
  static constexpr int64_t first_k(int64_t step) { return step; }
};
// Operands are rounded to bfloat16 as they are packed.
struct Bf16Precision {
  using Sum = float;
#if GLAM_AMX || defined(__AVX512BF16__) || defined(GLAM_EMULATE_AVX512BF16)
  using Element = uint32_t;  // two of k: the even one in the lower half, as they lie in a row
  static constexpr int kDepth = 2;
#else
  using Element = float;  // step k holds k ^ 1
  static constexpr int kDepth = 1;
#endif
#if GLAM_AMX
  static constexpr int64_t kMultiple = 2 * tiles::kColumns;  // of k
#else
  static constexpr int64_t kMultiple = 2;
#endif
  static constexpr int64_t steps(int64_t depth) { return (depth + kMultiple - 1) / kMultiple * kMultiple / kDepth; }
  static constexpr int64_t first_k(int64_t step) { return kDepth == 2 ? 2 * step : step ^ 1; }
};

// Panels of float that hold bfloat16 numbers.
template <class Format>
inline constexpr bool kHoldsRounded = std::is_same_v<Format, Bf16Precision> && Format::kDepth == 1;

// The element of the data where row `row` of an operand begins; negative for a row of zeros.
inline int64_t row_offset(const Operand& operand, int64_t row) {
  if (!operand.row_index) return row * operand.row_stride;
  const int32_t index = operand.row_index[row];
  return index < 0 ? -1 : index / operand.row_divisor * operand.row_stride;
}

inline bool is_plain(const Operand& operand) { return operand.transform == Transform::none && !operand.row_scale; }

// Elements [begin, begin + count) of a row where they lie already as a product wants them, or null.
template <class T>
inline const T* row_in_place(const Operand& operand, int64_t row, int64_t begin) {
  constexpr Type type = sizeof(T) == 8 ? Type::f64 : sizeof(T) == 4 ? Type::f32 : Type::bf16;
  if (!is_plain(operand) || operand.type != type) return nullptr;
  const int64_t offset = row_offset(operand, row);
  return offset < 0 ? nullptr : static_cast<const T*>(operand.data) + offset + begin;
}

// out[0..count) = elements [begin, begin + count) of operand row `row`, transformed and scaled.
template <class T>
inline void load_row(const Operand& operand, int64_t row, int64_t begin, int64_t count, T* out) {
  const int64_t offset = row_offset(operand, row);
  if (offset < 0) {
    for (int64_t i = 0; i < count; ++i) out[i] = T(0);
    return;
  }
  load_values(advance(operand.data, operand.type, offset + begin), operand.type, count, out);
  if (operand.transform == Transform::geglu) {
    T gates[kLoadChunk];
    for (int64_t done = 0; done < count; done += kLoadChunk) {
      const int64_t part = count - done < kLoadChunk ? count - done : kLoadChunk;
      load_values(advance(operand.gate, operand.type, offset + begin + done), operand.type, part, gates);
      activate(Transform::geglu, part, out + done, gates);
    }
  } else if (operand.transform != Transform::none) {
    activate<T>(operand.transform, count, out, nullptr);
  }
  if (operand.row_scale) {
    const T scale = static_cast<const T*>(operand.row_scale)[row];
    for (int64_t i = 0; i < count; ++i) out[i] *= scale;
  }
}

// relu of bfloat16 numbers where they are: the sign bit is set, and it is neither -0 nor a NaN.
inline void relu_halves(const uint16_t* in, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint16_t>(in[i] - 0x8001u) < 0x7f80u ? 0 : in[i];
}

// The same rounded to bfloat16.
inline void load_row(const Operand& operand, int64_t row, int64_t begin, int64_t count, uint16_t* out) {
  if (row_offset(operand, row) < 0) {
    for (int64_t i = 0; i < count; ++i) out[i] = 0;
  } else if (const auto* const halves = row_in_place<uint16_t>(operand, row, begin)) {
    for (int64_t i = 0; i < count; ++i) out[i] = halves[i];
  } else if (operand.type == Type::bf16 && operand.transform == Transform::relu && !operand.row_scale) {
    relu_halves(static_cast<const uint16_t*>(operand.data) + row_offset(operand, row) + begin, count, out);
  } else if (const auto* const floats = row_in_place<float>(operand, row, begin)) {
    store_values(floats, count, out, Type::bf16);
  } else {
    float values[kLoadChunk];
    for (int64_t done = 0; done < count; done += kLoadChunk) {
      const int64_t part = count - done < kLoadChunk ? count - done : kLoadChunk;
      load_row(operand, row, begin + done, part, values);
      store_values(values, part, out + done, Type::bf16);
    }
  }
}

// Elements of `count` steps from step `first` (even) of operand row `row`, whose depth is `depth`; in place or in
// `buffer`, whole vectors of which may be read.
template <class T>
inline const T* load_steps(FullPrecision<T>, const Operand& operand, int64_t row, int64_t first, int64_t count, int64_t,
                           T* buffer) {
  const bool whole_vectors = count % VectorOf<T>::lanes == 0;
  if (const T* const values = whole_vectors ? row_in_place<T>(operand, row, first) : nullptr) return values;
  load_row(operand, row, first, count, buffer);
  return buffer;
}
inline const Bf16Precision::Element* load_steps(Bf16Precision, const Operand& operand, int64_t row, int64_t first,
                                                int64_t count, int64_t depth, Bf16Precision::Element* buffer) {
  using Element = Bf16Precision::Element;
  constexpr int kDepth = Bf16Precision::kDepth;
  const int64_t begin = first * kDepth, end = begin + count * kDepth < depth ? begin + count * kDepth : depth;
  if constexpr (kDepth == 2) {
    const bool whole_vectors = count % VectorOf<Element>::lanes == 0 && end - begin == count * kDepth;
    const uint16_t* const values = whole_vectors ? row_in_place<uint16_t>(operand, row, begin) : nullptr;
    if (values && reinterpret_cast<uintptr_t>(values) % sizeof(Element) == 0) {
      return reinterpret_cast<const Element*>(values);
    }
    auto* const halves = reinterpret_cast<uint16_t*>(buffer);  // read as vectors, which may alias
    load_row(operand, row, begin, end - begin, halves);
    for (int64_t i = end - begin; i < count * kDepth; ++i) halves[i] = 0;  // beyond the depth
  } else {
    using Pairs = typename VectorOf<uint32_t>::type;
    constexpr int64_t kHalves = 2 * VectorOf<uint32_t>::lanes;
    alignas(kVectorBytes) uint16_t values[kLoadChunk];  // count is even, and less than that by a vector or more
    load_row(operand, row, begin, end - begin, values);
    if (end - begin < count) values[end - begin] = 0;
    for (int64_t i = 0; i < count; i += kHalves) {  // the odd one of each pair comes first
      auto& pairs = *reinterpret_cast<Pairs*>(values + i);
      pairs = pairs << 16 | pairs >> 16;
    }
    for (int64_t i = 0; i < count; ++i) buffer[i] = bf16_to_float(values[i]);
  }
  return buffer;
}

// out[l][i] = in[i][l] for vectors of as many elements as there are of them: in rounds of exchanging the off-diagonal
// halves of ever larger squares.
template <class Vector, int kLanes, int kSpan, size_t... kLane>
inline void exchange_halves(Vector* rows, std::index_sequence<kLane...>) {
  constexpr auto low = [](int l) { return l & kSpan ? kLanes + l - kSpan : l; };
  constexpr auto high = [](int l) { return l & kSpan ? kLanes + l : l + kSpan; };
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kSpan) continue;
    const Vector a = rows[i], b = rows[i + kSpan];
    rows[i] = __builtin_shufflevector(a, b, low(static_cast<int>(kLane))...);
    rows[i + kSpan] = __builtin_shufflevector(a, b, high(static_cast<int>(kLane))...);
  }
  if constexpr (kSpan * 2 < kLanes) {
    exchange_halves<Vector, kLanes, kSpan * 2>(rows, std::index_sequence<kLane...>());
  }
}

// panel[(k ^ kExchanged) * kWidth + i] = row i's element k, for i < kCount <= lanes, k < count; load(i, k) is the vector of
// row i that begins at k.
template <int kWidth, int kCount, int kExchanged = 0, class Element, class Load>
inline void interleave(int64_t count, Element* panel, Load&& load) {
  using Vector = typename VectorOf<Element>::type;
  constexpr int lanes = VectorOf<Element>::lanes;
  for (int64_t k = 0; k < count; k += lanes) {
    Vector square[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) square[i] = i < kCount ? load(i, k) : Vector{};
    exchange_halves<Vector, lanes, 1>(square, std::make_index_sequence<lanes>());
    const auto store = [&](int l) {
      std::memcpy(panel + (k + (l ^ kExchanged)) * kWidth, &square[l], kCount * sizeof(Element));
    };
    const int64_t valid = count - k < lanes ? count - k : lanes;
    if (valid == lanes) {
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) store(l);
    } else {
      for (int l = 0; l < valid; ++l) store(l);
    }
  }
}
template <int kWidth, int kCount, class Element>
inline void interleave(const Element* const* rows, int64_t count, Element* panel) {
  interleave<kWidth, kCount>(count, panel, [&](int i, int64_t k) {
    return *reinterpret_cast<const typename VectorOf<Element>::type*>(rows[i] + k);
  });
}

// Outer indices kFirst ... kWidth - 1 of one strip of an operand whose rows they are, all k, into panel[steps][kWidth]. The
// strip begins at `begin`, and `valid` indices exist from there on. As many rows at a time as a vector has elements, in
// runs long enough for the CPU to foresee what comes next; the next rows are fetched meanwhile.
template <class Format, int kWidth, int kFirst = 0>
inline void pack_rows_strip(const Operand& operand, int64_t begin, int64_t valid, int64_t depth,
                            typename Format::Element* panel) {
  using Element = typename Format::Element;
  using Vector = typename VectorOf<Element>::type;
  constexpr int lanes = VectorOf<Element>::lanes, kCount = kWidth - kFirst < lanes ? kWidth - kFirst : lanes;
  constexpr int64_t kChunk = Format::kDepth == 2 ? 1552 : 464;  // steps; a multiple of the lanes
  static constexpr Element zeros[kChunk] = {};
  Element buffer[kCount][kChunk];
  const int64_t steps = Format::steps(depth), step_bytes = size_of(operand.type) * Format::kDepth;
  for (int64_t step = 0; step < steps; step += kChunk) {
    const int64_t part = steps - step < kChunk ? steps - step : kChunk;
    Element* const out = panel + step * kWidth + kFirst;
    const Element* rows[kCount];
    const char* next[kCount];
    for (int i = 0; i < kCount; ++i) {
      const int64_t row = begin + kFirst + i, following = kFirst + i + kCount < valid ? row + kCount : row;
      const int64_t offset = kFirst + i < valid ? row_offset(operand, following) : 0;
      next[i] = static_cast<const char*>(
          advance(operand.data, operand.type, (offset < 0 ? 0 : offset) + step * Format::kDepth));
    }
    const auto fetch = [&](int i, int64_t k) {
      for (int64_t byte = 0; byte < lanes * step_bytes; byte += kLine)
        __builtin_prefetch(next[i] + k * step_bytes + byte);
    };
    if constexpr (kHoldsRounded<Format>) {
      if (is_plain(operand) && operand.type == Type::f32 && part % lanes == 0 && step + part <= depth) {
        for (int i = 0; i < kCount; ++i) {
          const float* const row =
              kFirst + i < valid ? row_in_place<float>(operand, begin + kFirst + i, step) : nullptr;
          rows[i] = row ? row : zeros;
        }
        interleave<kWidth, kCount, 1>(part, out, [&](int i, int64_t k) {
          fetch(i, k);
          return round_to_bf16(*reinterpret_cast<const Vector*>(rows[i] + k));
        });
        continue;
      }
    }
    for (int i = 0; i < kCount; ++i) {
      const int64_t row = kFirst + i;
      rows[i] = row < valid ? load_steps(Format(), operand, begin + row, step, part, depth, buffer[i]) : zeros;
    }
    interleave<kWidth, kCount>(part, out, [&](int i, int64_t k) {
      fetch(i, k);
      return *reinterpret_cast<const Vector*>(rows[i] + k);
    });
  }
  if constexpr (kFirst + kCount < kWidth) {
    pack_rows_strip<Format, kWidth, kFirst + kCount>(operand, begin, valid, depth, panel);
  }
}

// One step of a strip, from rows of k as Value: that of the panel's elements, or of what is rounded to them.
template <int kWidth, class Value>
inline void store_step(FullPrecision<Value>, const Value* values, const Value*, Value* out) {
  std::memcpy(out, values, kWidth * sizeof(Value));
}
template <int kWidth, class Value>
inline void store_step(Bf16Precision, const Value* even, [[maybe_unused]] const Value* odd,
                       Bf16Precision::Element* out) {
  const auto rounded = [](Value value) {
    if constexpr (std::is_same_v<Value, float>) {
      return float_to_bf16(value);
    } else {
      return value;
    }
  };
  int i = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<Value, float>) {
    constexpr auto half = [](int lane) { return static_cast<short>(lane % 2 * 16 + lane / 2); };
    using Halves __attribute__((vector_size(64))) = short;
    const auto order = [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
      return Halves{half(kLane)...};
    }(std::make_integer_sequence<int, 32>());
    for (; i + 16 <= kWidth; i += 16) {
      _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16((__m512i)order, round_pair(even + i, odd + i)));
    }
  }
#endif
  if constexpr (kHoldsRounded<Bf16Precision> && std::is_same_v<Value, float>) {
    using Vector = typename VectorOf<float>::type;
    for (; i + VectorOf<float>::lanes <= kWidth; i += VectorOf<float>::lanes) {
      *reinterpret_cast<Vector*>(out + i) = round_to_bf16(*reinterpret_cast<const Vector*>(even + i));
    }
  }
  for (; i < kWidth; ++i) {
    if constexpr (Bf16Precision::kDepth == 2) {
      out[i] = rounded(even[i]) | static_cast<uint32_t>(rounded(odd[i])) << 16;
    } else {
      out[i] = bf16_to_float(rounded(even[i]));
    }
  }
}

// Strips for outer indices [begin, end) of an operand whose rows are k; kWidth of them each.
template <class Format, int kWidth, class Value>
inline void pack_columns_strips(const Operand& operand, int64_t begin, int64_t end, int64_t depth,
                                typename Format::Element* panels) {
  // A row of the operand crosses all strips: it is loaded once for as many of them as fit the buffers.
  constexpr int64_t kRun = kLoadChunk / kWidth * kWidth;
  constexpr int64_t kAhead = 8;  // rows, each in pages of its own, to which the CPU does not look ahead
  static constexpr Value zeros[kRun] = {};
  const int64_t steps = Format::steps(depth);
  for (int64_t first = begin; first < end; first += kRun) {
    const int64_t valid = end - first < kRun ? end - first : kRun;
    const int64_t padded = (valid + kWidth - 1) / kWidth * kWidth;
    Value buffers[2][kRun];
    const auto in_place = [&](int64_t k) { return k < depth ? row_in_place<Value>(operand, k, first) : nullptr; };
    const auto load = [&](int64_t k, Value* buffer) -> const Value* {
      if (k >= depth) return zeros;
      if (const Value* const values = valid == padded ? in_place(k) : nullptr) return values;
      load_row(operand, k, first, valid, buffer);
      for (int64_t i = valid; i < padded; ++i) buffer[i] = 0;
      return buffer;
    };
    for (int64_t step = 0; step < steps; ++step) {
      const Value* const values = load(Format::first_k(step), buffers[0]);
      const Value* const next = Format::kDepth == 2 ? load(Format::first_k(step) + 1, buffers[1]) : nullptr;
      typename Format::Element* const out = panels + (first - begin) * steps + step * kWidth;
      const Value* ahead[Format::kDepth];
      for (int k = 0; k < Format::kDepth; ++k) ahead[k] = in_place(step * Format::kDepth + k + kAhead);
      for (int64_t i = 0; i < padded; i += kWidth) {
        for (const Value* const row : ahead) {
          for (int64_t j = 0; row && j < kWidth; j += kLine / sizeof(Value)) __builtin_prefetch(row + i + j);
        }
        store_step<kWidth>(Format(), values + i, next ? next + i : nullptr, out + i * steps);
      }
    }
  }
}

// Strips for outer indices [begin, end); kWidth is kTileRows for A and kTileColumns<Sum> for B.
template <class Format, int kWidth>
inline void pack_strips(const Operand& operand, int64_t begin, int64_t end, int64_t depth,
                        typename Format::Element* panels) {
  if (operand.rows_are_k) {
    if constexpr (std::is_same_v<Format, Bf16Precision>) {
      const bool in_float = is_plain(operand) && operand.type == Type::f32;
      (in_float ? pack_columns_strips<Format, kWidth, float>
                : pack_columns_strips<Format, kWidth, uint16_t>)(operand, begin, end, depth, panels);
    } else {
      pack_columns_strips<Format, kWidth, typename Format::Element>(operand, begin, end, depth, panels);
    }
    return;
  }
  for (int64_t i = begin; i < end; i += kWidth, panels += Format::steps(depth) * kWidth) {
    pack_rows_strip<Format, kWidth>(operand, i, end - i, depth, panels);
  }
}

// The same for the A side.
#if GLAM_AMX
inline void transpose_tiles(uint32_t* block) {
  constexpr int lanes = VectorOf<uint32_t>::lanes;
  uint32_t copy[tiles::kColumns][kTileRows];
  const uint32_t* steps[tiles::kColumns];
  std::memcpy(copy, block, sizeof(copy));
  for (int i = 0; i < tiles::kColumns; ++i) steps[i] = copy[i];
  for (int i = 0; i < tiles::kColumns; i += lanes) {
    interleave<tiles::kColumns, lanes>(steps + i, kTileRows, block + i);
  }
}

template <class Format>
inline void pack_left_strips(const Operand& operand, int64_t begin, int64_t end, int64_t depth, uint32_t* panels) {
  constexpr int64_t kChunk = 1552;  // steps; a multiple of a tile's
  static constexpr uint32_t zeros[kChunk] = {};
  uint32_t buffer[kChunk];
  const int64_t steps = Format::steps(depth);
  const int64_t strips = (end - begin + kTileRows - 1) / kTileRows;
  if (operand.rows_are_k) {
    pack_strips<Format, kTileRows>(operand, begin, end, depth, panels);
    for (int64_t step = 0; step < strips * steps; step += tiles::kColumns) transpose_tiles(panels + step * kTileRows);
    return;
  }
  for (int64_t i = 0; i < strips * kTileRows; ++i) {
    uint32_t* const out = panels + i / kTileRows * kTileRows * steps + i % kTileRows * tiles::kColumns;
    for (int64_t step = 0; step < steps; step += kChunk) {
      const int64_t part = steps - step < kChunk ? steps - step : kChunk;
      const bool valid = begin + i < end;
      const uint32_t* const row = valid ? load_steps(Format(), operand, begin + i, step, part, depth, buffer) : zeros;
      for (int64_t done = 0; done < part; done += tiles::kColumns) {
        std::memcpy(out + (step + done) * kTileRows, row + done, tiles::kColumns * sizeof(uint32_t));
      }
    }
  }
}
#else
template <class Format>
inline void pack_left_strips(const Operand& operand, int64_t begin, int64_t end, int64_t depth,
                             typename Format::Element* panels) {
  pack_strips<Format, kTileRows>(operand, begin, end, depth, panels);
}
#endif

}  // namespace glam::cpu::GLAM_ISA
