// Expert and dense activations and their derivatives: relu and the tanh form of GELU (Hendrycks & Gimpel,
// arXiv 1606.08415): gelu(z) = z/2 * (1 + tanh(sqrt(2/pi) * (z + 0.044715 z^3))).
#pragma once

#include "cpu/kernels/math.h"
#include "cpu/kernels/vector.h"

namespace glam::cpu::GLAM_ISA {

template <class T>
inline constexpr T kSqrtTwoOverPi = static_cast<T>(0.79788456080286535588);
template <class T>
inline constexpr T kGeluCubic = static_cast<T>(0.044715);

template <class T>
inline T gelu(T z) {
  const T inner = kSqrtTwoOverPi<T> * (z + kGeluCubic<T> * z * z * z);
  return T(0.5) * z * (T(1) + tanh(inner));
}

template <class T>
inline T gelu_derivative(T z) {
  const T tanh_inner = tanh(kSqrtTwoOverPi<T> * (z + kGeluCubic<T> * z * z * z));
  const T inner_derivative = kSqrtTwoOverPi<T> * (T(1) + T(3) * kGeluCubic<T> * z * z);
  return T(0.5) * (T(1) + tanh_inner) + T(0.5) * z * (T(1) - tanh_inner * tanh_inner) * inner_derivative;
}

// In place: values <- act(values), or gelu(gates) * values for geglu.
template <class T>
inline void activate_vectors(Transform transform, int64_t count, T* values, const T* gates) {
  if (transform == Transform::relu) {
    for (int64_t i = 0; i < count; ++i) values[i] = values[i] < T(0) ? T(0) : values[i];  // a NaN stays
  } else if (transform == Transform::gelu) {
    for (int64_t i = 0; i < count; ++i) values[i] = gelu(values[i]);
  } else if (transform == Transform::geglu) {
    for (int64_t i = 0; i < count; ++i) values[i] = gelu(gates[i]) * values[i];
  }
}
// The remainder costs one vector: blocks of a product are short, and GELU element by element is slow.
template <class T>
inline void activate(Transform transform, int64_t count, T* values, const T* gates) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  const int64_t whole = count / lanes * lanes, left = count - whole;
  activate_vectors(transform, whole, values, gates);
  if (left == 0) return;
  T last[lanes] = {}, last_gates[lanes] = {};
  for (int64_t i = 0; i < left; ++i) last[i] = values[whole + i];
  for (int64_t i = 0; gates && i < left; ++i) last_gates[i] = gates[whole + i];
  activate_vectors(transform, lanes, last, last_gates);
  for (int64_t i = 0; i < left; ++i) values[whole + i] = last[i];
}

}  // namespace glam::cpu::GLAM_ISA
