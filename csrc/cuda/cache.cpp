// CUDA kernel of glam::reorder_cache_. Beams are not read on the host: where the CPU kernel raises for one outside
// [0, B), its row of the cache becomes NaN here.

#include "cuda/kernels/cache.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "cuda/common.h"
#include "ops/checks.h"

namespace glam::cuda {
namespace {

void reorder(Tensor& cache_, const Tensor& beams_) {
  checks::reorder_cache(cache_, beams_);
  at::assert_no_internal_overlap(cache_);
  if (cache_.numel() == 0) return;
  const OnDevice device(cache_);
  const InPlace cache(cache_);
  const Tensor beams = beams_.contiguous();
  const int64_t B = cache_.size(0), row_bytes = cache_.numel() / B * static_cast<int64_t>(cache_.element_size());
  const Tensor workspace = at::empty({reorder_workspace_bytes(B)}, cache_.options().dtype(at::kByte));
  reorder_cache(cache.data(), beams.const_data_ptr<int64_t>(), B, row_bytes, mutable_data(workspace), device.stream());
  cache.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) { m.impl("reorder_cache_", reorder); }

}  // namespace glam::cuda
