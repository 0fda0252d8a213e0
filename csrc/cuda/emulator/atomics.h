// CUDA's atomics, each a relaxed atomic of the host, so that ThreadSanitizer knows them as such. In random order any of
// them may let other threads in first.
#pragma once

#include <algorithm>
#include <concepts>
#include <type_traits>

#include "cuda/emulator/memory.h"

namespace glam::cuda::emulator {

// Replaces the value by change(value); returns the old one.
template <class T, class F>
T atomically(T* address, Location here, F&& change) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  check_access(Access::atomic, address, sizeof(T), alignof(T), here);
  maybe_yield();
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = change(before);
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

template <class T>
concept Word = std::integral<T> && (sizeof(T) == 4 || sizeof(T) == 8);

}  // namespace glam::cuda::emulator

template <class T>
  requires std::is_arithmetic_v<T>
T atomicAdd(T* address, std::type_identity_t<T> value, std::source_location here = std::source_location::current()) {
  return glam::cuda::emulator::atomically(address, here, [=](T old) -> T {
    if constexpr (std::is_integral_v<T>) {
      using Bits = std::make_unsigned_t<T>;  // wraps around without undefined behaviour
      return static_cast<T>(static_cast<Bits>(old) + static_cast<Bits>(value));
    } else {
      return old + value;
    }
  });
}
template <glam::cuda::emulator::Word T>
T atomicSub(T* address, std::type_identity_t<T> value, std::source_location here = std::source_location::current()) {
  return atomicAdd(address, static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(value)), here);
}
template <glam::cuda::emulator::Word T>
T atomicMin(T* address, std::type_identity_t<T> value, std::source_location here = std::source_location::current()) {
  return glam::cuda::emulator::atomically(address, here, [=](T old) { return std::min(old, value); });
}
template <glam::cuda::emulator::Word T>
T atomicMax(T* address, std::type_identity_t<T> value, std::source_location here = std::source_location::current()) {
  return glam::cuda::emulator::atomically(address, here, [=](T old) { return std::max(old, value); });
}
template <glam::cuda::emulator::Word T>
T atomicAnd(T* address, std::type_identity_t<T> value, std::source_location here = std::source_location::current()) {
  return glam::cuda::emulator::atomically(address, here, [=](T old) -> T { return old & value; });
}
template <glam::cuda::emulator::Word T>
T atomicOr(T* address, std::type_identity_t<T> value, std::source_location here = std::source_location::current()) {
  return glam::cuda::emulator::atomically(address, here, [=](T old) -> T { return old | value; });
}
template <glam::cuda::emulator::Word T>
T atomicXor(T* address, std::type_identity_t<T> value, std::source_location here = std::source_location::current()) {
  return glam::cuda::emulator::atomically(address, here, [=](T old) -> T { return old ^ value; });
}
template <class T>
  requires std::is_arithmetic_v<T>
T atomicExch(T* address, std::type_identity_t<T> value, std::source_location here = std::source_location::current()) {
  return glam::cuda::emulator::atomically(address, here, [=](T) { return value; });
}
template <glam::cuda::emulator::Word T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value,
            std::source_location here = std::source_location::current()) {
  return glam::cuda::emulator::atomically(address, here, [=](T old) { return old == expected ? value : old; });
}
// Counts up to `limit`, then starts again at 0.
inline unsigned atomicInc(unsigned* address, unsigned limit,
                          std::source_location here = std::source_location::current()) {
  return glam::cuda::emulator::atomically(address, here, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}
inline unsigned atomicDec(unsigned* address, unsigned limit,
                          std::source_location here = std::source_location::current()) {
  return glam::cuda::emulator::atomically(address, here,
                                          [=](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}
