// Index tensors are checked on the CPU before they address memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

namespace glam::cpu {

// A contiguous int32 tensor of indices below `limit`, at least `lowest`.
inline void check_indices(const char* op, const char* name, const at::Tensor& indices, int64_t limit,
                          int64_t lowest = 0) {
  const auto* const values = indices.const_data_ptr<int32_t>();
  at::parallel_for(0, indices.numel(), 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      TORCH_CHECK(values[i] >= lowest && values[i] < limit, op, ": expected ", name, " to be in [", lowest, ", ", limit,
                  "), got ", values[i]);
    }
  });
}

}  // namespace glam::cpu
