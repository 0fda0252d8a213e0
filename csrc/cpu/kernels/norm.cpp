#include "cpu/kernels/norm.h"

#include <cmath>

#include "cpu/kernels/lanes.h"
#include "cpu/kernels/vector.h"

namespace glam::cpu::GLAM_ISA {
namespace {

// 1 / sqrt(mean(x^2) + eps)
template <class T>
T reciprocal_root(const T* x, int64_t D, T eps) {
  LaneSums<T> squares;
  squares.add(D, [&](int64_t d) { return x[d] * x[d]; });
  return T(1) / std::sqrt(squares.total() / static_cast<T>(D) + eps);
}

template <class T>
void forward(const void* x, Type type, const T* scale, T eps, int64_t rows, int64_t D, void* y, T* row) {
  for (int64_t i = 0; i < rows; ++i) {
    load_values(advance(x, type, i * D), type, D, row);
    const T root = reciprocal_root(row, D, eps);
    for (int64_t d = 0; d < D; ++d) row[d] = row[d] * root * scale[d];
    store_values(row, D, advance(y, type, i * D), type);
  }
}

// With r = 1 / rms and s = grad * scale:  grad_x = r s - r^3 x mean(s x),  grad_scale = sum of grad * r x.
// The two terms of grad_x nearly cancel where s is close to a multiple of x, hence the doubles.
template <class T>
void backward(const void* grad, const void* x, Type type, const T* scale, T eps, int64_t rows, int64_t D, void* grad_x,
              T* grad_scale, T* scratch) {
  T *const input = scratch, *const incoming = scratch + D;
  for (int64_t d = 0; d < D; ++d) grad_scale[d] = T(0);
  for (int64_t i = 0; i < rows; ++i) {
    load_values(advance(x, type, i * D), type, D, input);
    load_values(advance(grad, type, i * D), type, D, incoming);
    LaneSums<double> squares, products;
    squares.add(D, [&](int64_t d) { return static_cast<double>(input[d]) * input[d]; });
    products.add(D, [&](int64_t d) { return static_cast<double>(incoming[d]) * scale[d] * input[d]; });
    const double root = 1 / std::sqrt(squares.total() / static_cast<double>(D) + eps);
    const double along_x = root * root * products.total() / static_cast<double>(D);
    const T root_T = static_cast<T>(root);
    for (int64_t d = 0; d < D; ++d) grad_scale[d] += incoming[d] * (input[d] * root_T);
    for (int64_t d = 0; d < D; ++d) {
      incoming[d] = static_cast<T>(root * (static_cast<double>(incoming[d]) * scale[d] - input[d] * along_x));
    }
    store_values(incoming, D, advance(grad_x, type, i * D), type);
  }
}

}  // namespace

extern const NormTable norm_table = {
    {&forward<float>, &backward<float>},
    {&forward<double>, &backward<double>},
};

}  // namespace glam::cpu::GLAM_ISA
