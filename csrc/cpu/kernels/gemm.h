// The product core: panels packed from operands, and a register-tiled kernel over them. Serial; the torch side
// (cpu/gemm.h) spreads blocks over threads.
//
// Every element of C is one chain of fused multiply-adds over k, started at 0 and carried through memory between k
// blocks. Its bits therefore depend on its row of A and its column of B alone: not on the tile it falls in, the number
// of rows, or the threads. The chain runs over k in ascending order, in bfloat16 over pairs of k with the odd one first,
// which is the order of the bfloat16 dot product instruction (Intel SDM, VDPBF16PS: products are exact, sums rounded to
// nearest; subnormal numbers are zeros there). So AVX2, AVX-512 and AVX-512-BF16 agree. AMX sums 16 pairs before it adds
// them to the chain (kernels/tiles.h): a chain of its own, with the same promise, whose products are in gemm_tiles.h.
//
// This and not a library's kernel (oneDNN's brgemm, which torch contains): measured on one core of a Zen 5 at T = 112,
// K = 768, N = 1024 it reaches 250 GFLOP/s in float32 and 520 in bfloat16, brgemm 238 and 501, and no library gives the
// promise about bits, gathers and activations while it packs, or runs on any CPU.
#pragma once

#include "cpu/kernels/pack.h"
#include "cpu/kernels/register_tile.h"

