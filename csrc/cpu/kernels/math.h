// exp, tanh and log of float that vectorise: no branch, no table, no call, and explicit fused multiply-adds, so that the
// body of a vectorised loop and its remainder give the same bits. double takes the C library's functions.
//
// Largest errors over all floats (tests/ops/test_math_kernels.py): exp 1, tanh 2, log 1 unit in the last place.
// Infinities, NaN, subnormal arguments and results are handled. The polynomials are minimax fits of relative error
// 4e-9 (exp on +-ln(2)/2, tanh up to 0.625) and 6e-9 (log between the square roots of 1/2 and 2).
#pragma once

#include <cmath>
#include <cstdint>

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

namespace math {

// 2^n for n in [-126, 127].
GLAM_INLINE float power_of_two(int32_t n) { return __builtin_bit_cast(float, (n + 127) << 23); }

}  // namespace math

template <class T>
GLAM_INLINE T exp(T x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return std::exp(x);
  } else {
    // Below the lower bound the result is 0, above the upper one infinity; a NaN passes both comparisons.
    const float clamped = x < -104.f ? -104.f : x > 89.f ? 89.f : x;
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    constexpr float kRound = 12582912.f;
    const float shifted = multiply_add(clamped, 1.44269504f, kRound);
    const float n = shifted - kRound;
    const int32_t exponent = __builtin_bit_cast(int32_t, shifted) - __builtin_bit_cast(int32_t, kRound);
    // ln 2 in two parts; n times the first is exact.
    const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, clamped));
    float p = 0.001381446490995586f;
    p = multiply_add(p, r, 0.008368780836462975f);
    p = multiply_add(p, r, 0.04166839271783829f);
    p = multiply_add(p, r, 0.1666651964187622f);
    p = multiply_add(p, r, 0.4999999403953552f);
    const float value = 1.f + multiply_add(r * r, p, r);
    // In two steps: 2^exponent itself may be out of range.
    const int32_t half = exponent >> 1;
    return value * math::power_of_two(half) * math::power_of_two(exponent - half);
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
