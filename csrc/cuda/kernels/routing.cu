// The plan is a stable counting sort in three launches: each block counts the experts of its chunk of choices; one
// block turns the counts into the first row of every (expert, chunk); each block then ranks its choices, a warp at a
// time over a stretch of the chunk, lanes with the same expert in lane order. Counts are integers, so the order of
// atomic additions does not show. Rows are copied and summed by one warp each, 16 bytes per lane.
#include "cuda/kernels/routing.h"

#include "cuda/kernels/device.cuh"

namespace glam::cuda {
namespace {

constexpr int kSortWarps = 8;
constexpr int kSortThreads = kSortWarps * kWarp;
constexpr int64_t kStretch = kSortChunk / kSortWarps;  // choices of one warp
constexpr int kScanThreads = 1024;
constexpr int kRowThreads = 128;
constexpr int kRowWarps = kRowThreads / kWarp;  // rows of one block
constexpr int kFillThreads = 256;

// A choice's expert, or -1 if it gets no row.
__device__ __forceinline__ int expert_of(const int32_t* ids, const int32_t* positions, int64_t choice, int E) {
  const int expert = load(ids + choice);
  return load(positions + choice) >= 0 && expert >= 0 && expert < E ? expert : -1;
}

struct ChunkCounts {
  int32_t count[1];  // [E]
};

__global__ void __launch_bounds__(kSortThreads)
    count_experts(const int32_t* ids, const int32_t* positions, int64_t choices, int E, int32_t* counts) {
  int32_t* const count_E = shared_storage<ChunkCounts>().count;
  for (int e = threadIdx.x; e < E; e += kSortThreads) store(count_E + e, int32_t{0});
  __syncthreads();
  const int64_t begin = blockIdx.x * kSortChunk;
  const int64_t end = begin + kSortChunk < choices ? begin + kSortChunk : choices;
  for (int64_t choice = begin + threadIdx.x; choice < end; choice += kSortThreads) {
    const int expert = expert_of(ids, positions, choice, E);
    if (expert >= 0) atomicAdd(&count_E[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kSortThreads)
    store(counts + blockIdx.x * static_cast<int64_t>(E) + e, load(count_E + e));
}

struct ScanStorage {
  int32_t warp_total[kScanThreads / kWarp];
};

// Inclusive sums of `value` over the block's threads.
__device__ int32_t block_inclusive_sum(int32_t value, ScanStorage& storage) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int32_t before = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += before;
  }
  if (lane == kWarp - 1) store(&storage.warp_total[warp], value);
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += load(&storage.warp_total[w]);
  __syncthreads();  // before the next call writes
  return value;
}

// counts [chunks, E] <- the first row of each (chunk, expert); offsets [E + 1].
__global__ void __launch_bounds__(kScanThreads) scan_counts(int64_t chunks, int E, int32_t* counts, int32_t* offsets) {
  auto& storage = shared_storage<ScanStorage>();
  int32_t first_row = 0;  // of this round's experts
  for (int base = 0; base < E; base += kScanThreads) {
    const int e = base + static_cast<int>(threadIdx.x);
    int32_t total = 0;
    for (int64_t chunk = 0; e < E && chunk < chunks; ++chunk) {
      int32_t* const count = counts + chunk * E + e;
      const int32_t here = load(count);
      store(count, total);
      total += here;
    }
    const int32_t end = first_row + block_inclusive_sum(total, storage);
    if (e < E) {
      store(offsets + e, end - total);
      if (e == E - 1) store(offsets + E, end);
    }
    for (int64_t chunk = 0; e < E && chunk < chunks; ++chunk) {
      int32_t* const count = counts + chunk * E + e;
      store(count, load(count) + end - total);
    }
    if (threadIdx.x == kScanThreads - 1) store(&storage.warp_total[0], end);
    __syncthreads();
    first_row = load(&storage.warp_total[0]);
    __syncthreads();
  }
}

struct FillStorage {
  int32_t next[1];  // [warps, E]: the next row that a warp gives out
};

__global__ void __launch_bounds__(kSortThreads)
    fill_rows(const int32_t* ids, const int32_t* positions, int64_t choices, int E, const int32_t* counts,
              const int32_t* offsets, int32_t* row_of_choice, int32_t* choice_of_row) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int32_t* const next = shared_storage<FillStorage>().next;
  int32_t* const next_E = next + warp * E;
  for (int i = threadIdx.x; i < kSortWarps * E; i += kSortThreads) store(next + i, int32_t{0});
  __syncthreads();