namespace glam::cpu::GLAM_ISA {

inline constexpr int64_t kBlockSteps = 384;  // for which a tile keeps its sums in registers

// For each tile of A B, over steps [first_step, first_step + steps) of packed panels: A's of these, B's of all_steps. The
// tile's sums, [kTileRows][kTileColumns<Sum>], begin at 0, or with `add` where they are: at `sums`, each strip of B
// strip_sums after the one before. finish(tile, i, j, rows) is called when a tile of `rows` rows is done that begins at
// (i, j).
template <class Element, class Sum, class Finish>
inline void multiply_panels(int64_t rows, int64_t columns, int64_t first_step, int64_t steps, int64_t all_steps,
                            bool add, const Element* a_panels, const Element* b_panels, Sum* sums, int64_t strip_sums,
                            Finish&& finish) {
  constexpr int64_t kWidth = kTileColumns<Sum>;
  using Stride = std::integral_constant<int64_t, kWidth>;
  // k blocks of nearly one size: a short one would load and store its sums for little.
  constexpr int64_t kUnit = 16;
  const int64_t blocks = (steps + kBlockSteps - 1) / kBlockSteps;
  const int64_t most = blocks == 0 ? kUnit : (steps + blocks * kUnit - 1) / (blocks * kUnit) * kUnit;
  // The first tile of a block would wait for B, line by line; the tiles of the block before fetch it, a little in each
  // step, for a burst of prefetches is waited for.
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t share = kWidth * static_cast<int64_t>(sizeof(Element)) / row_tiles + 1;  // bytes in a step
  for (int64_t j = 0; j < columns; j += kWidth, sums += strip_sums) {
    const Element* const strip = b_panels + j * all_steps + first_step * kWidth;
    for (int64_t step = 0; step == 0 || step < steps; step += most) {
      const int64_t part = steps - step < most ? steps - step : most;
      const bool last = step + part == steps;
      const Element* const b = strip + step * kWidth;
      const char* next = reinterpret_cast<const char*>(last ? strip + all_steps * kWidth : b + part * kWidth);
      const auto fetch = [&](int64_t k) {
        __builtin_prefetch(next + k * share, 0, 2);
        if (share > kLine) __builtin_prefetch(next + k * share + kLine, 0, 2);
      };
      for (int64_t i = 0; i < rows; i += kTileRows, next += part * share) {
        const int64_t count = rows - i < kTileRows ? rows - i : kTileRows;
        Sum* const tile = sums + i * kWidth;
        multiply_some_rows<1>(count, part, a_panels + i * steps + step * kTileRows, kTileRows, b, tile, Stride(),
                              step == 0 && !add, fetch);
        if (last) finish(tile, i, j, count);
      }
    }
  }
}

// Past the caches, to an address that is aligned to a vector.
template <class T>
inline void stream_row(const T* in, int64_t columns, void* out, Type type) {
  if (type == Type::bf16) {
    uint16_t rounded[kLoadChunk];
    for (int64_t j = 0; j < columns; j += kLoadChunk) {
      const int64_t part = columns - j < kLoadChunk ? columns - j : kLoadChunk;
      store_values(in + j, part, rounded, type);
      stream_values(rounded, part, static_cast<uint16_t*>(out) + j);
    }
  } else if (size_of(type) == sizeof(T)) {
    stream_values(in, columns, static_cast<T*>(out));
  } else {
    store_values(in, columns, out, type);
  }
}

// values[columns] -> the part of a row of `output` that begins at (row, column).
template <class T>
inline void store_row(const T* values, int64_t columns, const Output& output, int64_t row, int64_t column) {
  void* const out = advance(output.data, output.type, row * output.row_stride + column);
  if (!output.accumulate) {
    if (output.stream && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0) {
      stream_row(values, columns, out, output.type);
    } else {
      store_values(values, columns, out, output.type);
    }
    return;
  }
  T sums[kLoadChunk];
  for (int64_t j = 0; j < columns; j += kLoadChunk) {
    const int64_t part = columns - j < kLoadChunk ? columns - j : kLoadChunk;
    void* const out_part = advance(out, output.type, j);
    load_values(out_part, output.type, part, sums);
    for (int64_t l = 0; l < part; ++l) sums[l] += values[j + l];
    store_values(sums, part, out_part, output.type);
  }
}

// values[rows][kTileColumns<T>], of which `columns` matter -> the block of `output` that begins at (row, column).
template <class T>
inline void store_tile(const T* values, int64_t rows, int64_t columns, const Output& output, int64_t row,
                       int64_t column) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t kWidth = kTileColumns<T>;
  char* out = static_cast<char*>(advance(output.data, output.type, row * output.row_stride + column));
  const int64_t row_bytes = output.row_stride * size_of(output.type);
  const auto for_rows = [&](auto&& store) {
    for (int64_t i = 0; i < rows; ++i, out += row_bytes) store(values + i * kWidth);
  };
  const bool is_aligned = (reinterpret_cast<uintptr_t>(out) | row_bytes) % kVectorBytes == 0;
  if (columns == kWidth && size_of(output.type) == sizeof(T)) {
    if (output.accumulate) {
      return for_rows([&](const T* in) {
        for (int64_t j = 0; j < kWidth; j += VectorOf<T>::lanes) {
          *reinterpret_cast<Vector*>(out + j * sizeof(T)) += *reinterpret_cast<const Vector*>(in + j);
        }
      });
    }
    if (output.stream && is_aligned) {
      return for_rows([&](const T* in) { stream_values(in, kWidth, reinterpret_cast<T*>(out)); });
    }
    return for_rows([&](const T* in) { std::memcpy(out, in, kWidth * sizeof(T)); });
  }
  if (columns == kWidth && output.type == Type::bf16 && !output.accumulate) {
    return for_rows([&](const T* in) { store_values(in, kWidth, out, Type::bf16); });
  }
  for (int64_t i = 0; i < rows; ++i) store_row(values + i * kWidth, columns, output, row + i, column);
}

// values[rows][stride] -> the block of `output` whose first element is (row, column).
template <class T>
inline void store_block(const T* values, int64_t stride, int64_t rows, int64_t columns, const Output& output,
                        int64_t row, int64_t column) {
  for (int64_t i = 0; i < rows; ++i) store_row(values + i * stride, columns, output, row + i, column);
  if (output.stream) finish_streaming();
}

}  // namespace glam::cpu::GLAM_ISA
