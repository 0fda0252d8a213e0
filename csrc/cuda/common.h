// What the glue between torch and the CUDA kernels shares: pointers' types, the stream, the device.
//
// The same glue is compiled for CUDA tensors and, with GLAM_EMULATE, into a test library that takes over the CPU key
// and runs the emulated kernels on CPU tensors. GLAM_CUDA_KEY is the dispatch key it registers with.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "cuda/kernels/types.h"
#include "ops/common.h"
#include "ops/packed_weight.h"

#ifdef GLAM_EMULATE
#define GLAM_CUDA_KEY CPU
namespace glam::cuda {
inline const bool kHalfIsTaken = half_on_cpu() = true;
}
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define GLAM_CUDA_KEY CUDA
#endif

namespace glam::cuda {

// A limit of what is worked on at a time, with GLAM_EMULATE one that tests' small inputs go beyond.
#ifdef GLAM_EMULATE
constexpr int64_t limit(int64_t, int64_t emulated) { return emulated; }
#else
constexpr int64_t limit(int64_t bytes, int64_t) { return bytes; }
#endif

// Makes a tensor's device the current one, and knows the stream that its kernels run on.
class OnDevice {
 public:
#ifdef GLAM_EMULATE
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& tensor)
      : guard_(tensor.device()), stream_(c10::cuda::getCurrentCUDAStream(tensor.get_device())) {}
  cudaStream_t stream() const { return stream_; }

 private:
  c10::cuda::CUDAGuard guard_;
  cudaStream_t stream_;
#endif
};

inline Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return Type::f16;
    case at::kBFloat16:
      return Type::bf16;
    case at::kFloat:
      return Type::f32;
    case at::kDouble:
      return Type::f64;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for ", tensor.scalar_type());
  }
}

// Raises if this weight, "[D_in, D_out]" where plain, is packed: that is a format of the CPU kernels.
inline void refuse_packed(const char* op, const char* name, const char* letters, const Tensor& weight,
                          int64_t plain_dim) {
  TORCH_CHECK(!packed::is_packed(weight, plain_dim), op, ": expected ", name, " to be ", letters, " on ",
              weight.device(), ", got a packed one, which is a format of the CPU kernels");
}

// A tensor that kernels write in place: contiguous memory, copied back by finish() where that is not its own.
class InPlace {
 public:
  explicit InPlace(const Tensor& original) : original_(original), contiguous_(original.contiguous()) {}
  const Tensor& tensor() const { return contiguous_; }
  void* data() const { return contiguous_.mutable_data_ptr(); }
  void finish() const {
    if (!contiguous_.is_same(original_)) original_.copy_(contiguous_);
  }

 private:
  Tensor original_, contiguous_;
};

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Pointers that the launchers take; null for an absent tensor.
inline const void* data(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
inline void* mutable_data(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }
inline const int32_t* indices(const Tensor& tensor) { return tensor.const_data_ptr<int32_t>(); }

}  // namespace glam::cuda
