// Weights packed for inference: as they are kept, read and multiplied.
//
// Strips of kStripColumns columns, one after the other, which a product with few rows reads from beginning to end:
//   bf16  [K / 2][32][2]   pairs of k, as the bfloat16 dot product takes them; K is even
//   i8    [4][32] bytes that are 32 floats, the columns' scales, then [K][32]; a weight is scale * value
// One layout for all instruction sets: the strips are a multiple of every panel's columns.
//
// The chains are those of kernels/gemm.h: the bits are those of the same weights in bfloat16, or of the integers, whose
// products are scaled at the end.
#pragma once

#include "cpu/kernels/gemm.h"
#include "ops/packed_layout.h"

namespace glam::cpu::GLAM_ISA {

static_assert(kStripColumns % kTileColumns<float> == 0);

inline constexpr int64_t kStripAhead = 2048;  // bytes of a strip that are fetched before they are read

inline const char* strip_of(const Operand& operand, int64_t column) {
  return static_cast<const char*>(operand.data) + column / kStripColumns * operand.row_stride * size_of(operand.type);
}
inline const float* scales_of(const Operand& operand, int64_t column) {
  return reinterpret_cast<const float*>(strip_of(operand, column)) + column % kStripColumns;
}

// The words of one pair of k in a vector's columns of a strip: a bfloat16 number in each half, the even k in the lower.
struct PairOfBf16 {
  static constexpr int64_t kBytes = 4;  // of a column
  using Words = typename VectorOf<uint32_t>::type;
  static Words load(const char* pair, int64_t column) {
    return *reinterpret_cast<const Words*>(pair + column * kBytes);
  }
};
#if defined(__AVX512VBMI__)
// The bytes of 0 to 127 as bfloat16, and where the words of 16 columns find theirs in the low and the high bytes of a pair.
struct Int8Bytes {
  alignas(64) uint8_t low[128], high[128], words[2][64];
  constexpr Int8Bytes() : low(), high(), words() {
    for (int i = 0; i < 128; ++i) {
      const auto bits = __builtin_bit_cast(uint32_t, static_cast<float>(i));
      low[i] = static_cast<uint8_t>(bits >> 16);
      high[i] = static_cast<uint8_t>(bits >> 24);
    }
    for (int column = 0; column < kStripColumns; ++column) {
      for (int byte = 0; byte < 4; ++byte) {
        const int source = byte % 2 * 64 + byte / 2 * static_cast<int>(kStripColumns) + column;
        words[column / 16][column % 16 * 4 + byte] = static_cast<uint8_t>(source);
      }
    }
  }
};
inline constexpr Int8Bytes kInt8Bytes;
#endif

struct PairOfInt8 {
  static constexpr int64_t kBytes = 2;
  using Words = typename VectorOf<uint32_t>::type;
  static Words load(const char* pair, int64_t column) {
#if defined(__AVX512VBMI__)
    // Looked up, all columns at once; of calls for both halves the compiler keeps one lookup.
    const auto table = [](const uint8_t* bytes, __m512i index) {
      return _mm512_permutex2var_epi8(_mm512_load_si512(bytes), index, _mm512_load_si512(bytes + 64));
    };
    const __m512i values = _mm512_loadu_si512(pair), sizes = _mm512_abs_epi8(values);
    const __m512i low = table(kInt8Bytes.low, sizes);
    constexpr int kOrAnd = 0xF8;  // a | (b & c)
    const __m512i high = _mm512_ternarylogic_epi32(table(kInt8Bytes.high, sizes), values,
                                                   _mm512_set1_epi8(static_cast<char>(0x80)), kOrAnd);
    return (Words)_mm512_permutex2var_epi8(low, _mm512_load_si512(kInt8Bytes.words[column / 16]), high);
#else
    const auto* const even = reinterpret_cast<const int8_t*>(pair) + column;
    return (Words)to_floats(even + kStripColumns) | (Words)to_floats(even) >> 16;  // 8 bits are exact
#endif
  }
};

// A pair in a vector's columns of a panel of `width`: one step, or two.
template <class Format, class Words>
inline void store_pair(Format, Words words, int64_t width, typename Format::Element* panel) {
  using Vector = typename VectorOf<typename Format::Element>::type;
  const auto store = [&](int64_t step, Words part) { *reinterpret_cast<Vector*>(panel + step * width) = (Vector)part; };
  if constexpr (Format::kDepth == 2) {
    store(0, words);
  } else {
    store(Format::first_k(0), words << 16);
    store(Format::first_k(1), words & 0xffff0000u);
  }
}

// Panels of columns [begin, end), both multiples of the panel's columns or the last one, for k from `first` (even) on: as
// pack_strips, without the scales.
template <class Format>
inline void pack_stored(const Operand& operand, int64_t begin, int64_t end, int64_t first, int64_t depth,
                        typename Format::Element* panels) {
  constexpr int kWidth = kTileColumns<typename Format::Sum>;
  const int64_t steps = Format::steps(depth);
  for (int64_t i = begin; i < end; i += kWidth, panels += steps * kWidth) {
    const char* const strip = strip_of(operand, i);
    const int64_t column = i % kStripColumns;
    const auto pack_pairs = [&]<class Pair>(Pair, const char* pair) {
      constexpr int64_t kPairBytes = Pair::kBytes * kStripColumns;
      for (int64_t p = 0; p < depth / 2; ++p, pair += kPairBytes) {
        for (int64_t byte = 0; byte < kPairBytes; byte += kLine) __builtin_prefetch(pair + kStripAhead + byte);
        for (int j = 0; j < kWidth; j += VectorOf<uint32_t>::lanes) {
          store_pair(Format(), Pair::load(pair, column + j), kWidth, panels + p * (2 / Format::kDepth) * kWidth + j);
        }
      }
    };
    if (operand.type == Type::bf16) {
      pack_pairs(PairOfBf16(), strip + first * 2 * kStripColumns);
    } else {
      pack_pairs(PairOfInt8(), strip + (kScaleRows + first) * kStripColumns);
    }
    for (int64_t i = depth / Format::kDepth * kWidth; i < steps * kWidth; ++i) panels[i] = 0;
  }
}

// The strips themselves where they are panels; else null.
template <class Format>
inline const void* stored_panels(const Operand& operand, int64_t column, int64_t depth) {
  constexpr bool same_columns = Format::kDepth == 2 && kTileColumns<float> == kStripColumns;
  const bool same = same_columns && operand.stored && operand.type == Type::bf16 && Format::steps(depth) * 2 == depth;
  return same ? strip_of(operand, column) : nullptr;
}

// c[rows][columns] *= the scales of columns [column, column + columns).
inline void scale_columns(const Operand& operand, int64_t rows, int64_t column, int64_t columns, float* c,
                          int64_t c_stride) {
  for (int64_t j = 0; j < columns; j += kTileColumns<float>) {
    const float* const scales = scales_of(operand, column + j);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t l = 0; l < kTileColumns<float>; ++l) c[i * c_stride + j + l] *= scales[l];
    }
  }
}