  const int64_t begin = blockIdx.x * kSortChunk + warp * kStretch;
  const int64_t end = begin + kStretch < choices ? begin + kStretch : choices;
  for (int64_t choice = begin + lane; choice < end; choice += kWarp) {
    const int expert = expert_of(ids, positions, choice, E);
    if (expert >= 0) atomicAdd(&next_E[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kSortThreads) {
    int32_t row = load(counts + blockIdx.x * static_cast<int64_t>(E) + e);
    for (int w = 0; w < kSortWarps; ++w) {
      int32_t* const here = next + w * E + e;
      const int32_t count = load(here);
      store(here, row);
      row += count;
    }
  }
  __syncthreads();

  for (int64_t base = begin; base < end; base += kWarp) {
    const int64_t choice = base + lane;
    const int expert = choice < end ? expert_of(ids, positions, choice, E) : -1;
    const unsigned same = __match_any_sync(kAllLanes, expert);
    const int rank = __popc(same & ((1u << lane) - 1));
    const int32_t row = expert >= 0 ? load(next_E + expert) + rank : -1;
    __syncwarp();  // all have read before one lane of each expert moves on
    if (expert >= 0 && rank == 0) store(next_E + expert, row + __popc(same));
    __syncwarp();
    if (choice < end) {
      store(row_of_choice + choice, row);
      if (row >= 0) store(choice_of_row + row, static_cast<int32_t>(choice));
    }
  }
  // Rows that no choice has come last; their number is known on the device alone.
  const int32_t used = load(offsets + E);
  const int64_t chunk_end = (blockIdx.x + int64_t{1}) * kSortChunk;
  for (int64_t row = blockIdx.x * kSortChunk + threadIdx.x; row < chunk_end && row < choices; row += kSortThreads) {
    if (row >= used) store(choice_of_row + row, int32_t{-1});
  }
}

__global__ void __launch_bounds__(kFillThreads)
    empty_slots(int64_t rows, int64_t E, int64_t rows_of_expert, int32_t* choice_of_row, int32_t* offsets) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kFillThreads) + threadIdx.x;
  if (i < rows) store(choice_of_row + i, int32_t{-1});
  if (i <= E) store(offsets + i, static_cast<int32_t>(i * rows_of_expert));
}

__global__ void __launch_bounds__(kFillThreads)
    fill_slots(const int32_t* ids, const int32_t* positions, int64_t choices, int E, int64_t G, int64_t C,
               int64_t group_choices, int32_t* row_of_choice, int32_t* choice_of_row) {
  const int64_t choice = blockIdx.x * static_cast<int64_t>(kFillThreads) + threadIdx.x;
  if (choice >= choices) return;
  const int expert = expert_of(ids, positions, choice, E);
  const int position = load(positions + choice);
  int32_t row = -1;
  if (expert >= 0 && position < C) {
    row = static_cast<int32_t>((expert * G + choice / group_choices) * C + position);
    store(choice_of_row + row, static_cast<int32_t>(choice));
  }
  store(row_of_choice + choice, row);
}

// One warp copies one row of D elements of type T, a vector or a single element per lane and turn.
template <class Unit>
__global__ void __launch_bounds__(kRowThreads)
    dispatch_rows(const Unit* x, const int32_t* choice_of_row, int64_t choices, int64_t K, int64_t R, int64_t units,
                  Unit* rows) {
  const int lane = threadIdx.x % kWarp;
  const int64_t r = blockIdx.x * static_cast<int64_t>(kRowWarps) + threadIdx.x / kWarp;
  if (r >= R) return;
  const int64_t choice = load(choice_of_row + r);
  Unit* const to = rows + r * units;
  if (choice < 0 || choice >= choices) {
    for (int64_t i = lane; i < units; i += kWarp) store(to + i, Unit{});
    return;
  }
  const Unit* const from = x + choice / K * units;
#pragma unroll 4
  for (int64_t i = lane; i < units; i += kWarp) store(to + i, load(from + i));
}

// `size` neighbouring elements: 16 bytes of the wider of the two types, or one.
template <class T, int size>
struct alignas(sizeof(T) * size) Pack {
  T values[size];
};

template <class Row, class Out, int size>
__global__ void __launch_bounds__(kRowThreads)
    combine_rows(const Row* rows, const Sum<Out>* gates, const int32_t* row_of_choice, int64_t T, int64_t K, int64_t R,
                 int64_t D, Out* y) {
  using Acc = Sum<Out>;
  const int lane = threadIdx.x % kWarp;
  const int64_t t = blockIdx.x * static_cast<int64_t>(kRowWarps) + threadIdx.x / kWarp;
  if (t >= T) return;
  for (int64_t d = lane * size; d < D; d += kWarp * size) {
    Acc sums[size] = {};
    for (int64_t choice = t * K; choice < (t + 1) * K; ++choice) {
      const int64_t row = load(row_of_choice + choice);
      if (row < 0 || row >= R) continue;
      const Acc gate = gates ? load(gates + choice) : Acc(1);
      const auto pack = load(reinterpret_cast<const Pack<Row, size>*>(rows + row * D + d));
#pragma unroll
      for (int i = 0; i < size; ++i) sums[i] += gate * static_cast<Acc>(wide(pack.values[i]));
    }
    Pack<Out, size> out;
#pragma unroll
    for (int i = 0; i < size; ++i) out.values[i] = narrow<Out>(sums[i]);
    store(reinterpret_cast<Pack<Out, size>*>(y + t * D + d), out);
  }
}

template <class T, int size>
__global__ void __launch_bounds__(kRowThreads)
    combine_rows_backward(const T* grad_y, const T* rows, const Sum<T>* gates, const int32_t* choice_of_row,
                          int64_t choices, int64_t K, int64_t R, int64_t D, T* grad_rows, Sum<T>* grad_gates) {
  const int lane = threadIdx.x % kWarp;
  const int64_t r = blockIdx.x * static_cast<int64_t>(kRowWarps) + threadIdx.x / kWarp;
  if (r >= R) return;
  const int64_t choice = load(choice_of_row + r);
  const bool used = choice >= 0 && choice < choices;
  const Sum<T> gate = used ? load(gates + choice) : Sum<T>(0);
  const T* const grad = grad_y + (used ? choice / K : 0) * D;
  Sum<T> dot = 0;
  for (int64_t d = lane * size; d < D; d += kWarp * size) {
    Pack<T, size> out = {};
    if (used) {
      const auto dy = load(reinterpret_cast<const Pack<T, size>*>(grad + d));
      const auto row = load(reinterpret_cast<const Pack<T, size>*>(rows + r * D + d));
#pragma unroll
      for (int i = 0; i < size; ++i) {
        out.values[i] = narrow<T>(gate * wide(dy.values[i]));
        dot += wide(row.values[i]) * wide(dy.values[i]);
      }
    }
    store(reinterpret_cast<Pack<T, size>*>(grad_rows + r * D + d), out);
  }
  dot = warp_sum(dot);
  if (used && lane == 0) store(grad_gates + choice, dot);
}

int64_t row_blocks(int64_t rows) { return ceil_div(rows, kRowWarps); }

}  // namespace

