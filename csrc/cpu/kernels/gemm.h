// The product core: panels packed from operands, and a register-tiled kernel over them. Serial; the torch side
// (cpu/gemm.h) spreads blocks over threads.
//
// Every element of C is one chain of fused multiply-adds over k in ascending order, started at 0 and carried through
// memory between k blocks. Its bits therefore depend on its row of A and its column of B alone: not on the tile it
// falls in, the number of rows, or the threads; and AVX2 and AVX-512 agree.
//
// Panels: A in strips of MR rows, [K][MR]; B in strips of NR columns, [K][NR]; both padded with zeros.
#pragma once

#include "cpu/kernels/activation.h"
#include "cpu/kernels/vector.h"

namespace glam::cpu::GLAM_ISA {

// Register tile: MR x (2 vectors); MR * 2 accumulators, 2 loads and a broadcast fill the register file.
#if defined(__AVX512F__)
inline constexpr int kTileRows = 14;
#elif defined(__AVX2__)
inline constexpr int kTileRows = 6;
#else
inline constexpr int kTileRows = 4;
#endif
inline constexpr int kTileVectors = 2;
template <class T>
inline constexpr int kTileColumns = kTileVectors * VectorOf<T>::lanes;
inline constexpr int64_t kBlockK = 256;  // a B strip of one k block (32 KiB in AVX-512 fp32) stays in the L1 cache
inline constexpr int64_t kLoadChunk = 512;

template <class T>
inline constexpr int64_t padded_rows(int64_t rows) {
  return (rows + kTileRows - 1) / kTileRows * kTileRows;
}
template <class T>
inline constexpr int64_t padded_columns(int64_t columns) {
  return (columns + kTileColumns<T> - 1) / kTileColumns<T> * kTileColumns<T>;
}

// out[0..count) = elements [begin, begin + count) of operand row `row`, transformed, scaled, rounded.
template <class T>
inline void load_row(const Operand& operand, int64_t row, int64_t begin, int64_t count, T* out) {
  int64_t data_row = row;
  if (operand.row_index) {
    const int32_t index = operand.row_index[row];
    if (index < 0) {
      for (int64_t i = 0; i < count; ++i) out[i] = T(0);
      return;
    }
    data_row = index / operand.row_divisor;
  }
  const int64_t offset = data_row * operand.row_stride + begin;
  load_values(advance(operand.data, operand.type, offset), operand.type, count, out);
  if (operand.transform == Transform::geglu) {
    T gates[kLoadChunk];
    for (int64_t done = 0; done < count; done += kLoadChunk) {
      const int64_t part = count - done < kLoadChunk ? count - done : kLoadChunk;
      load_values(advance(operand.gate, operand.type, offset + done), operand.type, part, gates);
      activate(Transform::geglu, part, out + done, gates);
    }
  } else if (operand.transform != Transform::none) {
    activate<T>(operand.transform, count, out, nullptr);
  }
  if (operand.row_scale) {
    const T scale = static_cast<const T*>(operand.row_scale)[row];
    for (int64_t i = 0; i < count; ++i) out[i] *= scale;
  }
  if (operand.round_to_bf16) {
    for (int64_t i = 0; i < count; ++i) out[i] = round_to_bf16(out[i]);
  }
}

// One strip of `width` outer indices from `begin` (of which `valid` exist), k in [0, depth), into panel[depth][width].
template <class T>
inline void pack_strip(const Operand& operand, int64_t begin, int64_t valid, int64_t depth, int64_t width, T* panel) {
  if (operand.rows_are_k) {
    for (int64_t k = 0; k < depth; ++k) {
      T* const out = panel + k * width;
      load_row(operand, k, begin, valid, out);
      for (int64_t i = valid; i < width; ++i) out[i] = T(0);
    }
    return;
  }
  T values[kLoadChunk];
  for (int64_t i = 0; i < width; ++i) {
    if (i >= valid) {
      for (int64_t k = 0; k < depth; ++k) panel[k * width + i] = T(0);
      continue;
    }
    for (int64_t k0 = 0; k0 < depth; k0 += kLoadChunk) {
      const int64_t part = depth - k0 < kLoadChunk ? depth - k0 : kLoadChunk;
      load_row(operand, begin + i, k0, part, values);
      for (int64_t k = 0; k < part; ++k) panel[(k0 + k) * width + i] = values[k];
    }
  }
}

// Strips for outer indices [begin, end); `width` is kTileRows for A and kTileColumns<T> for B.
template <class T>
inline void pack_strips(const Operand& operand, int64_t begin, int64_t end, int64_t depth, int64_t width, T* panels) {
  if (!operand.rows_are_k) {
    for (int64_t i = begin; i < end; i += width, panels += depth * width) {
      pack_strip(operand, i, end - i < width ? end - i : width, depth, width, panels);
    }
    return;
  }
  // A row of the operand crosses all strips: it is loaded once for as many of them as fit the buffer.
  T values[kLoadChunk];
  const int64_t step = kLoadChunk / width * width;
  for (int64_t first = begin; first < end; first += step) {
    const int64_t valid = end - first < step ? end - first : step;
    const int64_t padded = (valid + width - 1) / width * width;
    for (int64_t i = valid; i < padded; ++i) values[i] = T(0);
    T* const block = panels + (first - begin) * depth;
    for (int64_t k = 0; k < depth; ++k) {
      load_row(operand, k, first, valid, values);
      for (int64_t i = 0; i < padded; i += width) {
        T* const out = block + i * depth + k * width;
        for (int64_t j = 0; j < width; ++j) out[j] = values[i + j];
      }
    }
  }
}

// c[ROWS][NR] (+)= a[depth][kTileRows] (first ROWS of each) times b[depth][NR].
template <class T, int ROWS>
inline void multiply_tile(int64_t depth, const T* a, const T* b, T* c, int64_t c_stride, bool first) {
  using Vector = typename VectorOf<T>::type;
  constexpr int lanes = VectorOf<T>::lanes;
  Vector sum[ROWS][kTileVectors];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      sum[i][j] = first ? Vector{} : *reinterpret_cast<const Vector*>(c + i * c_stride + j * lanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[kTileVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      right[j] = *reinterpret_cast<const Vector*>(b + k * kTileColumns<T> + j * lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const T left = a[k * kTileRows + i];
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) *reinterpret_cast<Vector*>(c + i * c_stride + j * lanes) = sum[i][j];
  }
}

// c[padded rows][padded columns] = A B for packed panels. c_stride >= padded_columns(columns).
template <class T>
inline void multiply_panels(int64_t rows, int64_t columns, int64_t depth, const T* a_panels, const T* b_panels, T* c,
                            int64_t c_stride) {
  if (depth == 0) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) c[i * c_stride + j] = T(0);
    }
    return;
  }
  for (int64_t k0 = 0; k0 < depth; k0 += kBlockK) {
    const int64_t part = depth - k0 < kBlockK ? depth - k0 : kBlockK;
    for (int64_t j = 0; j < columns; j += kTileColumns<T>) {
      const T* const b = b_panels + j * depth + k0 * kTileColumns<T>;
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const T* const a = a_panels + i * depth + k0 * kTileRows;
        T* const tile = c + i * c_stride + j;
        const int64_t valid = rows - i;
        if (valid == 1) {
          multiply_tile<T, 1>(part, a, b, tile, c_stride, k0 == 0);
        } else if (valid <= kTileRows / 2) {
          multiply_tile<T, kTileRows / 2>(part, a, b, tile, c_stride, k0 == 0);
        } else {
          multiply_tile<T, kTileRows>(part, a, b, tile, c_stride, k0 == 0);
        }
      }
    }
  }
}

// Elements of scratch that serial_product needs beside C.
template <class T>
inline int64_t serial_product_scratch(int64_t rows, int64_t columns, int64_t depth) {
  return (padded_rows<T>(rows) + padded_columns<T>(columns)) * depth;
}

// C = A B in one thread, for small products inside a larger kernel. c holds padded_rows x padded_columns elements.
template <class T>
inline void serial_product(const Operand& a, const Operand& b, int64_t rows, int64_t columns, int64_t depth, T* c,
                           int64_t c_stride, T* scratch) {
  T* const b_panels = scratch + padded_rows<T>(rows) * depth;
  pack_strips(a, 0, rows, depth, kTileRows, scratch);
  pack_strips(b, 0, columns, depth, kTileColumns<T>, b_panels);
  multiply_panels(rows, columns, depth, scratch, b_panels, c, c_stride);
}

}  // namespace glam::cpu::GLAM_ISA