// c[M][columns] for kStrips whole strips from `column` on: as many chains as it takes to fill the time of an addition.
template <class Format, int M, class Pair, int kStrips>
inline void stream_strips_at_once(const typename Format::Element* a, int64_t depth, const Operand& b, int64_t column,
                                  float* c, int64_t c_stride) {
  using Vector = typename VectorOf<float>::type;
  constexpr int lanes = VectorOf<float>::lanes;
  constexpr int64_t kPairBytes = Pair::kBytes * kStripColumns;
  constexpr int kSums = kVectorBytes == 64 ? 16 : 8, kStripVectors = kStripColumns / lanes;
  constexpr int kPerStrip = kSums / M / kStrips, kVectors = kPerStrip < 1               ? 1
                                                            : kPerStrip < kStripVectors ? kPerStrip
                                                                                        : kStripVectors;
  const int64_t first = b.type == Type::i8 ? kScaleRows * kStripColumns : 0;
  for (int64_t part = 0; part < kStripColumns; part += kVectors * lanes) {
    Vector sum[kStrips][M][kVectors] = {};
    const char* pair[kStrips];
    for (int s = 0; s < kStrips; ++s) pair[s] = strip_of(b, column + s * kStripColumns) + first;
    for (int64_t p = 0; p < depth / 2; ++p) {
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) {
        for (int64_t byte = 0; part == 0 && byte < kPairBytes; byte += kLine) {
          __builtin_prefetch(pair[s] + kStripAhead + byte);
        }
        const auto step = [&](int64_t index, auto right, int v) {
#pragma GCC unroll 8
          for (int i = 0; i < M; ++i) accumulate(a[index * M + i], right, sum[s][i][v]);
        };
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const auto words = Pair::load(pair[s], part + v * lanes);
          const auto even = (Vector)(words << 16), odd = (Vector)(words & 0xffff0000u);
          if constexpr (Format::kDepth == 2) {
            step(p, words, v);
          } else if constexpr (std::is_same_v<Format, Bf16Precision>) {
            step(2 * p, odd, v);
            step(2 * p + 1, even, v);
          } else {
            step(2 * p, even, v);
            step(2 * p + 1, odd, v);
          }
        }
        pair[s] += kPairBytes;
      }
    }
    for (int s = 0; s < kStrips; ++s) {
      for (int i = 0; i < M; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          *reinterpret_cast<Vector*>(c + i * c_stride + s * kStripColumns + part + v * lanes) = sum[s][i][v];
        }
      }
    }
  }
}

// The same for any number of columns, a multiple of a strip's.
template <class Format, int M, class Pair>
inline void stream_strips(const typename Format::Element* a, int64_t depth, const Operand& b, int64_t column,
                          int64_t columns, float* c, int64_t c_stride) {
  constexpr int kStrips = Pair::kBytes == 4 ? 1 : M == 1 ? 4 : M == 2 ? 2 : 1;
  int64_t j = 0;
  for (; j + kStrips * kStripColumns <= columns; j += kStrips * kStripColumns) {
    stream_strips_at_once<Format, M, Pair, kStrips>(a, depth, b, column + j, c + j, c_stride);
  }
  for (; j < columns; j += kStripColumns) {
    stream_strips_at_once<Format, M, Pair, 1>(a, depth, b, column + j, c + j, c_stride);
  }
}

}  // namespace glam::cpu::GLAM_ISA