void tight_plan(const int32_t* ids, const int32_t* positions, int64_t choices, int64_t E, int32_t* counts,
                int32_t* row_of_choice, int32_t* choice_of_row, int32_t* offsets, cudaStream_t stream) {
  const int64_t chunks = ceil_div(choices, kSortChunk);
  const int experts = static_cast<int>(E);
  launch(count_experts, dim3(chunks), dim3(kSortThreads), E * sizeof(int32_t), stream, ids, positions, choices, experts,
         counts);
  launch(scan_counts, dim3(1), dim3(kScanThreads), sizeof(ScanStorage), stream, chunks, experts, counts, offsets);
  launch(fill_rows, dim3(chunks), dim3(kSortThreads), kSortWarps * E * sizeof(int32_t), stream, ids, positions, choices,
         experts, counts, offsets, row_of_choice, choice_of_row);
}

void slotted_plan(const int32_t* ids, const int32_t* positions, int64_t choices, int64_t E, int64_t G, int64_t C,
                  int64_t group_choices, int32_t* row_of_choice, int32_t* choice_of_row, int32_t* offsets,
                  cudaStream_t stream) {
  const int64_t rows = E * G * C;
  launch(empty_slots, dim3(ceil_div(rows > E ? rows : E + 1, kFillThreads)), dim3(kFillThreads), 0, stream, rows, E,
         G * C, choice_of_row, offsets);
  launch(fill_slots, dim3(ceil_div(choices, kFillThreads)), dim3(kFillThreads), 0, stream, ids, positions, choices,
         static_cast<int>(E), G, C, group_choices, row_of_choice, choice_of_row);
}

