// ordered_sum: each block strides through x, and a second kernel adds the blocks' sums; a small x needs one block
// alone. router_statistics: integers, counted without atomics by blocks that each look for a few experts.

#include "cuda/kernels/model.h"

#include "cuda/kernels/rows.cuh"

namespace glam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCounters = 6;       // beside the experts'
constexpr int kExpertsAtOnce = 8;  // counted by a block

struct SumShared {
  double sums[kMaxWarps];
};

// A block's share of x; a lone block writes the result.
template <bool aligned, class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(const T* x, int64_t count, double* partial_B, T* out) {
  constexpr int size = Vector<T>::size;
  auto& shared = shared_storage<SumShared>();
  double sum = 0;
  const int64_t stride = int64_t{gridDim.x} * kThreads * size;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * size; i < count; i += stride) {
    const Vector<T> part = load_part<aligned>(x, i, count);
#pragma unroll
    for (int j = 0; j < size; ++j) sum += static_cast<double>(wide(part[j]));
  }
  sum = block_sum(sum, shared.sums);
  if (threadIdx.x > 0) return;
  if (gridDim.x == 1) {
    store(out, narrow<T>(sum));
  } else {
    store(partial_B + blockIdx.x, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_sums_kernel(const double* partial_B, int blocks, T* out) {
  auto& shared = shared_storage<SumShared>();
  const int thread = static_cast<int>(threadIdx.x);
  const double sum = block_sum(thread < blocks ? load(partial_B + thread) : 0., shared.sums);
  if (thread == 0) store(out, narrow<T>(sum));
}

static_assert(kSumPartials <= kThreads, "a thread reads one partial sum");

struct CountShared {
  int64_t counts[kExpertsAtOnce * kMaxWarps];
};

// Block b < E / kExpertsAtOnce, rounded up, counts the rows of that many experts; the last one counts the rest. Each
// reads all choices, which the cache holds: no atomics, and nothing to clear beforehand.
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const int32_t* ids_T2, const int32_t* positions_T2, int64_t T, int64_t E, int64_t* counts) {
  auto& shared = shared_storage<CountShared>();
  int64_t found[kExpertsAtOnce] = {};
  const bool is_last = blockIdx.x + 1 == gridDim.x;
  const int64_t first_expert = int64_t{blockIdx.x} * kExpertsAtOnce;
  for (int64_t t = threadIdx.x; t < T; t += kThreads) {
    const int32_t slots[2] = {load(positions_T2 + 2 * t), load(positions_T2 + 2 * t + 1)};
    if (slots[0] == -1) continue;  // only padding has a first choice without a slot of its own accord
    if (is_last) {
      const int rows = (slots[0] >= 0) + (slots[1] >= 0);
      found[0] += slots[0] == -2;
      found[1] += slots[1] == -2;
#pragma unroll
      for (int count = 0; count < 3; ++count) found[2 + count] += rows == count;
      found[5] += 1;
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int64_t expert = load(ids_T2 + 2 * t + k) - first_expert;
#pragma unroll
        for (int e = 0; e < kExpertsAtOnce; ++e) found[e] += slots[k] >= 0 && expert == e;
      }
    }
  }
  block_sums(found, shared.counts);
  if (threadIdx.x > 0) return;
  const int64_t begin = is_last ? E : first_expert, end = is_last ? E + kCounters : E;
#pragma unroll
  for (int i = 0; i < kExpertsAtOnce; ++i) {
    if (begin + i < end) store(counts + begin + i, found[i]);
  }
}

static_assert(kCounters <= kExpertsAtOnce, "the last block has a counter for each");

}  // namespace

void ordered_sum(const void* x, Type type, int64_t count, double* partial, void* out, cudaStream_t stream) {
  dispatch_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t blocks = clamp(ceil_div(count, int64_t{4} * kThreads * Vector<T>::size), 1, kSumPartials);
    dispatch_bool(rows_are_vectors<T>(0, x), [&](auto aligned) {
      launch(&sum_kernel<decltype(aligned)::value, T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
             sizeof(SumShared), stream, static_cast<const T*>(x), count, partial, static_cast<T*>(out));
    });
    if (blocks == 1) return;
    launch(&add_sums_kernel<T>, dim3(1), dim3(kThreads), sizeof(SumShared), stream, static_cast<const double*>(partial),
           static_cast<int>(blocks), static_cast<T*>(out));
  });
}

void router_statistics(const int32_t* expert_ids, const int32_t* positions, int64_t T, int64_t E, int64_t* counts,
                       cudaStream_t stream) {
  launch(&statistics_kernel, dim3(static_cast<unsigned>(ceil_div(E, kExpertsAtOnce) + 1)), dim3(kThreads),
         sizeof(CountShared), stream, expert_ids, positions, T, E, counts);
}

}  // namespace glam::cuda
