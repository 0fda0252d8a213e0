// Softmax over the experts, one warp per token: lane l holds experts l, l + 32, ... in registers.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/kernels/device.cuh"

namespace glam::cuda {

// The value and index of the largest over a warp, the lowest index among equals; no value is NaN.
template <class T>
struct Largest {
  T value;
  int index;

  __device__ void take(T other, int other_index) {
    if (other > value || (other == value && other_index < index)) {
      value = other;
      index = other_index;
    }
  }
  __device__ void over_warp() {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      const T other = __shfl_xor_sync(kAllLanes, value, distance);
      const int other_index = __shfl_xor_sync(kAllLanes, index, distance);
      take(other, other_index);
    }
  }
};

// A token's probabilities, expert lane + 32 i in p[i].
template <class Acc, int per_lane>
struct Probabilities {
  Acc p[per_lane];
  int E, lane;

  __device__ Probabilities(int E_, int lane_) : E(E_), lane(lane_) {}
  __device__ int expert(int i) const { return lane + kWarp * i; }

  // False, in all lanes, if a logit is not finite; p is 0 then.
  template <class T>
  __device__ bool softmax(const T* logits_E) {
    bool finite = true;
    Acc top = -std::numeric_limits<Acc>::infinity();
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      p[i] = expert(i) < E ? static_cast<Acc>(wide(load(logits_E + expert(i)))) : Acc(0);
      finite &= p[i] - p[i] == Acc(0);
      if (expert(i) < E && p[i] > top) top = p[i];
    }
    finite = __all_sync(kAllLanes, finite);
    top = warp_max(top);
    Acc total = 0;
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      p[i] = finite && expert(i) < E ? exp(p[i] - top) : Acc(0);
      total += p[i];
    }
    total = warp_sum(total);
#pragma unroll
    for (int i = 0; i < per_lane; ++i) p[i] = finite ? p[i] / total : Acc(0);
    return finite;
  }

  __device__ Acc of(int wanted) const {
    Acc mine = 0;
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      if (expert(i) == wanted) mine = p[i];
    }
    return __shfl_sync(kAllLanes, mine, wanted % kWarp);
  }

  // The first of the largest; `without` counts as 0 (-1: none).
  __device__ int first_largest(int without) const {
    Largest<Acc> largest{Acc(-1), E};
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      if (expert(i) < E) largest.take(expert(i) == without ? Acc(0) : p[i], expert(i));
    }
    largest.over_warp();
    return largest.index;
  }
};

// f(std::integral_constant<int, n>) with the least n of 1, 2, 4, ... such that 32 n >= E.
template <class F>
void dispatch_per_lane(int64_t E, F&& f) {
  if (E <= 32) return f(std::integral_constant<int, 1>{});
  if (E <= 64) return f(std::integral_constant<int, 2>{});
  if (E <= 128) return f(std::integral_constant<int, 4>{});
  if (E <= 256) return f(std::integral_constant<int, 8>{});
  if (E <= 512) return f(std::integral_constant<int, 16>{});
  f(std::integral_constant<int, 32>{});
}

}  // namespace glam::cuda
