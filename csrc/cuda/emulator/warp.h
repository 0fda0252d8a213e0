// CUDA's barriers and warp-wide functions over the scheduler. They may diverge from a GPU in being stricter: all lanes
// of a mask come from the same line, and a shuffle from a lane outside the mask, whose value a GPU leaves undefined, is
// an error.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/emulator/scheduler.h"

namespace glam::cuda::emulator {

constexpr int kWarpLanes = 32;

template <class T>
const Slot* exchange_values(unsigned mask, const T& value, const char* operation, Location here) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kSlotBytes);
  Slot slot = {};
  std::memcpy(slot.bytes, &value, sizeof(T));
  return exchange(mask, slot, operation, here);
}

template <class T>
T value_of(const Slot& slot) {
  std::remove_const_t<T> value;
  std::memcpy(&value, slot.bytes, sizeof(T));
  return value;
}

template <class T>
T shuffle(unsigned mask, const T& value, int source, const char* operation, Location here) {
  static_assert(sizeof(T) <= 8, "a GPU shuffles 4 or 8 bytes");
  const Slot* slots = exchange_values(mask, value, operation, here);
  if (!(mask >> source & 1)) {
    fail(std::string(operation) + " reads lane " + std::to_string(source) + ", which is not in the mask", here);
  }
  return value_of<T>(slots[source]);
}

// The fold of all lanes' values, by lane.
template <class T, class F>
T reduce(unsigned mask, T value, const char* operation, Location here, F&& fold) {
  const Slot* slots = exchange_values(mask, value, operation, here);
  int lane = __builtin_ctz(mask);
  T result = value_of<T>(slots[lane]);
  while (++lane < kWarpLanes) {
    if (mask >> lane & 1) result = fold(result, value_of<T>(slots[lane]));
  }
  return result;
}

template <class T>
unsigned lanes_with(unsigned mask, const Slot* slots, const T& value) {
  unsigned lanes = 0;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if ((mask >> lane & 1) && std::memcmp(slots[lane].bytes, &value, sizeof(T)) == 0) lanes |= 1u << lane;
  }
  return lanes;
}

}  // namespace glam::cuda::emulator

// --- The block

using GlamHere = glam::cuda::emulator::Location;

inline void __syncthreads(GlamHere here = GlamHere::current()) {
  glam::cuda::emulator::barrier(glam::cuda::emulator::Vote::none, 0, here);
}
inline int __syncthreads_count(int predicate, GlamHere here = GlamHere::current()) {
  return glam::cuda::emulator::barrier(glam::cuda::emulator::Vote::count, predicate, here);
}
inline int __syncthreads_and(int predicate, GlamHere here = GlamHere::current()) {
  return glam::cuda::emulator::barrier(glam::cuda::emulator::Vote::all, predicate, here);
}
inline int __syncthreads_or(int predicate, GlamHere here = GlamHere::current()) {
  return glam::cuda::emulator::barrier(glam::cuda::emulator::Vote::any, predicate, here);
}

// --- The warp

inline void __syncwarp(unsigned mask = 0xffffffffu, GlamHere here = GlamHere::current()) {
  glam::cuda::emulator::exchange(mask, glam::cuda::emulator::Slot(), "__syncwarp", here, true);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, GlamHere here = GlamHere::current()) {
  const int lane = static_cast<int>(glam::cuda::emulator::current->lane), segment = lane & ~(width - 1);
  return glam::cuda::emulator::shuffle(mask, value, segment | (source & (width - 1)), "__shfl_sync", here);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, GlamHere here = GlamHere::current()) {
  const int lane = static_cast<int>(glam::cuda::emulator::current->lane), other = lane ^ lane_mask;
  const bool later_segment = (other & ~(width - 1)) > lane;
  return glam::cuda::emulator::shuffle(mask, value, later_segment ? lane : other, "__shfl_xor_sync", here);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, GlamHere here = GlamHere::current()) {
  const int lane = static_cast<int>(glam::cuda::emulator::current->lane), distance = static_cast<int>(delta);
  const bool inside = (lane & (width - 1)) + distance < width;
  return glam::cuda::emulator::shuffle(mask, value, inside ? lane + distance : lane, "__shfl_down_sync", here);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, GlamHere here = GlamHere::current()) {
  const int lane = static_cast<int>(glam::cuda::emulator::current->lane), distance = static_cast<int>(delta);
  const bool inside = (lane & (width - 1)) >= distance;
  return glam::cuda::emulator::shuffle(mask, value, inside ? lane - distance : lane, "__shfl_up_sync", here);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, GlamHere here = GlamHere::current()) {
  const int vote = predicate != 0;
  return glam::cuda::emulator::lanes_with(mask,
                                          glam::cuda::emulator::exchange_values(mask, vote, "__ballot_sync", here), 1);
}
inline int __any_sync(unsigned mask, int predicate, GlamHere here = GlamHere::current()) {
  const int vote = predicate != 0;
  return glam::cuda::emulator::lanes_with(mask, glam::cuda::emulator::exchange_values(mask, vote, "__any_sync", here),
                                          1) != 0;
}
inline int __all_sync(unsigned mask, int predicate, GlamHere here = GlamHere::current()) {
  const int vote = predicate != 0;
  return glam::cuda::emulator::lanes_with(mask, glam::cuda::emulator::exchange_values(mask, vote, "__all_sync", here),
                                          0) == 0;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, GlamHere here = GlamHere::current()) {
  return glam::cuda::emulator::lanes_with(
      mask, glam::cuda::emulator::exchange_values(mask, value, "__match_any_sync", here), value);
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, GlamHere here = GlamHere::current()) {
  const unsigned same = glam::cuda::emulator::lanes_with(
      mask, glam::cuda::emulator::exchange_values(mask, value, "__match_all_sync", here), value);
  *all = same == mask;
  return *all ? mask : 0;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, GlamHere here = GlamHere::current()) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return static_cast<T>(glam::cuda::emulator::reduce(mask, static_cast<unsigned>(value), "__reduce_add_sync", here,
                                                     [](unsigned a, unsigned b) { return a + b; }));
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, GlamHere here = GlamHere::current()) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return glam::cuda::emulator::reduce(mask, value, "__reduce_min_sync", here, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, GlamHere here = GlamHere::current()) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return glam::cuda::emulator::reduce(mask, value, "__reduce_max_sync", here, [](T a, T b) { return a > b ? a : b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, GlamHere here = GlamHere::current()) {
  return glam::cuda::emulator::reduce(mask, value, "__reduce_and_sync", here,
                                      [](unsigned a, unsigned b) { return a & b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, GlamHere here = GlamHere::current()) {
  return glam::cuda::emulator::reduce(mask, value, "__reduce_or_sync", here,
                                      [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, GlamHere here = GlamHere::current()) {
  return glam::cuda::emulator::reduce(mask, value, "__reduce_xor_sync", here,
                                      [](unsigned a, unsigned b) { return a ^ b; });
}

// --- Memory order

inline void __threadfence() { glam::cuda::emulator::fence(); }
inline void __threadfence_block() { glam::cuda::emulator::fence(); }
inline void __threadfence_system() { glam::cuda::emulator::fence(); }
