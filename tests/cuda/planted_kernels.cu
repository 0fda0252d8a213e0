// See planted_kernels.h.
#include "planted_kernels.h"

#include "cuda/kernels/ptx.cuh"

namespace planted {

using namespace glam::cuda;

namespace {

// --- Rows

constexpr int kRowThreads = 256;

struct RowStorage {
  float partial[kRowThreads / kWarp];
};

template <Bug kBug>
__global__ void __launch_bounds__(kRowThreads)
    row_kernel(const float* __restrict__ x, float* __restrict__ y, int columns) {
  auto& shared = shared_storage<RowStorage>();
  const float* row = x + static_cast<int64_t>(blockIdx.x) * columns;
  float sum = 0;
  for (int i = threadIdx.x; i < columns; i += kRowThreads) sum += load(row + i);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) store(&shared.partial[threadIdx.x / kWarp], sum);
  if (kBug != Bug::row_without_barrier) __syncthreads();
  sum = 0;
  for (int w = 0; w < kRowThreads / kWarp; ++w) sum += load(&shared.partial[w]);
  for (int i = threadIdx.x; i < columns; i += kRowThreads) {
    store(y + static_cast<int64_t>(blockIdx.x) * columns + i, load(row + i) / sum);
  }
}

// --- Sorting

constexpr int kSortWarps = 8;
constexpr int kMaxExperts = 64;

struct SortStorage {
  int counts[kSortWarps][kMaxExperts];
  int starts[kMaxExperts + 1];
};

// Each warp takes a contiguous part of the ids: a histogram, a scan over experts and warps, then places.
template <Bug kBug>
__global__ void __launch_bounds__(kSortWarps* kWarp)
    sort_kernel(const int* __restrict__ experts, int count, int num_experts, int* __restrict__ offsets,
                int* __restrict__ order) {
  auto& shared = shared_storage<SortStorage>();
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  for (int e = lane; e < num_experts; e += kWarp) shared.counts[warp][e] = 0;
  if (kBug != Bug::sort_without_zeroing) __syncwarp();
  const int part = (count + kSortWarps - 1) / kSortWarps, first = warp * part, end = min(count, first + part);
  for (int i = first + lane; i < end; i += kWarp) atomicAdd(&shared.counts[warp][load(experts + i)], 1);
  if (kBug != Bug::sort_without_histogram) __syncthreads();
  for (int e = thread; e < num_experts; e += kSortWarps * kWarp) {
    int sum = 0;
    for (int w = 0; w < kSortWarps; ++w) {
      const int here = shared.counts[w][e];
      shared.counts[w][e] = sum;
      sum += here;
    }
    shared.starts[e + 1] = sum;
  }
  if (kBug != Bug::sort_without_scan) __syncthreads();
  if (thread == 0) {
    shared.starts[0] = 0;
    for (int e = 0; e < num_experts; ++e) shared.starts[e + 1] += shared.starts[e];
  }
  __syncthreads();
  for (int e = thread; e <= num_experts; e += kSortWarps * kWarp) offsets[e] = shared.starts[e];
  for (int i = first; i < end; i += kWarp) {
    const bool active = i + lane < end;
    const unsigned lanes = __ballot_sync(kAllLanes, active);
    if (active) {
      const int expert = load(experts + i + lane);
      const unsigned peers = __match_any_sync(lanes, expert);
      const int rank = __popc(peers & ((1u << lane) - 1));
      store(order + i + lane, shared.starts[expert] + shared.counts[warp][expert] + rank);
      if (kBug != Bug::sort_without_warp_barrier) __syncwarp(lanes);
      if (rank == 0) shared.counts[warp][expert] += __popc(peers);
    }
    __syncwarp();
  }
}

// --- Product

constexpr int kTile = 64;  // rows and columns of c per block, of which each of 4 warps has a quarter
constexpr int kDepth = 32;
constexpr int kPad = 8;
constexpr int kProductThreads = 128;

struct ProductStorage {
  bf16 a[2][kTile][kDepth + kPad];
  bf16 b[2][kDepth][kTile + kPad];
};

__device__ void copy_stage(ProductStorage& shared, int stage, const bf16* a, const bf16* b, int m, int n, int k,
                           int k0) {
  const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
  for (int i = threadIdx.x; i < kTile * kDepth / 8; i += kProductThreads) {
    const int r = i / (kDepth / 8), c = i % (kDepth / 8) * 8;
    const bool inside = row0 + r < m && k0 + c < k;
    ptx::cp_async_16(&shared.a[stage][r][c], inside ? a + static_cast<int64_t>(row0 + r) * k + k0 + c : a, inside);
  }
  for (int i = threadIdx.x; i < kDepth * kTile / 8; i += kProductThreads) {
    const int r = i / (kTile / 8), c = i % (kTile / 8) * 8;
    const bool inside = k0 + r < k && column0 + c < n;
    ptx::cp_async_16(&shared.b[stage][r][c], inside ? b + static_cast<int64_t>(k0 + r) * n + column0 + c : b, inside);
  }
  ptx::cp_async_commit();
}

template <Bug kBug>
__global__ void __launch_bounds__(kProductThreads)
    product_kernel(const bf16* __restrict__ a, const bf16* __restrict__ b, bf16* __restrict__ c, int m, int n, int k) {
  auto& shared = shared_storage<ProductStorage>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  float sums[2][4][4] = {};

  copy_stage(shared, 0, a, b, m, n, k, 0);
  const int steps = (k + kDepth - 1) / kDepth;
  for (int step = 0; step < steps; ++step) {
    const int stage = step % 2;
    const bool more = step + 1 < steps;
    if (more) copy_stage(shared, 1 - stage, a, b, m, n, k, (step + 1) * kDepth);
    if (kBug != Bug::product_without_wait) {
      more ? ptx::cp_async_wait<1>() : ptx::cp_async_wait<0>();
    }
    __syncthreads();
    for (int depth = 0; depth < kDepth; depth += 16) {
      unsigned a_fragment[2][4], b_fragment[2][4];
      const int row = lane % 16, column = lane / 16 * 8;
      for (int i = 0; i < 2; ++i) {
        ptx::ldmatrix_x4(a_fragment[i], &shared.a[stage][warp_row + i * 16 + row][depth + column]);
        ptx::ldmatrix_x4_trans(b_fragment[i], &shared.b[stage][depth + row][warp_column + i * 16 + column]);
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
          const unsigned pair[2] = {b_fragment[j / 2][j % 2 * 2], b_fragment[j / 2][j % 2 * 2 + 1]};
          ptx::mma_m16n8k16<bf16>(sums[i][j], a_fragment[i], pair);
        }
      }
    }
    if (kBug != Bug::product_overwrites_stage) __syncthreads();
  }

  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int h = 0; h < 4; ++h) {
        const int row = blockIdx.y * kTile + warp_row + i * 16 + lane / 4 + h / 2 * 8;
        const int column = blockIdx.x * kTile + warp_column + j * 8 + lane % 4 * 2 + h % 2;
        if (row < m && column < n) store(c + static_cast<int64_t>(row) * n + column, narrow<bf16>(sums[i][j][h]));
      }
    }
  }
}

