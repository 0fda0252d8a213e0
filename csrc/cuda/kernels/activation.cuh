// Activations of expert and dense layers and their derivatives: relu, the tanh form of GELU (Hendrycks and Gimpel,
// arXiv 1606.08415), gelu(z) = z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))), and GEGLU (arXiv 2002.05202).
#pragma once

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/experts.h"

namespace glam::cuda {

template <class Acc>
__device__ __forceinline__ Acc gelu_tanh(Acc z) {
  const Acc inner = static_cast<Acc>(0.79788456080286535588) * (z + static_cast<Acc>(0.044715) * z * z * z);
  if constexpr (std::is_same_v<Acc, double>) {
    return tanh(inner);
  } else {
    return tanhf(inner);
  }
}

template <class Acc>
__device__ __forceinline__ Acc gelu(Acc z) {
  return Acc(0.5) * z * (Acc(1) + gelu_tanh(z));
}

template <class Acc>
__device__ __forceinline__ Acc gelu_derivative(Acc z) {
  const Acc t = gelu_tanh(z);
  const Acc inner = static_cast<Acc>(0.79788456080286535588) * (Acc(1) + Acc(3) * static_cast<Acc>(0.044715) * z * z);
  return Acc(0.5) * (Acc(1) + t) + Acc(0.5) * z * (Acc(1) - t * t) * inner;
}

// act(pre), or gelu(gate) * pre.
template <class Acc>
__device__ __forceinline__ Acc activate(Activation activation, Acc pre, Acc gate) {
  if (activation == Activation::relu) return pre < Acc(0) ? Acc(0) : pre;  // a NaN stays
  return activation == Activation::gelu ? gelu(pre) : gelu(gate) * pre;
}

// The value of act and its derivatives with respect to pre and, for geglu, gate.
template <class Acc>
struct Activated {
  Acc value, by_pre, by_gate;
};
template <class Acc>
__device__ __forceinline__ Activated<Acc> differentiate(Activation activation, Acc pre, Acc gate) {
  if (activation == Activation::relu) return {pre < Acc(0) ? Acc(0) : pre, pre > Acc(0) ? Acc(1) : Acc(0), Acc(0)};
  if (activation == Activation::gelu) return {gelu(pre), gelu_derivative(pre), Acc(0)};
  const Acc activated = gelu(gate);
  return {activated * pre, activated, gelu_derivative(gate) * pre};
}

}  // namespace glam::cuda
