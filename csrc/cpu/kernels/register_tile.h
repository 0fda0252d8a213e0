// The inner loop of all products without tile registers: a few rows of A times a panel of B, with the sums in registers.
//
// Element (row, step) of A is a[row * kRowStride + step * step_stride]; B is [steps][kVectors vectors]. Each element of C is
// one chain of fused multiply-adds over the steps, in order, that begins at 0 or at what C holds: its bits do not depend on
// the tile it falls in.
#pragma once

#include <utility>

#include "cpu/kernels/pack.h"

namespace glam::cpu::GLAM_ISA {

template <class T>
inline void accumulate(T left, typename VectorOf<T>::type right, typename VectorOf<T>::type& sum) {
  sum += left * right;
}
#if defined(__AVX512BF16__)
inline void accumulate(uint32_t left, VectorOf<uint32_t>::type right, VectorOf<float>::type& sum) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(left)), (__m512bh)right);
}
#elif defined(GLAM_EMULATE_AVX512BF16)
inline void accumulate(uint32_t left, VectorOf<uint32_t>::type right, VectorOf<float>::type& sum) {
  for (int l = 0; l < VectorOf<float>::lanes; ++l) {
    const uint32_t pair = right[l];
    sum[l] = __builtin_fmaf(__builtin_bit_cast(float, left & 0xffff0000u),
                            __builtin_bit_cast(float, pair & 0xffff0000u), sum[l]);
    sum[l] = __builtin_fmaf(__builtin_bit_cast(float, left << 16), __builtin_bit_cast(float, pair << 16), sum[l]);
  }
}
#endif

struct Nothing {
  void operator()(int64_t) const {}
};

// c[ROWS][kVectors vectors] (+)= A B. between(step) is called in each step.
template <int ROWS, int kRowStride, int kVectors = kTileVectors, class Element, class Sum, class Stride, class Between>
inline void multiply_rows_tile(int64_t steps, const Element* a, int64_t step_stride, const Element* b, Sum* c,
                               Stride c_stride, bool first, const Between& between) {
  using Vector = typename VectorOf<Sum>::type;
  using Right = typename VectorOf<Element>::type;
  constexpr int lanes = VectorOf<Sum>::lanes;
  Vector sum[ROWS][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = first ? Vector{} : *reinterpret_cast<const Vector*>(c + i * c_stride + j * lanes);
    }
  }
#pragma GCC unroll 2
  for (int64_t step = 0; step < steps; ++step, a += step_stride, b += kVectors * lanes) {
    between(step);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        accumulate(a[i * kRowStride], *reinterpret_cast<const Right*>(b + j * lanes), sum[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) *reinterpret_cast<Vector*>(c + i * c_stride + j * lanes) = sum[i][j];
  }
}

// The same for 1 to kTileRows rows.
template <int kRowStride, int kVectors = kTileVectors, class Element, class Sum, class Stride, class Between = Nothing>
inline void multiply_some_rows(int64_t rows, int64_t steps, const Element* a, int64_t step_stride, const Element* b,
                               Sum* c, Stride c_stride, bool first, const Between& between = {}) {
  const auto run = [&]<int... kRows>(std::integer_sequence<int, kRows...>) {
    ((rows == kRows + 1 &&
      (multiply_rows_tile<kRows + 1, kRowStride, kVectors>(steps, a, step_stride, b, c, c_stride, first, between),
       true)) ||
     ...);
  };
  run(std::make_integer_sequence<int, kTileRows>());
}

// For any number of rows, in tiles of nearly one size.
template <int kRowStride, int kVectors = kTileVectors, class Element, class Sum>
inline void multiply_rows(int64_t rows, int64_t steps, const Element* a, int64_t step_stride, const Element* b, Sum* c,
                          int64_t c_stride, bool first) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = rows * tile / tiles, count = rows * (tile + 1) / tiles - row;
    multiply_some_rows<kRowStride, kVectors>(count, steps, a + row * kRowStride, step_stride, b, c + row * c_stride,
                                             c_stride, first);
  }
}

// For A in strips of kTileRows rows, `strip` elements apart.
template <class Element, class Sum>
inline void multiply_strips(int64_t rows, int64_t steps, const Element* a, int64_t strip, const Element* b, Sum* c,
                            int64_t c_stride, bool first) {
  for (int64_t row = 0; row < rows; row += kTileRows, a += strip) {
    const int64_t count = rows - row < kTileRows ? rows - row : kTileRows;
    multiply_some_rows<1>(count, steps, a, kTileRows, b, c + row * c_stride, c_stride, first);
  }
}

}  // namespace glam::cpu::GLAM_ISA
