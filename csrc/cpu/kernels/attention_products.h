// Products of attention over one block of kQueries queries and one block of keys. Right sides are panels of the product
// core over the queries, or over A; left sides are keys, values and scores.
#pragma once

#include "cpu/kernels/attention.h"
#include "cpu/kernels/gemm_tiles.h"

namespace glam::cpu::GLAM_ISA {

// As many queries as a packed panel of the product core has columns.
template <class T>
inline constexpr int64_t kQueries = kTileColumns<T>;
static_assert(kQueries<float> <= kLinePadding, "the bias line is padded for a whole block of queries");

// Keys at a time: whole tiles of them, whose scores, gradients and panels stay in the L1 and L2 caches. Even, for bfloat16
// takes pairs. With AMX more, for tile registers that were long not stored are slow (gemm_tiles.h).
#if defined(__AVX512F__)
inline constexpr int64_t kKeys = (GLAM_AMX ? 8 : 4) * kTileRows;
#elif defined(__AVX2__)
inline constexpr int64_t kKeys = 9 * kTileRows;
#else
inline constexpr int64_t kKeys = 14 * kTileRows;
#endif
inline constexpr int64_t round_up_to_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

#if GLAM_AMX

template <class Format>
inline constexpr int64_t steps_of(int64_t depth) {
  return Format::steps(depth);
}

inline void begin_products() { tiles::configure(); }
inline void end_products() { tiles::release(); }

// c[whole tiles of rows][kQueries] (+)= A panel; A in strips of tiles, `strip` elements apart. A strip is fetched into the
// first-level cache while the one before it is multiplied, and the sums that are added to.
inline void multiply_strips(int64_t rows, int64_t steps, const uint32_t* a, int64_t strip, const uint32_t* panel,
                            float* c, int64_t c_stride, bool first) {
  constexpr int64_t kLineElements = kLine / sizeof(uint32_t), kBlock = kTileRows * tiles::kColumns;
  for (int64_t row = 0; row < rows; row += kTileRows, a += strip, c += kTileRows * c_stride) {
    const bool is_last = row + kTileRows >= rows;
    const uint32_t* next = a + strip;
    if (!first && !is_last) {
      for (int64_t i = kTileRows; i < 2 * kTileRows; ++i) {
        for (int64_t j = 0; j < kTileColumns<float>; j += kLineElements) __builtin_prefetch(c + i * c_stride + j, 1);
      }
    }
    multiply_tile(rows - row, steps, a, panel, c, c_stride, first, [&] {
      for (int64_t i = 0; i < kBlock && !is_last; i += kLineElements) __builtin_prefetch(next + i);
      next += kBlock;
    });
  }
}

// Columns of the operand, whose rows are k: strips of tiles.
template <class Format>
inline int64_t columns_elements(int64_t width, int64_t depth) {
  return round_up_to_tiles(width) * Format::steps(depth);
}
template <class Format>
inline void load_columns(const Operand& operand, int64_t width, int64_t depth, uint32_t* out) {
  pack_left_strips<Format>(operand, 0, width, depth, out);
}

// c[width][kQueries] += the sum over k in [first, first + count) of columns[k][width] * panel[k - first][kQueries].
template <class Format>
inline void add_over_keys(int64_t width, int64_t depth, const uint32_t* columns, int64_t first, int64_t count,
                          const uint32_t* panel, float* c) {
  multiply_strips(width, steps_of<Format>(count), columns + first / Format::kDepth * kTileRows,
                  kTileRows * Format::steps(depth), panel, c, kQueries<float>, false);
}

// c[key][a] += the sum over the queries, in order, of left[key][query] * rows[query][a].
template <class Format>
inline void add_over_queries(int64_t keys, int64_t queries, int64_t A, const uint32_t* left, const uint32_t* rows,
                             float* c, int64_t stride) {
  constexpr int64_t kSteps = kQueries<float> / Format::kDepth;
  static_assert(kSteps == tiles::kColumns);  // rows of scores are rows of a tile
  for (int64_t a = 0; a < A; a += kTileColumns<float>) {
    multiply_strips(keys, kSteps, left, kTileRows * kSteps, rows + a * Format::steps(queries), c + a, stride, false);
  }
}

#else

// Elements of `depth` numbers, without the padding that a tile register would want.
template <class Format>
inline constexpr int64_t steps_of(int64_t depth) {
  return std::is_same_v<Format, Bf16Precision> ? (depth + 1) / 2 * 2 / Format::kDepth : depth;
}

inline void begin_products() {}
inline void end_products() {}

// out[step][width] = steps whose k are the operand's rows, columns [0, width).
template <class Format>
inline int64_t columns_elements(int64_t width, int64_t depth) {
  return steps_of<Format>(depth) * width;
}
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

// c[width][kQueries] += the sum over k in [first, first + count) of columns[k][width] * panel[k - first][kQueries].
template <class Format>
inline void add_over_keys(int64_t width, int64_t, const typename Format::Element* columns, int64_t first, int64_t count,
                          const typename Format::Element* panel, typename Format::Sum* c) {
  multiply_rows<1>(width, steps_of<Format>(count), columns + first / Format::kDepth * width, width, panel, c,
                   kQueries<typename Format::Sum>, false);
}

// c[key][a] += the sum over the queries, in order, of left[key][query] * rows[query][a].
template <class Format>
inline void add_over_queries(int64_t keys, int64_t queries, int64_t A, const typename Format::Element* left,
                             const typename Format::Element* rows, typename Format::Sum* c, int64_t stride) {
  using Sum = typename Format::Sum;
  for (int64_t a = 0; a < A; a += kTileColumns<Sum>) {
    multiply_rows<kQueries<Sum> / Format::kDepth>(keys, steps_of<Format>(queries), left, 1,
                                                  rows + a * Format::steps(queries), c + a, stride, false);
  }
}

#endif

}  // namespace glam::cpu::GLAM_ISA