// --- Across blocks

constexpr int kBlock = 64;

template <Bug kBug>
__global__ void count_kernel(const int* __restrict__ x, int count, int* total) {
  const int i = blockIdx.x * kBlock + threadIdx.x;
  const int end = kBug == Bug::count_past_the_end ? count + 1 : count;
  const int positive = __syncthreads_count(i < end && x[i] > 0);
  if (threadIdx.x != 0) return;
  if (kBug == Bug::count_without_atomic) {
    *total += positive;
  } else {
    atomicAdd(total, positive);
  }
}

struct TotalStorage {
  int is_last;
};

template <Bug kBug>
__global__ void total_kernel(const int* __restrict__ x, int count, int* partials, unsigned* tickets, int* total) {
  auto& shared = shared_storage<TotalStorage>();
  const int lane = threadIdx.x, i = blockIdx.x * kWarp + lane;
  const int sum = __reduce_add_sync(kAllLanes, i < count ? x[i] : 0);
  if (lane == 0) {
    partials[blockIdx.x] = sum;
    if (kBug != Bug::total_without_fence) __threadfence();
    shared.is_last = atomicAdd(tickets, 1u) == gridDim.x - 1;
    if (kBug != Bug::total_without_fence) __threadfence();
  }
  __syncwarp();
  if (!shared.is_last) return;
  int all = 0;
  for (unsigned block = lane; block < gridDim.x; block += kWarp) all += partials[block];
  all = __reduce_add_sync(kAllLanes, all);
  if (lane == 0) *total = all;
}

}  // namespace

void row_normalize(Bug bug, const float* x, float* y, int rows, int columns) {
  auto* kernel = bug == Bug::row_without_barrier ? row_kernel<Bug::row_without_barrier> : row_kernel<Bug::none>;
  launch(kernel, rows, kRowThreads, sizeof(RowStorage), nullptr, x, y, columns);
}

void sort_by_expert(Bug bug, const int* experts, int count, int num_experts, int* offsets, int* order) {
  auto* kernel = bug == Bug::sort_without_zeroing        ? sort_kernel<Bug::sort_without_zeroing>
                 : bug == Bug::sort_without_histogram    ? sort_kernel<Bug::sort_without_histogram>
                 : bug == Bug::sort_without_scan         ? sort_kernel<Bug::sort_without_scan>
                 : bug == Bug::sort_without_warp_barrier ? sort_kernel<Bug::sort_without_warp_barrier>
                                                         : sort_kernel<Bug::none>;
  launch(kernel, 1, kSortWarps * kWarp, sizeof(SortStorage), nullptr, experts, count, num_experts, offsets, order);
}

void product(Bug bug, const bf16* a, const bf16* b, bf16* c, int m, int n, int k) {
  auto* kernel = bug == Bug::product_overwrites_stage ? product_kernel<Bug::product_overwrites_stage>
                 : bug == Bug::product_without_wait   ? product_kernel<Bug::product_without_wait>
                                                      : product_kernel<Bug::none>;
  const dim3 grid(static_cast<unsigned>(ceil_div(n, kTile)), static_cast<unsigned>(ceil_div(m, kTile)));
  launch(kernel, grid, kProductThreads, sizeof(ProductStorage), nullptr, a, b, c, m, n, k);
}

void count_positive(Bug bug, const int* x, int count, int* total) {
  auto* kernel = bug == Bug::count_without_atomic ? count_kernel<Bug::count_without_atomic>
                 : bug == Bug::count_past_the_end ? count_kernel<Bug::count_past_the_end>
                                                  : count_kernel<Bug::none>;
  launch(kernel, ceil_div(count, kBlock), kBlock, 0, nullptr, x, count, total);
}

void last_block_total(Bug bug, const int* x, int count, int* partials, unsigned* tickets, int* total) {
  auto* kernel = bug == Bug::total_without_fence ? total_kernel<Bug::total_without_fence> : total_kernel<Bug::none>;
  launch(kernel, ceil_div(count, kWarp), kWarp, sizeof(TotalStorage), nullptr, x, count, partials, tickets, total);
}

}  // namespace planted
