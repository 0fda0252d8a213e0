// A dispatch table's entries, made of the product core.
#pragma once

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/gemm_table.h"

namespace glam::cpu::GLAM_ISA {

template <class Format>
struct GemmEntries {
  using Sum = typename Format::Sum;
  using Element = typename Format::Element;

  static int64_t panel_bytes(int64_t depth) { return Format::steps(depth) * static_cast<int64_t>(sizeof(Element)); }
  static void pack_a(const Operand& operand, int64_t begin, int64_t end, int64_t depth, void* panels) {
    pack_left_strips<Format>(operand, begin, end, depth, static_cast<Element*>(panels));
  }
  static void pack_b(const Operand& operand, int64_t begin, int64_t end, int64_t depth, void* panels) {
    pack_strips<Format, kTileColumns<Sum>>(operand, begin, end, depth, static_cast<Element*>(panels));
  }
  static void multiply(int64_t rows, int64_t columns, int64_t depth, const void* a_panels, const void* b_panels, Sum* c,
                       int64_t c_stride) {
    multiply_panels(rows, columns, Format::steps(depth), static_cast<const Element*>(a_panels),
                    static_cast<const Element*>(b_panels), c, c_stride);
  }
  static constexpr GemmFunctions<Sum> functions() {
    return {.tile_rows = kTileRows,
            .tile_columns = kTileColumns<Sum>,
            .panel_bytes = &panel_bytes,
            .pack_a = &pack_a,
            .pack_b = &pack_b,
            .multiply = &multiply,
            .store = &store_block<Sum>};
  }
};

}  // namespace glam::cpu::GLAM_ISA
