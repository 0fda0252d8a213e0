#include "cpu/kernels/router.h"

#include "cpu/kernels/register_tile.h"

namespace glam::cpu::GLAM_ISA {
namespace {

// Panels are one vector wide where there are no more columns than that.
template <class T>
int64_t panel_width(int64_t columns) {
  return columns <= VectorOf<T>::lanes ? VectorOf<T>::lanes : kTileColumns<T>;
}
template <class T>
int64_t panel_elements(int64_t depth, int64_t columns) {
  const int64_t width = panel_width<T>(columns);
  return (columns + width - 1) / width * width * depth;
}

template <class T>
void pack(const Operand& matrix, int64_t depth, int64_t columns, T* panels) {
  if (panel_width<T>(columns) == VectorOf<T>::lanes) {
    pack_strips<FullPrecision<T>, VectorOf<T>::lanes>(matrix, 0, columns, depth, panels);
  } else {
    pack_strips<FullPrecision<T>, kTileColumns<T>>(matrix, 0, columns, depth, panels);
  }
}

// c[rows][a panel's columns] (+)= A times a panel of `width`.
template <int kRowStride, class T>
void multiply_by_panel(int64_t width, int64_t rows, int64_t steps, const T* a, int64_t step_stride, const T* panel,
                       T* c, int64_t c_stride, bool first) {
  if (width == VectorOf<T>::lanes) {
    multiply_some_rows<kRowStride, 1>(rows, steps, a, step_stride, panel, c, c_stride, first);
  } else {
    multiply_some_rows<kRowStride>(rows, steps, a, step_stride, panel, c, c_stride, first);
  }
}

template <class T>
void logits(const void* x, Type type, int64_t tokens, int64_t D, const T* panels, int64_t E, T* logits, T* sums) {
  constexpr int64_t kSteps = 256;  // a tile's rows and a panel stay in the L1 cache
  const int64_t width = panel_width<T>(E), padded = panel_elements<T>(1, E);
  T rows[kTileRows][kSteps];
  for (int64_t token = 0; token < tokens; token += kTileRows) {
    const int64_t count = tokens - token < kTileRows ? tokens - token : kTileRows;
    for (int64_t d = 0; d < D; d += kSteps) {
      const int64_t steps = D - d < kSteps ? D - d : kSteps;
      for (int64_t i = 0; i < count; ++i) load_values(advance(x, type, (token + i) * D + d), type, steps, rows[i]);
      for (int64_t e = 0; e < E; e += width) {
        multiply_by_panel<kSteps>(width, count, steps, rows[0], 1, panels + e * D + d * width, sums + e, padded,
                                  d == 0);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t e = 0; e < E; ++e) logits[(token + i) * E + e] = sums[i * padded + e];
    }
  }
}

template <class T>
void input_gradient(const T* grad, int64_t tokens, int64_t E, const T* panels, int64_t D, void* grad_x, Type type,
                    T* strip) {
  constexpr int64_t kColumns = 8 * kTileColumns<T>;
  const int64_t width = panel_width<T>(D);
  T rows[kTileRows][kColumns];
  for (int64_t token = 0; token < tokens; token += kTileRows) {
    const int64_t count = tokens - token < kTileRows ? tokens - token : kTileRows;
    for (int64_t e = 0; e < E; ++e) {
      for (int64_t i = 0; i < count; ++i) strip[e * kTileRows + i] = grad[(token + i) * E + e];
    }
    for (int64_t begin = 0; begin < D; begin += kColumns) {
      const int64_t columns = D - begin < kColumns ? D - begin : kColumns;
      for (int64_t j = 0; j < columns; j += width) {
        multiply_by_panel<1>(width, count, E, strip, kTileRows, panels + (begin + j) * E, &rows[0][j], kColumns, true);
      }
      for (int64_t i = 0; i < count; ++i) {
        store_values(rows[i], columns, advance(grad_x, type, (token + i) * D + begin), type);
      }
    }
  }
}

template <class T>
void weight_gradient(const void* x, Type type, int64_t tokens, int64_t D, const T* grad, int64_t E, int64_t begin,
                     int64_t end, T* grad_weight, T* sums) {
  constexpr int64_t kTokens = 128, kAhead = 24, kWidth = kTileColumns<T>;
  T columns[kTokens][kWidth] = {};
  for (int64_t d = begin; d < end; d += kWidth) {
    const int64_t valid = end - d < kWidth ? end - d : kWidth;
    for (int64_t token = 0; token < tokens; token += kTokens) {
      const int64_t steps = tokens - token < kTokens ? tokens - token : kTokens;
      for (int64_t i = 0; i < steps; ++i) {
        const void* const row = advance(x, type, (token + i) * D + d);
        __builtin_prefetch(advance(row, type, kAhead * D));
        if (valid == kWidth) {
          load_values(row, type, kWidth, columns[i]);
        } else {
          load_values(row, type, valid, columns[i]);
        }
      }
      multiply_rows<1>(E, steps, grad + token * E, E, columns[0], sums, kWidth, token == 0);
    }
    for (int64_t e = 0; e < E; ++e) {
      for (int64_t j = 0; j < valid; ++j) grad_weight[(d + j) * E + e] = sums[e * kWidth + j];
    }
  }
}

template <class T>
constexpr RouterFunctions<T> functions() {
  return {kTileRows,  kTileColumns<T>,    &panel_elements<T>, &pack<T>,
          &logits<T>, &input_gradient<T>, &weight_gradient<T>};
}

}  // namespace

extern const RouterTable router_table = {functions<float>(), functions<double>()};

}  // namespace glam::cpu::GLAM_ISA
