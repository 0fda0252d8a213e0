// CUDA for the host compiler: what kernels/device.cuh includes instead of the CUDA runtime.
//
// NVIDIA's own headers give the types (dim3, float4, __half, __nv_bfloat16) and their conversions, which work on the
// host. CUDA's qualifiers become nothing, its built-in variables read the running thread's position, and its functions
// are those of warp.h, atomics.h and functions.h. A kernel is thus an ordinary function that each fiber calls.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <concepts>
#include <source_location>
#include <string>
#include <type_traits>

#include "cuda/emulator/memory.h"
#include "cuda/emulator/scheduler.h"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __grid_constant__
#undef __launch_bounds__
#undef __forceinline__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
// __shared__ has no counterpart: such variables could be neither poisoned nor checked. shared_storage() is the way.

#define threadIdx (::glam::cuda::emulator::current->thread)
#define blockIdx (::glam::cuda::emulator::current->block)
#define blockDim (::glam::cuda::emulator::current->block_size)
#define gridDim (::glam::cuda::emulator::current->grid_size)
#define warpSize 32

#include "cuda/emulator/atomics.h"
#include "cuda/emulator/functions.h"
#include "cuda/emulator/warp.h"

namespace glam::cuda {

// Where in the source an access stands: a default argument of load(), store() and of functions that pass it on to them.
using Here = emulator::Location;

namespace emulator {

// A grid as launch() takes it: whatever a dim3 is made from, and the line on which that was written.
struct Grid : dim3 {
  Grid(dim3 size, Location here = Location::current()) : dim3(size), where(here) {}
  template <std::integral T>
  Grid(T blocks, Location here = Location::current()) : dim3(static_cast<unsigned>(blocks)), where(here) {}
  Grid(unsigned x, unsigned y, Location here = Location::current()) : dim3(x, y), where(here) {}
  Grid(unsigned x, unsigned y, unsigned z, Location here = Location::current()) : dim3(x, y, z), where(here) {}

  Location where;
};

}  // namespace emulator

// Runs the kernel to its end, or throws std::runtime_error with what it did wrong.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), emulator::Grid grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulator::run({reinterpret_cast<const void*>(kernel), grid.where, grid, block, shared_bytes},
                [&] { kernel(static_cast<Parameters>(arguments)...); });
}

template <class Struct>
Struct& shared_storage(Here here = Here::current()) {
  static_assert(alignof(Struct) <= emulator::kSharedAlignment);
  if (sizeof(Struct) > emulator::shared_memory.bytes) {
    emulator::fail("shared_storage of " + std::to_string(sizeof(Struct)) + " bytes in a launch with " +
                       std::to_string(emulator::shared_memory.bytes) + " bytes of shared memory",
                   here);
  }
  return *reinterpret_cast<Struct*>(emulator::shared_memory.data);
}

template <class T>
T load(const T* pointer, Here here = Here::current()) {
  static_assert(std::is_trivially_copyable_v<T>);
  emulator::check_access(emulator::Access::read, pointer, sizeof(T), alignof(T), here);
  return *pointer;
}

template <class T>
void store(T* pointer, std::type_identity_t<T> value, Here here = Here::current()) {
  static_assert(std::is_trivially_copyable_v<T>);
  emulator::check_access(emulator::Access::write, pointer, sizeof(T), alignof(T), here);
  *pointer = value;
}

}  // namespace glam::cuda
