#include "cpu/kernels/gating.h"

#include "cpu/kernels/lanes.h"
#include "cpu/kernels/math.h"
#include "cpu/kernels/vector.h"

namespace glam::cpu::GLAM_ISA {
namespace {

constexpr int64_t kFew = 32;  // not worth the lanes

// In lanes of their own, as one maximum after the other would not vectorise.
template <class T>
T largest(const T* values, int64_t count) {
  if (count < kFew) {
    T top = values[0];
    for (int64_t i = 1; i < count; ++i) top = values[i] > top ? values[i] : top;
    return top;
  }
  T lanes[kLanes];
  for (T& lane : lanes) lane = values[0];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] = values[i + l] > lanes[l] ? values[i + l] : lanes[l];
  }
  for (; i < count; ++i) lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
  T top = lanes[0];
  for (const T lane : lanes) top = lane > top ? lane : top;
  return top;
}

template <class T>
int64_t first_largest(const T* values, int64_t count) {
  const T top = largest(values, count);
  int64_t i = 0;
  while (i + 1 < count && values[i] != top) ++i;
  return i;
}

template <class T>
bool softmax(const void* logits, Type type, int64_t count, T* p) {
  load_values(logits, type, count, p);
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= p[i] - p[i] == T(0);
  if (!finite) return false;
  const T top = largest(p, count);
  for (int64_t i = 0; i < count; ++i) p[i] = exp(p[i] - top);
  T total = 0;
  if (count < kFew) {
    for (int64_t i = 0; i < count; ++i) total += p[i];
  } else {
    LaneSums<T> sum;
    sum.add(count, [&](int64_t i) { return p[i]; });
    total = sum.total();
  }
  for (int64_t i = 0; i < count; ++i) p[i] /= total;
  return true;
}

}  // namespace

extern const GatingTable gating_table = {.f32 = {.softmax = &softmax<float>, .first_largest = &first_largest<float>},
                                         .f64 = {.softmax = &softmax<double>, .first_largest = &first_largest<double>}};

}  // namespace glam::cpu::GLAM_ISA