void dispatch(const void* x, Type type, const int32_t* choice_of_row, int64_t T, int64_t K, int64_t R, int64_t D,
              void* rows, cudaStream_t stream) {
  if (D == 0) return;
  const int64_t row_bytes = D * size_of(type);
  const auto copy = [&]<class Unit>(Unit) {
    launch(dispatch_rows<Unit>, dim3(row_blocks(R)), dim3(kRowThreads), 0, stream, static_cast<const Unit*>(x),
           choice_of_row, T * K, K, R, row_bytes / static_cast<int64_t>(sizeof(Unit)), static_cast<Unit*>(rows));
  };
  if (rows_are_vectors<char>(row_bytes, x, rows)) return copy(Vector<char>{});
  size_of(type) == 8 ? copy(uint64_t{}) : size_of(type) == 4 ? copy(uint32_t{}) : copy(uint16_t{});
}

void combine(const void* rows, Type row_type, const void* gates, const int32_t* row_of_choice, int64_t T, int64_t K,
             int64_t R, int64_t D, void* y, Type y_type, cudaStream_t stream) {
  dispatch_type(y_type, [&]<class Out>(Out) {
    const auto run = [&]<class Row>(Row) {
      constexpr int size = 16 / (sizeof(Row) > sizeof(Out) ? sizeof(Row) : sizeof(Out));
      const bool vectors = D % size == 0 && rows_are_vectors<char>(0, rows, y);
      launch(vectors ? combine_rows<Row, Out, size> : combine_rows<Row, Out, 1>, dim3(row_blocks(T)), dim3(kRowThreads),
             0, stream, static_cast<const Row*>(rows), static_cast<const Sum<Out>*>(gates), row_of_choice, T, K, R, D,
             static_cast<Out*>(y));
    };
    row_type == y_type ? run(Out{}) : run(Sum<Out>{});
  });
}

void combine_backward(const void* grad_y, const void* rows, Type type, const void* gates, const int32_t* choice_of_row,
                      int64_t T, int64_t K, int64_t R, int64_t D, void* grad_rows, void* grad_gates,
                      cudaStream_t stream) {
  dispatch_type(type, [&]<class Scalar>(Scalar) {
    constexpr int size = Vector<Scalar>::size;
    const bool vectors = rows_are_vectors<Scalar>(D, grad_y, rows, grad_rows);
    launch(vectors ? combine_rows_backward<Scalar, size> : combine_rows_backward<Scalar, 1>, dim3(row_blocks(R)),
           dim3(kRowThreads), 0, stream, static_cast<const Scalar*>(grad_y), static_cast<const Scalar*>(rows),
           static_cast<const Sum<Scalar>*>(gates), choice_of_row, T * K, K, R, D, static_cast<Scalar*>(grad_rows),
           static_cast<Sum<Scalar>*>(grad_gates));
  });
}

}  // namespace glam::cuda
