// The product core in tile registers (AMX): what kernels/gemm.h does with vectors. All of k is summed in registers; B's
// strips and A's blocks stay in the second-level cache (2 MiB on these CPUs).
#pragma once

#include "cpu/kernels/gemm.h"

#if GLAM_AMX
namespace glam::cpu::GLAM_ISA {

// Storing a tile register takes some 200 ns more if none was stored in the last 600 ns, whatever lies between (measured on
// a Xeon of 2024 with all operands in the L1 cache): one is stored now and then, to nowhere.
inline constexpr int64_t kStoreSteps = 8 * tiles::kColumns;

// multiply_tile for the first of A's two tiles of rows or both. Sums are in registers 0 to 3, A in 4 and 5, B in 6 and 7.
template <bool both, class Between>
inline void multiply_tiles(int64_t steps, const uint32_t* a, const uint32_t* b, float* c, int64_t c_stride, bool first,
                           Between&& between) {
  alignas(kLine) static thread_local char nowhere[tiles::kRows * kLine];
  constexpr int64_t kRowBytes = tiles::kColumns * sizeof(uint32_t);
  const int64_t stride = c_stride * static_cast<int64_t>(sizeof(float));
  float* const lower = c + tiles::kRows * c_stride;
  if (first) {
    tiles::zero<0>();
    tiles::zero<1>();
    if constexpr (both) {
      tiles::zero<2>();
      tiles::zero<3>();
    }
  } else {
    tiles::load<0>(c, stride);
    tiles::load<1>(c + tiles::kColumns, stride);
    if constexpr (both) {
      tiles::load<2>(lower, stride);
      tiles::load<3>(lower + tiles::kColumns, stride);
    }
  }
  for (int64_t step = 0; step < steps;) {
    const int64_t end = steps - step < kStoreSteps ? steps : step + kStoreSteps;
    for (; step < end; step += tiles::kColumns) {
      between();
      tiles::load<6>(b + step * kTileColumns<float>, 2 * kRowBytes);
      tiles::load<7>(b + step * kTileColumns<float> + tiles::kColumns, 2 * kRowBytes);
      tiles::load<4>(a + step * kTileRows, kRowBytes);
      tiles::multiply<0, 4, 6>();
      tiles::multiply<1, 4, 7>();
      if constexpr (both) {
        tiles::load<5>(a + step * kTileRows + tiles::kRows * tiles::kColumns, kRowBytes);
        tiles::multiply<2, 5, 6>();
        tiles::multiply<3, 5, 7>();
      }
    }
    if (step < steps) tiles::store<6>(nowhere, kLine);
  }
  tiles::store<0>(c, stride);
  tiles::store<1>(c + tiles::kColumns, stride);
  if constexpr (both) {
    tiles::store<2>(lower, stride);
    tiles::store<3>(lower + tiles::kColumns, stride);
  }
}

// c[rows of one strip of A][columns of one strip of B] (+)= A B, of which `rows` matter. between() is called once in a tile's
// steps.
template <class Between>
inline void multiply_tile(int64_t rows, int64_t steps, const uint32_t* a, const uint32_t* b, float* c, int64_t c_stride,
                          bool first, Between&& between) {
  if (rows <= tiles::kRows) {
    multiply_tiles<false>(steps, a, b, c, c_stride, first, between);
  } else {
    multiply_tiles<true>(steps, a, b, c, c_stride, first, between);
  }
}

// Calls tile(i, j, multiply) for each pair of strips, a strip of B at a time; multiply(c, c_stride, between) computes it and
// fetches the next strip of B meanwhile.
template <class Tile>
inline void for_tiles(int64_t rows, int64_t columns, int64_t steps, const uint32_t* a_panels, const uint32_t* b_panels,
                      Tile&& tile) {
  constexpr int64_t kLines =
      kTileColumns<float> * tiles::kColumns * sizeof(uint32_t) / kLine;  // of B, in a tile's steps
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows, lines = (kLines + row_tiles - 1) / row_tiles;
  tiles::configure();
  for (int64_t j = 0; j < columns; j += kTileColumns<float>) {
    const uint32_t* const b = b_panels + j * steps;
    const char* next = reinterpret_cast<const char*>(b + kTileColumns<float> * steps);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const uint32_t* const a = a_panels + i * steps;
      tile(i, j, [&](float* c, int64_t c_stride, auto&& between) {
        multiply_tile(rows - i, steps, a, b, c, c_stride, true, [&] {
          for (int64_t line = 0; line < lines; ++line, next += kLine) __builtin_prefetch(next, 0, 2);
          between();
        });
      });
    }
  }
  tiles::release();
}

