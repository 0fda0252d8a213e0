// Measures exp, tanh and log of csrc/cpu/kernels/math.h against double, and compares vectorised loops and vectors with
// single calls.
// Usage: math_kernels STRIDE tests every STRIDE-th float; prints one line "name largest-error mismatches" per function.

#include "cpu/kernels/math.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace kernels = glam::cpu::GLAM_ISA;

namespace {

constexpr int kCount = 4099;  // no multiple of a vector: a remainder loop runs too

template <float (*F)(float)>
__attribute__((noinline)) void apply(const float* x, float* y, int count) {
  for (int i = 0; i < count; ++i) y[i] = F(x[i]);
}

// Whole vectors by the vector's own function.
__attribute__((noinline)) void apply_vector_exp(const float* x, float* y, int count) {
  using Vector = kernels::VectorOf<float>::type;
  constexpr int lanes = kernels::VectorOf<float>::lanes;
  int i = 0;
  for (; i + lanes <= count; i += lanes) {
    *reinterpret_cast<Vector*>(y + i) = kernels::exp(*reinterpret_cast<const Vector*>(x + i));
  }
  for (; i < count; ++i) y[i] = kernels::exp(x[i]);
}

// In units of the last place of the exact result; 1e9 where NaN or infinity do not agree.
double error(float value, double exact) {
  const float nearest = static_cast<float>(exact);
  if (std::isnan(exact) || std::isnan(value)) return std::isnan(exact) && std::isnan(value) ? 0 : 1e9;
  if (std::isinf(nearest) || std::isinf(value)) return nearest == value ? 0 : 1e9;
  const float size = std::fabs(nearest);
  const double unit = std::nextafter(size, INFINITY) - static_cast<double>(size);
  return std::fabs(value - exact) / unit;
}

void measure(const char* name, void (*loop)(const float*, float*, int), double (*exact)(double), uint64_t stride) {
  static float x[kCount], y[kCount];
  double largest = 0;
  int64_t mismatches = 0;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32);) {
    int count = 0;
    for (; count < kCount && bits < (uint64_t{1} << 32); ++count, bits += stride) {
      const uint32_t word = static_cast<uint32_t>(bits);
      std::memcpy(&x[count], &word, sizeof(word));
    }
    loop(x, y, count);
    for (int i = 0; i < count; ++i) {
      const double e = error(y[i], exact(x[i]));
      if (e > largest) largest = e;
      float alone = 0;
      if (i % 61 == 0) loop(x + i, &alone, 1);
      mismatches += i % 61 == 0 && std::memcmp(&alone, &y[i], sizeof(alone)) != 0;
    }
  }
  std::printf("%s %.4f %lld\n", name, largest, static_cast<long long>(mismatches));
}

float exp_of(float x) { return kernels::exp(x); }
float tanh_of(float x) { return kernels::tanh(x); }
float log_of(float x) { return kernels::log(x); }

}  // namespace

int main(int argc, char** argv) {
  const uint64_t stride = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1009;
  measure("exp", &apply<exp_of>, &std::exp, stride);
  measure("vector_exp", &apply_vector_exp, &std::exp, stride);
  measure("tanh", &apply<tanh_of>, &std::tanh, stride);
  measure("log", &apply<log_of>, &std::log, stride);
}
