// The one header that every kernel file includes: launches, shared memory, memory access, number types.
//
// The same kernel source is compiled by nvcc for a GPU and by the host compiler for the emulator (csrc/cuda/emulator),
// which runs each CUDA thread as a fiber; this file is where the two part. A kernel therefore
//   - is started with launch(), never with <<< >>>;
//   - keeps shared memory in one struct, shared_storage<Struct>();
//   - reads and writes arrays in global and shared memory with load(), store() and their vector forms, which the
//     emulator checks and counts.
#pragma once

#ifdef GLAM_EMULATE
#include "cuda/emulator/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace glam::cuda {

constexpr size_t kDefaultSharedBytes = 48 * 1024;  // more must be asked for

// Runs kernel(arguments...) on `stream`. Throws where the launch is refused; errors while it runs surface later, as for
// every CUDA kernel.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kDefaultSharedBytes) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("glam: a CUDA kernel could not be launched: ") + cudaGetErrorString(error));
  }
}

// The block's dynamic shared memory, of which a kernel passes sizeof(Struct) (or more) to launch().
template <class Struct>
__device__ __forceinline__ Struct& shared_storage() {
  extern __shared__ __align__(128) unsigned char glam_shared_memory[];
  return *reinterpret_cast<Struct*>(glam_shared_memory);
}

// Where in the source an access stands. The emulator names it in errors and counts by it; a GPU has no use for it.
struct Here {
  static __host__ __device__ constexpr Here current() { return {}; }
};

template <class T>
__device__ __forceinline__ T load(const T* pointer, Here = Here::current()) {
  return *pointer;
}
template <class T>
__device__ __forceinline__ void store(T* pointer, T value, Here = Here::current()) {
  *pointer = value;
}

}  // namespace glam::cuda
#endif

#include "cuda/kernels/numbers.cuh"
