// Products of few rows of A in tile registers (AMX): what kernels/gemm_few.h does with vectors. Parts of B are packed into
// the first-level cache, if they do not lie in memory as panels do, and used at once.
#pragma once

#include "cpu/kernels/gemm_few.h"
#include "cpu/kernels/gemm_tiles.h"

#if GLAM_AMX
namespace glam::cpu::GLAM_ISA {

// A's rows, [steps / 16][padded_few][16].
template <class Format>
inline void load_few(const Operand& a, int64_t rows, int64_t depth, uint32_t* out) {
  constexpr int64_t kChunk = 256;
  uint32_t buffer[kChunk];
  const int64_t steps = Format::steps(depth), width = padded_few(rows);
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t step = 0; step < steps; step += kChunk) {
      const int64_t part = steps - step < kChunk ? steps - step : kChunk;
      const uint32_t* const values = i < rows ? load_steps(Format(), a, i, step, part, depth, buffer) : nullptr;
      for (int64_t s = 0; s < part; ++s) {
        out[(step + s) / tiles::kColumns * tiles::kColumns * width + i * tiles::kColumns + s % tiles::kColumns] =
            values ? values[s] : 0;
      }
    }
  }
}

// c[rows the registers have][columns of a strip of B] (+)= A B; block(step) is where the strip's next 16 steps are.
template <class Block>
inline void multiply_strip(int64_t steps, int64_t rows, const uint32_t* a, float* c, int64_t c_stride, bool first,
                           Block&& block) {
  constexpr int64_t kRowBytes = tiles::kColumns * sizeof(uint32_t);
  const int64_t stride = c_stride * static_cast<int64_t>(sizeof(float));
  if (first) {
    tiles::zero<0>();
    tiles::zero<1>();
  } else {
    tiles::load<0>(c, stride);
    tiles::load<1>(c + tiles::kColumns, stride);
  }
  for (int64_t step = 0; step < steps; step += tiles::kColumns) {
    const uint32_t* const right = block(step);
    tiles::load<4>(a + step * rows, kRowBytes);
    tiles::load<6>(right, 2 * kRowBytes);
    tiles::multiply<0, 4, 6>();
    tiles::load<7>(right + tiles::kColumns, 2 * kRowBytes);
    tiles::multiply<1, 4, 7>();
  }
  tiles::store<0>(c, stride);
  tiles::store<1>(c + tiles::kColumns, stride);
}

// Strips of a B that is packed for inference.
template <class Format>
inline void multiply_stored(int64_t rows, const uint32_t* a, const Operand& b, int64_t column, int64_t columns,
                            int64_t depth, float* c, int64_t c_stride) {
  constexpr int64_t kBlock = tiles::kColumns * kStripColumns, kBlockBytes = kBlock * sizeof(uint32_t);
  alignas(kLine) uint32_t blocks[2][kBlock];
  for (int64_t j = 0; j < columns; j += kStripColumns) {
    const auto* const in_place = static_cast<const uint32_t*>(stored_panels<Format>(b, column + j, depth));
    multiply_strip(Format::steps(depth), rows, a, c + j, c_stride, true, [&](int64_t step) -> const uint32_t* {
      if (in_place) {
        const uint32_t* const block = in_place + step * kStripColumns;
        for (int64_t byte = 0; byte < kBlockBytes; byte += kLine) {
          __builtin_prefetch(reinterpret_cast<const char*>(block) + 2 * kStripAhead + byte);
        }
        return block;
      }
      const int64_t k = 2 * step, left = depth - k;
      uint32_t* const block = blocks[step / tiles::kColumns % 2];
      pack_stored<Format>(b, column + j, column + j + kStripColumns, k,
                          left < 2 * tiles::kColumns ? left : 2 * tiles::kColumns, block);
      return block;
    });
  }
}

// `count` of B's rows from `first` on, `elements` of each from `begin` on, into the second-level cache.
inline void fetch_rows(const Operand& b, int64_t first, int64_t count, int64_t begin, int64_t elements) {
  for (int64_t row = first; row < first + count; ++row) {
    const auto* const part = static_cast<const char*>(advance(b.data, b.type, row * b.row_stride + begin));
    for (int64_t byte = 0; byte < elements * size_of(b.type); byte += kLine) __builtin_prefetch(part + byte, 0, 2);
  }
}

// Any other B that can_stream: packed in parts that stay in the caches, of long stretches of its rows.
template <class Format>
inline void multiply_plain(int64_t rows, const uint32_t* a, const Operand& b, int64_t column, int64_t columns,
                           int64_t depth, float* c, int64_t c_stride) {
  constexpr int64_t kWidth = kTileColumns<float>, kColumns = 2048, kSteps = 256;
  alignas(kLine) uint32_t panels[tiles::kColumns * kColumns];
  static_assert(kSteps * kWidth <= tiles::kColumns * kColumns);
  const int64_t most_steps = b.rows_are_k ? tiles::kColumns : kSteps, most_columns = b.rows_are_k ? kColumns : kWidth;
  for (int64_t j = 0; j < columns; j += most_columns) {
    const int64_t end = columns - j < most_columns ? columns : j + most_columns;
    int64_t k = 0;
    do {
      const int64_t part = depth - k < 2 * most_steps ? depth - k : 2 * most_steps, steps = Format::steps(part);
      Operand operand = b;
      operand.data = advance(b.data, b.type, b.rows_are_k ? k * b.row_stride : k);
      pack_strips<Format, kWidth>(operand, column + j, column + end, part, panels);
      for (int64_t i = j; i < end; i += kWidth) {
        const uint32_t* const panel = panels + (i - j) * steps;
        const int64_t fetched =
            steps > 0 ? (kWidth * tiles::kColumns + steps - 1) / steps : 0;  // rows in a block's time
        // What is packed next: more of k, or at its end the rows of the next columns.
        const bool more = k + part < depth;
        const int64_t begin = b.rows_are_k ? column + i : more ? k + part : 0, elements = b.rows_are_k ? kWidth : part;
        int64_t next = b.rows_are_k ? k + part : column + (more ? j : end);
        multiply_strip(steps, rows, a + k / 2 * rows, c + i, c_stride, k == 0, [&](int64_t step) {
          fetch_rows(b, next, fetched, begin, elements);
          next += fetched;
          return panel + step * kWidth;
        });
      }
      k += part;
    } while (k < depth);
  }
}

// c[padded_few(rows)][whole strips of columns] = A times columns [column, column + columns) of B, for rows <= kFewRows and
// can_stream operands.
template <class Format>
inline void multiply_few(int64_t rows, const uint32_t* a, const Operand& b, int64_t column, int64_t columns,
                         int64_t depth, float* c, int64_t c_stride) {
  const int64_t padded = padded_few(rows);
  tiles::configure(static_cast<int>(padded));
  (b.stored ? multiply_stored<Format> : multiply_plain<Format>)(padded, a, b, column, columns, depth, c, c_stride);
  tiles::release();
  if (b.stored && b.type == Type::i8) scale_columns(b, rows, column, columns, c, c_stride);
}

}  // namespace glam::cpu::GLAM_ISA
#endif