inline void multiply_panels(int64_t rows, int64_t columns, int64_t steps, const uint32_t* a_panels,
                            const uint32_t* b_panels, float* c, int64_t c_stride) {
  for_tiles(rows, columns, steps, a_panels, b_panels,
            [&](int64_t i, int64_t j, auto&& multiply) { multiply(c + i * c_stride + j, c_stride, [] {}); });
}

// The same into `output`, from (row, column) on, after scale(values, j) of the part of a row that begins at column j. A
// finished tile is stored while the next one is computed, and its lines are fetched a tile earlier, some of a row at a
// time: a burst of stores would be waited for.
template <class Scale>
inline void multiply_panels_into(int64_t rows, int64_t columns, int64_t steps, const uint32_t* a_panels,
                                 const uint32_t* b_panels, const Output& output, int64_t row, int64_t column,
                                 Scale&& scale) {
  constexpr int64_t kWidth = kTileColumns<float>, kFetched = 4 * kWidth;  // columns
  struct Rows {
    int64_t next = 0, end = 0, column = 0;
  } finished, fetched;
  alignas(kLine) float sums[2][kTileRows * kWidth];
  int current = 0;
  void* const out = advance(output.data, output.type, row * output.row_stride + column);
  const bool is_line = output.type == Type::bf16 && !output.accumulate && !output.stream;
  const auto store = [&](int64_t count) {
    const int64_t valid = columns - finished.column < kWidth ? columns - finished.column : kWidth;
    for (; count > 0 && finished.next < finished.end; --count, ++finished.next) {
      float* const values = sums[1 - current] + finished.next % kTileRows * kWidth;
      scale(values, finished.column);
      if (is_line && valid == kWidth) {
        void* const line = advance(out, Type::bf16, finished.next * output.row_stride + finished.column);
        store_values(values, kWidth, line, Type::bf16);
      } else {
        store_row(values, valid, output, row + finished.next, column + finished.column);
      }
    }
  };
  const auto fetch = [&](int64_t count) {
    for (; count > 0 && fetched.next < fetched.end; --count, ++fetched.next) {
      const auto* const part =
          static_cast<char*>(advance(out, output.type, fetched.next * output.row_stride + fetched.column));
      for (int64_t byte = 0; byte < kFetched * size_of(output.type); byte += kLine) __builtin_prefetch(part + byte, 1);
    }
  };
  const int64_t at_once = steps > 0 ? (kTileRows * tiles::kColumns + steps - 1) / steps : 0;
  for_tiles(rows, columns, steps, a_panels, b_panels, [&](int64_t i, int64_t j, auto&& multiply) {
    const int64_t end = rows - i < kTileRows ? rows : i + kTileRows;
    if (j % kFetched == 0 && !output.stream) fetched = {i, end, j};
    multiply(sums[current], kWidth, [&] {
      fetch(at_once);
      store(at_once);
    });
    store(kTileRows);
    current = 1 - current;
    finished = {i, end, j};
  });
  store(kTileRows);
  if (output.stream) finish_streaming();
}

}  // namespace glam::cpu::GLAM_ISA
#endif
