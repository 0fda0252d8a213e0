// Checks of the accesses that kernels make through load(), store(), atomics and the functions of ptx.cuh.
//
// Always: the address is a multiple of the type's alignment, and an access does not run over the end of the block's
// shared memory. Once arrays are registered: an access to global memory lies within one of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/emulator/scheduler.h"

namespace glam::cuda::emulator {

enum class Access { read, write, atomic };

void register_array(const void* array, size_t bytes, const std::string& name);
void forget_arrays();

// True while arrays are registered or accesses are counted.
extern bool watching;

[[noreturn]] void fail_alignment(const void* address, size_t alignment, Location here);
[[noreturn]] void fail_shared(const void* address, size_t bytes, Location here);
void watch(Access access, const void* address, size_t bytes, Location here);

inline void check_access(Access access, const void* address, size_t bytes, size_t alignment, Location here) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail_alignment(address, alignment, here);
  const uintptr_t offset = shared_memory.offset_of(address);
  if (offset < shared_memory.bytes + kSharedMargin && offset + bytes > shared_memory.bytes) {
    fail_shared(address, bytes, here);
  }
  if (watching) watch(access, address, bytes, here);
}

// Of an instruction that takes addresses in shared memory only.
inline void check_shared(Access access, const void* address, size_t bytes, size_t alignment, Location here) {
  if (!shared_memory.contains(address)) fail_shared(address, bytes, here);
  check_access(access, address, bytes, alignment, here);
}

}  // namespace glam::cuda::emulator
