// Sums whose order is fixed by the column mod 16 and then a binary tree: the same for every instruction set.
#pragma once

#include <cstdint>

namespace glam::cpu::GLAM_ISA {

inline constexpr int kLanes = 16;

template <class T>
struct LaneSums {
  T lane[kLanes] = {};

  // Adds term(i) for i in [0, count). Successive calls continue in the same lanes if earlier counts were multiples of
  // kLanes.
  template <class F>
  void add(int64_t count, F&& term) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) lane[l] += term(i + l);
    }
    for (int l = 0; i + l < count; ++l) lane[l] += term(i + l);
  }
  T total() const {
    T sums[kLanes];
    for (int l = 0; l < kLanes; ++l) sums[l] = lane[l];
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
    }
    return sums[0];
  }
};

}  // namespace glam::cpu::GLAM_ISA
