#include "cpu/kernels/adafactor.h"

#include <cmath>

#include "cpu/kernels/lanes.h"
#include "cpu/kernels/vector.h"

namespace glam::cpu::GLAM_ISA {
namespace {

// In one pass over lanes as in lanes.h, for memory is what should be waited for; of vectors, which GCC does not make of the
// two kinds of sums.
template <class T>
SquareSum square_sum(const void* x, Type type, int64_t count) {
  using Doubles = typename VectorOf<double>::type;
  using Values = typename VectorOf<T>::type;
  constexpr int kDoubles = VectorOf<double>::lanes, kValues = VectorOf<T>::lanes;
  Doubles sums[kLanes / kDoubles] = {};
  Values overflow[kLanes / kValues] = {};  // stays 0 unless a square is infinite or NaN
  const auto add = [&](const T* values) {
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; l += kDoubles) {
      const Doubles part = to_doubles(values + l);
      sums[l / kDoubles] += part * part;
    }
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; l += kValues) {
      const Values part = *reinterpret_cast<const Values*>(values + l);
      overflow[l / kValues] += part * part * T(0);
    }
  };
  with_values(x, type, [&]<class Value>(const Value* in) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      if constexpr (std::is_same_v<Value, T>) {
        add(in + i);
      } else {
        T values[kLanes];
        for (int l = 0; l < kLanes; ++l) values[l] = value_as<T>(in[i + l]);
        add(values);
      }
    }
    T rest[kLanes] = {};
    for (int l = 0; i + l < count; ++l) rest[l] = value_as<T>(in[i + l]);
    add(rest);
  });
  LaneSums<double> sum;
  std::memcpy(sum.lane, sums, sizeof(sums));
  bool finite = true;
  for (const Values& part : overflow) {
    for (int l = 0; l < kValues; ++l) finite &= part[l] == T(0);
  }
  return {sum.total(), finite};
}

template <class T>
void matrix_sums(const T* grad, int64_t rows, int64_t columns, T* row_sums, T* column_sums) {
  for (int64_t j = 0; j < columns; ++j) column_sums[j] = T(0);
  for (int64_t i = 0; i < rows; ++i) {
    const T* const row = grad + i * columns;
    LaneSums<T> squares;
    squares.add(columns, [&](int64_t j) { return row[j] * row[j]; });
    row_sums[i] = squares.total();
    for (int64_t j = 0; j < columns; ++j) column_sums[j] += row[j] * row[j];
  }
}

template <class T>
double scaled_square_sum(const T* grad, int64_t rows, int64_t columns, const T* row_scale, const T* column_scale) {
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const T* const row = grad + i * columns;
    LaneSums<double> squares;
    squares.add(columns, [&](int64_t j) {
      const double scaled = row[j] * row_scale[i] * column_scale[j];
      return scaled * scaled;
    });
    total += squares.total();
  }
  return total;
}

template <class T>
void apply_matrix(T* weight, const T* grad, int64_t rows, int64_t columns, const T* row_scale, const T* column_scale) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      weight[i * columns + j] -= grad[i * columns + j] * row_scale[i] * column_scale[j];
    }
  }
}

template <class T>
double update_variance(T* variance, const T* grad, int64_t count, T decay, T eps) {
  for (int64_t i = 0; i < count; ++i) variance[i] = decay * variance[i] + (T(1) - decay) * (grad[i] * grad[i] + eps);
  LaneSums<double> squares;
  squares.add(count, [&](int64_t i) { return static_cast<double>(grad[i]) * grad[i] / variance[i]; });
  return squares.total();
}

template <class T>
void apply_elements(T* weight, const T* grad, const T* variance, int64_t count, T factor) {
  for (int64_t i = 0; i < count; ++i) weight[i] -= factor * grad[i] / std::sqrt(variance[i]);
}

template <class T>
constexpr AdafactorFunctions<T> functions() {
  return {&square_sum<T>,   &matrix_sums<T>,     &scaled_square_sum<T>,
          &apply_matrix<T>, &update_variance<T>, &apply_elements<T>};
}

}  // namespace

extern const AdafactorTable adafactor_table = {functions<float>(), functions<double>()};

}  // namespace glam::cpu::GLAM_ISA
