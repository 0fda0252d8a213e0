// A dispatch table's entries, made of the product core.
#pragma once

#include <cstddef>

#include "cpu/kernels/gemm_few_tiles.h"
#include "cpu/kernels/gemm_table.h"

namespace glam::cpu::GLAM_ISA {

// More rows reuse a B panel no better.
inline constexpr int64_t kBlockRowTiles = GLAM_AMX ? 6 : 16;
inline constexpr int64_t kBlockEighths = GLAM_AMX ? 3 : 4;

template <class Format>
struct GemmEntries {
  using Sum = typename Format::Sum;
  using Element = typename Format::Element;

  static int64_t panel_bytes(int64_t depth) { return Format::steps(depth) * static_cast<int64_t>(sizeof(Element)); }
  static void pack_a(const Operand& operand, int64_t begin, int64_t end, int64_t depth, void* panels) {
    pack_left_strips<Format>(operand, begin, end, depth, static_cast<Element*>(panels));
  }
  static void pack_b(const Operand& operand, int64_t begin, int64_t end, int64_t depth, void* panels) {
    if constexpr (std::is_same_v<Sum, float>) {
      if (operand.stored) return pack_stored<Format>(operand, begin, end, 0, depth, static_cast<Element*>(panels));
    }
    pack_strips<Format, kTileColumns<Sum>>(operand, begin, end, depth, static_cast<Element*>(panels));
  }
  static const void* panels_in_place(const Operand& b, int64_t column, int64_t depth) {
    if constexpr (std::is_same_v<Sum, float>) return stored_panels<Format>(b, column, depth);
    return nullptr;
  }
  static void scale(const Operand& b, int64_t rows, int64_t column, int64_t columns, Sum* c, int64_t c_stride) {
    if constexpr (std::is_same_v<Sum, float>) {
      if (b.stored && b.type == Type::i8) scale_columns(b, rows, column, columns, c, c_stride);
    }
  }
#if GLAM_AMX
  static void multiply(int64_t rows, int64_t columns, const DepthPart& depth, const void* a_panels,
                       const void* b_panels, Sum*, Sum* c, int64_t c_stride) {
    multiply_panels(rows, columns, Format::steps(depth.all), static_cast<const Element*>(a_panels),
                    static_cast<const Element*>(b_panels), c, c_stride);
  }
  static void multiply_into(int64_t rows, int64_t columns, const DepthPart& depth, const void* a_panels,
                            const void* b_panels, Sum*, const Operand& b, const Output& output, int64_t row,
                            int64_t column) {
    multiply_panels_into(rows, columns, Format::steps(depth.all), static_cast<const Element*>(a_panels),
                         static_cast<const Element*>(b_panels), output, row, column,
                         [&](Sum* values, int64_t j) { scale(b, 1, column + j, kTileColumns<Sum>, values, 0); });
  }
#else
  template <class Finish>
  static void multiply_part(int64_t rows, int64_t columns, const DepthPart& depth, const void* a_panels,
                            const void* b_panels, Sum* sums, Finish&& finish) {
    const bool is_whole = depth.is_first && depth.is_last;
    multiply_panels(
        rows, columns, depth.begin / Format::kDepth, Format::steps(depth.end - depth.begin), Format::steps(depth.all),
        !depth.is_first, static_cast<const Element*>(a_panels), static_cast<const Element*>(b_panels), sums,
        is_whole ? 0 : padded_rows<Sum>(rows) * kTileColumns<Sum>, [&](Sum* tile, int64_t i, int64_t j, int64_t count) {
          if (depth.is_last) finish(tile, i, j, count);
        });
  }
  static void multiply(int64_t rows, int64_t columns, const DepthPart& depth, const void* a_panels,
                       const void* b_panels, Sum* sums, Sum* c, int64_t c_stride) {
    multiply_part(
        rows, columns, depth, a_panels, b_panels, sums, [&](const Sum* tile, int64_t i, int64_t j, int64_t count) {
          for (int64_t row = 0; row < count; ++row) {
            std::memcpy(c + (i + row) * c_stride + j, tile + row * kTileColumns<Sum>, kTileColumns<Sum> * sizeof(Sum));
          }
        });
  }
  static void multiply_into(int64_t rows, int64_t columns, const DepthPart& depth, const void* a_panels,
                            const void* b_panels, Sum* sums, const Operand& b, const Output& output, int64_t row,
                            int64_t column) {
    multiply_part(rows, columns, depth, a_panels, b_panels, sums, [&](Sum* tile, int64_t i, int64_t j, int64_t count) {
      const int64_t valid = columns - j < kTileColumns<Sum> ? columns - j : kTileColumns<Sum>;
      scale(b, count, column + j, valid, tile, kTileColumns<Sum>);
      store_tile(tile, count, valid, output, row + i, column + j);
    });
    if (output.stream) finish_streaming();
  }
#endif
  static void multiply_few_rows(int64_t rows, const void* a, const Operand& b, int64_t column, int64_t columns,
                                int64_t depth, Sum* c, int64_t c_stride) {
    multiply_few<Format>(rows, static_cast<const Element*>(a), b, column, columns, depth, c, c_stride);
  }
  static void load_few_rows(const Operand& a, int64_t rows, int64_t depth, void* out) {
    load_few<Format>(a, rows, depth, static_cast<Element*>(out));
  }
  static constexpr GemmFunctions<Sum> functions() {
    return {.tile_rows = kTileRows,
            .tile_columns = kTileColumns<Sum>,
            .block_row_tiles = kBlockRowTiles,
            .block_eighths = kBlockEighths,
            .panel_bytes = &panel_bytes,
            .pack_a = &pack_a,
            .pack_b = &pack_b,
            .panels_in_place = &panels_in_place,
            .whole_depth = GLAM_AMX,
            .multiply = &multiply,
            .multiply_into = &multiply_into,
            .scale = &scale,
            .few_rows = kFewRows,
            .can_stream = &can_stream<Format>,
            .load_few = &load_few_rows,
            .multiply_few = &multiply_few_rows,
            .store = &store_block<Sum>};
  }
};

}  // namespace glam::cpu::GLAM_ISA
