// Small kernels that exercise what the emulator watches for, each right or with one planted bug: a barrier, a wait, a
// fence or an atomic left out, an element too many. The launchers take host memory.
#pragma once

#include <cuda_bf16.h>

namespace planted {

enum class Bug {
  none,
  row_without_barrier,        // after the warps' partial sums
  sort_without_zeroing,       // barrier after the counters are zeroed
  sort_without_histogram,     // barrier after the histogram
  sort_without_scan,          // barrier after the scan
  sort_without_warp_barrier,  // between reading and updating a counter
  product_overwrites_stage,   // barrier before a stage's next copy
  product_without_wait,       // for the asynchronous copies
  count_without_atomic,       // adds to one number from several blocks
  count_past_the_end,         // reads one element too many, by a plain pointer
  total_without_fence,        // between a block's result and its ticket
};

// y[r] = x[r] / sum(x[r]) for rows of `columns`: shuffles in a warp, shared memory between warps.
void row_normalize(Bug bug, const float* x, float* y, int rows, int columns);

// A stable counting sort of expert ids: order[i] is the place of the i-th id, offsets[e] the first place of expert e.
void sort_by_expert(Bug bug, const int* experts, int count, int num_experts, int* offsets, int* order);

// c[m, n] = a[m, k] b[k, n] with copies one stage ahead; k and n are multiples of 8.
void product(Bug bug, const __nv_bfloat16* a, const __nv_bfloat16* b, __nv_bfloat16* c, int m, int n, int k);

// Adds the number of positive elements to *total.
void count_positive(Bug bug, const int* x, int count, int* total);

// *total = the sum of x, by the block that finishes last; partials has one element per 32 of x, *tickets is 0.
void last_block_total(Bug bug, const int* x, int count, int* partials, unsigned* tickets, int* total);

}  // namespace planted
