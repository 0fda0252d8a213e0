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

// With n = x / rms:  grad_x = (grad * scale - n * mean(grad * scale * n)) / rms,  grad_scale = sum of grad * n.
template <class T>
void backward(const void* grad, const void* x, Type type, const T* scale, T eps, int64_t rows, int64_t D, void* grad_x,
              T* grad_scale, T* scratch) {
  T *const normed = scratch, *const incoming = scratch + D;
  for (int64_t d = 0; d < D; ++d) grad_scale[d] = T(0);
  for (int64_t i = 0; i < rows; ++i) {
    load_values(advance(x, type, i * D), type, D, normed);
    load_values(advance(grad, type, i * D), type, D, incoming);
    const T root = reciprocal_root(normed, D, eps);
    for (int64_t d = 0; d < D; ++d) normed[d] *= root;
    for (int64_t d = 0; d < D; ++d) grad_scale[d] += incoming[d] * normed[d];
    for (int64_t d = 0; d < D; ++d) incoming[d] *= scale[d];
    LaneSums<T> products;
    products.add(D, [&](int64_t d) { return incoming[d] * normed[d]; });
    const T mean = products.total() / static_cast<T>(D);
    for (int64_t d = 0; d < D; ++d) incoming[d] = (incoming[d] - normed[d] * mean) * root;
    store_values(incoming, D, advance(grad_x, type, i * D), type);
  }
}

}  // namespace

extern const NormTable norm_table = {
    {&forward<float>, &backward<float>},
    {&forward<double>, &backward<double>},
};

}  // namespace glam::cpu::GLAM_ISA
