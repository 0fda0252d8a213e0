// What the launchers of all CUDA kernels share with the glue that calls them: element types and the stream. No CUDA
// header, so that the glue compiles without a toolkit.
#pragma once

#include <cstdint>

using cudaStream_t = struct CUstream_st*;

namespace glam::cuda {

// Of an array that a launcher takes as void*.
enum class Type { f16, bf16, f32, f64 };

constexpr int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

}  // namespace glam::cuda
