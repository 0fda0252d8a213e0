// The register-wide vector of the instruction set this file is compiled for, by GCC's vector extension, and the
// conversions between storage types and the accumulation type (float, or double for float64).
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/operand.h"

namespace glam::cpu::GLAM_ISA {

// GLAM_EMULATE_AVX512BF16: that set's product core in ordinary code, with which tests run it on any CPU.
#if defined(__AVX512F__) || defined(GLAM_EMULATE_AVX512BF16)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  static constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(T));
  using type __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias)) = T;
};

inline float bf16_to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Round to nearest even; a NaN stays a quiet NaN.
inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

template <class T>
inline T round_to_bf16(T value) {
  return static_cast<T>(bf16_to_float(float_to_bf16(static_cast<float>(value))));
}
inline typename VectorOf<float>::type round_to_bf16(typename VectorOf<float>::type value) {
  const auto bits = (typename VectorOf<uint32_t>::type)value, upper = bits & 0xffff0000u;
  const auto rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  return (typename VectorOf<float>::type)((bits & 0x7fffffffu) > 0x7f800000u ? upper | 0x400000u : rounded);
}

#if defined(__AVX512BF16__)
// 16 + 16 floats as 32 bfloat16; subnormal numbers become zeros.
inline __m512i round_pair(const float* low, const float* high) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(high), _mm512_loadu_ps(low));
}
#endif

// A vector of int8 numbers as floats; GCC converts such vectors element by element.
inline typename VectorOf<float>::type to_floats(const int8_t* values) {
  using Vector = typename VectorOf<float>::type;
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))));
#elif defined(__AVX2__) && !defined(GLAM_EMULATE_AVX512BF16)
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))));
#else
  Vector result;
  for (int l = 0; l < VectorOf<float>::lanes; ++l) result[l] = static_cast<float>(values[l]);
  return result;
#endif
}

inline typename VectorOf<double>::type to_doubles(const double* values) {
  return *reinterpret_cast<const typename VectorOf<double>::type*>(values);
}
// GCC converts such vectors by halves.
inline typename VectorOf<double>::type to_doubles(const float* values) {
  using Vector = typename VectorOf<double>::type;
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtps_pd(_mm256_loadu_ps(values));
#elif defined(__AVX2__) && !defined(GLAM_EMULATE_AVX512BF16)
  return (Vector)_mm256_cvtps_pd(_mm_loadu_ps(values));
#else
  Vector result;
  for (int l = 0; l < VectorOf<double>::lanes; ++l) result[l] = values[l];
  return result;
#endif
}

// A stored number as T; uint16_t holds a bfloat16.
template <class T, class Value>
inline T value_as(Value value) {
  if constexpr (std::is_same_v<Value, uint16_t>) {
    return static_cast<T>(bf16_to_float(value));
  } else {
    return static_cast<T>(value);
  }
}

// f(the values of `type` at `data`, by their type).
template <class F>
inline auto with_values(const void* data, Type type, F&& f) {
  if (type == Type::f32) return f(static_cast<const float*>(data));
  if (type == Type::bf16) return f(static_cast<const uint16_t*>(data));
  return f(static_cast<const double*>(data));
}

// count contiguous values of `type` at `data` as T; the loops vectorise.
template <class T>
inline void load_values(const void* data, Type type, int64_t count, T* out) {
  with_values(data, type, [&](const auto* in) {
    for (int64_t i = 0; i < count; ++i) out[i] = value_as<T>(in[i]);
  });
}

// Past the caches, in whole lines; `out` is aligned to a vector. finish_streaming() before another thread may look.
template <class T>
inline void stream_values(const T* in, int64_t count, T* out) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  using Register = __m512i;
#elif defined(__AVX2__)
  using Register = __m256i;
#else
  using Register = __m128i;
#endif
  constexpr int64_t lanes = sizeof(Register) / sizeof(T);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    auto* const to = reinterpret_cast<Register*>(out + i);
    const auto* const from = reinterpret_cast<const Register*>(in + i);
#if defined(__AVX512F__)
    _mm512_stream_si512(to, _mm512_loadu_si512(from));
#elif defined(__AVX2__)
    _mm256_stream_si256(to, _mm256_loadu_si256(from));
#else
    _mm_stream_si128(to, _mm_loadu_si128(from));
#endif
  }
  for (; i < count; ++i) out[i] = in[i];
#else
  for (int64_t i = 0; i < count; ++i) out[i] = in[i];
#endif
}
inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class T>
inline void store_values(const T* in, int64_t count, void* data, Type type) {
  if (type == Type::f32) {
    auto* out = static_cast<float*>(data);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]);
  } else if (type == Type::bf16) {
    auto* out = static_cast<uint16_t*>(data);
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, float>) {
      for (; i + 32 <= count; i += 32) _mm512_storeu_si512(out + i, round_pair(in + i, in + i + 16));
    }
#endif
    for (; i < count; ++i) out[i] = float_to_bf16(static_cast<float>(in[i]));
  } else {
    auto* out = static_cast<double*>(data);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<double>(in[i]);
  }
}

}  // namespace glam::cpu::GLAM_ISA
