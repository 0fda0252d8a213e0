// Reordering of a cache by beams: cache[b] <- old cache[beams[b]], in place.
//
// cache is B contiguous rows of row_bytes, beams [B] int64. Each block takes 16-byte columns of all rows: it gathers
// what they become into a buffer, then writes it back, so that a second copy of the cache never exists. The buffer lies
// in shared memory or, for a very large B, in `workspace` of reorder_workspace_bytes(), a bounded size.
// A row whose beam stays is not touched. Nobody checks a beam before the launch: one outside [0, B) fills its row with
// one-bits, which are NaN in every floating type.
#pragma once

#include "cuda/kernels/types.h"

namespace glam::cuda {

int64_t reorder_workspace_bytes(int64_t B);
void reorder_cache(void* cache, const int64_t* beams, int64_t B, int64_t row_bytes, void* workspace,
                   cudaStream_t stream);

}  // namespace glam::cuda
