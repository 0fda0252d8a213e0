// exp, tanh and log of float that vectorise: no branch, no table, no call, and explicit fused multiply-adds, so that the
// body of a vectorised loop and its remainder give the same bits. double takes the C library's functions.
//
// Largest errors over all floats (tests/ops/test_math_kernels.py): exp 1, tanh 2, log 1 unit in the last place.
// Infinities, NaN, subnormal arguments and results are handled. The polynomials are minimax fits of relative error
// 4e-9 (exp on +-ln(2)/2, tanh up to 0.625) and 6e-9 (log between the square roots of 1/2 and 2).
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/kernels/vector.h"

#define GLAM_INLINE inline __attribute__((always_inline))

namespace glam::cpu::GLAM_ISA {

// a * b + c: fused where the instruction set has it.
GLAM_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
GLAM_INLINE double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512F__)
GLAM_INLINE VectorOf<float>::type multiply_add(VectorOf<float>::type a, VectorOf<float>::type b,
                                               VectorOf<float>::type c) {
  return (VectorOf<float>::type)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(__FMA__) && !defined(GLAM_EMULATE_AVX512BF16)
GLAM_INLINE VectorOf<float>::type multiply_add(VectorOf<float>::type a, VectorOf<float>::type b,
                                               VectorOf<float>::type c) {
  return (VectorOf<float>::type)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
GLAM_INLINE VectorOf<float>::type multiply_add(VectorOf<float>::type a, VectorOf<float>::type b,
                                               VectorOf<float>::type c) {
  for (int l = 0; l < VectorOf<float>::lanes; ++l) c[l] = multiply_add(a[l], b[l], c[l]);
  return c;
}
#endif

namespace math {

// int32_t for a float, and a vector of them for a vector.
template <class V>
struct IntegersOf {
  using type = decltype(V{} < V{});
};
template <>
struct IntegersOf<float> {
  using type = int32_t;
};
template <class V>
using Integers = typename IntegersOf<V>::type;

// 2^n for n in [-126, 127].
template <class V, class N>
GLAM_INLINE V power_of_two(N n) {
  return __builtin_bit_cast(V, (n + 127) << 23);
}

// value * 2^n, rounded once, for n in [-150, 129]; both are integers.
template <class V>
GLAM_INLINE V scale_by_power(V value, V, Integers<V> n) {
  const Integers<V> half = n >> 1;  // 2^n itself may be out of range
  return value * power_of_two<V>(half) * power_of_two<V>(n - half);
}
#if defined(__AVX512F__)
GLAM_INLINE VectorOf<float>::type scale_by_power(VectorOf<float>::type value, VectorOf<float>::type n,
                                                 Integers<VectorOf<float>::type>) {
  return (VectorOf<float>::type)_mm512_scalef_ps((__m512)value, (__m512)n);
}
#endif

// Of a float, or of each in a vector.
template <class V>
GLAM_INLINE V exp_of_floats(V x) {
  const auto all = [](float value) { return V{} + value; };
  // Below the lower bound the result is 0, above the upper one infinity; a NaN passes both comparisons.
  const V clamped = x < all(-104.f) ? all(-104.f) : x > all(89.f) ? all(89.f) : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  constexpr float kRound = 12582912.f;
  const V shifted = multiply_add(clamped, all(1.44269504f), all(kRound));
  const V n = shifted - kRound;
  const Integers<V> exponent = __builtin_bit_cast(Integers<V>, shifted) - __builtin_bit_cast(int32_t, kRound);
  // ln 2 in two parts; n times the first is exact.
  const V r = multiply_add(n, all(2.12194440e-4f), multiply_add(n, all(-0.693359375f), clamped));
  V p = all(0.001381446490995586f);
  p = multiply_add(p, r, all(0.008368780836462975f));
  p = multiply_add(p, r, all(0.04166839271783829f));
  p = multiply_add(p, r, all(0.1666651964187622f));
  p = multiply_add(p, r, all(0.4999999403953552f));
  const V value = 1.f + multiply_add(r * r, p, r);
  return scale_by_power(value, n, exponent);
}

}  // namespace math

// Of a number, or of each in a vector.
template <class T>
GLAM_INLINE T exp(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return std::exp(x);
  } else if constexpr (std::is_same_v<T, float>) {
    return math::exp_of_floats(x);
  } else if constexpr (sizeof(x[0]) == sizeof(double)) {
    for (int l = 0; l < VectorOf<double>::lanes; ++l) x[l] = std::exp(x[l]);
    return x;
  } else {
    return math::exp_of_floats(x);
  }
}

template <class T>
GLAM_INLINE T tanh(T x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return std::tanh(x);
  } else {
    const float magnitude = __builtin_fabsf(x);
    const float z = x * x;
    float p = -0.005704978480935097f;
    p = multiply_add(p, z, 0.020639078691601753f);
    p = multiply_add(p, z, -0.05373971164226532f);
    p = multiply_add(p, z, 0.13331441581249237f);
    p = multiply_add(p, z, -0.3333328068256378f);
    const float near_zero = multiply_add(x * z, p, x);
    // From 9.02 on the result rounds to 1.
    const float capped = magnitude > 10.f ? 10.f : magnitude;
    const float far = 1.f - 2.f / (exp<float>(2.f * capped) + 1.f);
    return magnitude < 0.625f ? near_zero : __builtin_copysignf(far, x);
  }
}

template <class T>
GLAM_INLINE T log(T x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return std::log(x);
  } else {
    const bool subnormal = x < 1.17549435e-38f;
    const int32_t bits = __builtin_bit_cast(int32_t, subnormal ? x * 8388608.f : x);
    // x = m * 2^exponent with m in [sqrt(1/2), sqrt(2)).
    const int32_t exponent = (bits - 0x3f3504f3) >> 23;
    const float m = __builtin_bit_cast(float, bits - (exponent << 23));
    const float n = static_cast<float>(subnormal ? exponent - 23 : exponent);
    const float f = m - 1.f, f2 = f * f;
    float p = -0.07634429633617401f;
    p = multiply_add(p, f, 0.12761549651622772f);
    p = multiply_add(p, f, -0.131601944565773f);
    p = multiply_add(p, f, 0.14201761782169342f);
    p = multiply_add(p, f, -0.16623356938362122f);
    p = multiply_add(p, f, 0.20001226663589478f);
    p = multiply_add(p, f, -0.250008225440979f);
    p = multiply_add(p, f, 0.3333333134651184f);
    const float low = multiply_add(n, -2.12194440e-4f, multiply_add(-0.5f, f2, f * f2 * p));
    const float value = multiply_add(n, 0.693359375f, f + low);
    const float special = x == 0.f ? -__builtin_inff() : x > 0.f ? x : __builtin_nanf("");  // 0; +inf; below 0 and NaN
    return x > 0.f && x < __builtin_inff() ? value : special;
  }
}

}  // namespace glam::cpu::GLAM_ISA
