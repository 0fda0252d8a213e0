// glam::pack_weight and unpack_weight have no CUDA kernels: the layout is made for the CPU's vector instructions. Every
// op that takes packed weights refuses them on a GPU.

#include "ops/packed_weight.h"

#include "cuda/common.h"

namespace glam::cuda {
namespace {

Tensor pack(const Tensor& weight, at::ScalarType dtype) {
  packed::packed_shape(weight, dtype);
  TORCH_CHECK(false, "glam::pack_weight: expected weight to be on the CPU, got ", weight.device(),
              "; packed weights are a format of the CPU kernels");
}

Tensor unpack(const Tensor& packed) {
  packed::unpacked_shape(packed);
  TORCH_CHECK(false, "glam::unpack_weight: expected packed to be on the CPU, got ", packed.device(),
              "; packed weights are a format of the CPU kernels");
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("pack_weight", pack);
  m.impl("unpack_weight", unpack);
}

}  // namespace glam::cuda
