// The product core behind the dispatch table; see gemm.h for what it computes and why its bits are stable.
#include "cpu/kernels/gemm.h"

#include "cpu/kernels/gemm_table.h"

namespace glam::cpu::GLAM_ISA {
namespace {

template <class T>
void pack(const Operand& operand, int64_t begin, int64_t end, int64_t depth, int64_t width, T* panels) {
  pack_strips(operand, begin, end, depth, width, panels);
}

template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a_panels, const T* b_panels, T* c,
              int64_t c_stride) {
  multiply_panels(rows, columns, depth, a_panels, b_panels, c, c_stride);
}

template <class T>
void store(const T* values, int64_t stride, int64_t rows, int64_t columns, const Output& output, int64_t row,
           int64_t column) {
  T sums[kLoadChunk];
  for (int64_t i = 0; i < rows; ++i) {
    void* const out = advance(output.data, output.type, (row + i) * output.row_stride + column);
    const T* const in = values + i * stride;
    if (!output.accumulate) {
      store_values(in, columns, out, output.type);
      continue;
    }
    for (int64_t j = 0; j < columns; j += kLoadChunk) {
      const int64_t part = columns - j < kLoadChunk ? columns - j : kLoadChunk;
      void* const out_part = advance(out, output.type, j);
      load_values(out_part, output.type, part, sums);
      for (int64_t l = 0; l < part; ++l) sums[l] += in[j + l];
      store_values(sums, part, out_part, output.type);
    }
  }
}

}  // namespace

extern const GemmTable gemm_table = {
    {kTileRows, kTileColumns<float>, &pack<float>, &multiply<float>, &store<float>},
    {kTileRows, kTileColumns<double>, &pack<double>, &multiply<double>, &store<double>},
};

}  // namespace glam::cpu::GLAM_ISA
