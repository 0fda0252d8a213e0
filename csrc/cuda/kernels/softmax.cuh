// What kernels that take softmaxes over rows share.
#pragma once

#include "cuda/kernels/rows.cuh"

namespace glam::cuda {

template <class S>
constexpr S kInfinity = std::numeric_limits<S>::infinity();
template <class S>
constexpr S kNaN = std::numeric_limits<S>::quiet_NaN();

// The largest value of the block, the same in every thread. `shared` is [kMaxWarps]; blocks are whole warps.
template <class S>
__device__ __forceinline__ S block_max(S value, S* shared) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  value = warp_max(value);
  if (lane == 0) store(shared + warp, value);
  __syncthreads();
  return warp_max(load(shared + lane % warps));
}

}  // namespace glam::cuda
