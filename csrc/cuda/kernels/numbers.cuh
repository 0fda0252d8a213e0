// Number types of the kernels, 16-byte vectors of them, and reductions over a warp in a fixed order.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/kernels/types.h"

namespace glam::cuda {

using f16 = __half;
using bf16 = __nv_bfloat16;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Where sums, softmaxes and statistics of T are kept.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ double wide(double x) { return x; }
__device__ __forceinline__ float wide(f16 x) { return __half2float(x); }
__device__ __forceinline__ float wide(bf16 x) { return __bfloat162float(x); }

// Rounded to nearest even.
template <class T, class S>
__device__ __forceinline__ T narrow(S x) {
  if constexpr (std::is_same_v<T, f16>) {
    return __float2half_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

// Elements that a thread moves at once: 16 bytes, or fewer where it moves as many of a wider type beside them.
template <class T, int kSize = 16 / sizeof(T)>
struct alignas(kSize * sizeof(T)) Vector {
  static constexpr int size = kSize;
  T values[size];

  __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

template <class T, int size = Vector<T>::size>
__device__ __forceinline__ Vector<T, size> load_vector(const T* pointer, Here here = Here::current()) {
  return load(reinterpret_cast<const Vector<T, size>*>(pointer), here);
}
template <class T, int size>
__device__ __forceinline__ void store_vector(T* pointer, const Vector<T, size>& vector, Here here = Here::current()) {
  store(reinterpret_cast<Vector<T, size>*>(pointer), vector, here);
}

// Sums over the lanes of a warp in the order of a butterfly: the same bits in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(T{}) for the C++ type of `type`.
template <class F>
void dispatch_type(Type type, F&& f) {
  switch (type) {
    case Type::f16:
      return f(f16{});
    case Type::bf16:
      return f(bf16{});
    case Type::f32:
      return f(float{});
    case Type::f64:
      return f(double{});
  }
}

// f(S{}) for the type in which sums of `type` are kept.
template <class F>
void dispatch_sum(Type type, F&& f) {
  if (type == Type::f64) {
    f(double{});
  } else {
    f(float{});
  }
}

// 16-byte accesses are possible to rows of `columns` elements that start at the pointers.
template <class T, class... Pointers>
bool rows_are_vectors(int64_t columns, Pointers... pointers) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return columns % Vector<T>::size == 0 && (aligned(pointers) && ...);
}

}  // namespace glam::cuda
