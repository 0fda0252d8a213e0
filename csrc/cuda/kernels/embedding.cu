// The gather moves 16 bytes a thread. The gradient walks the sorted positions in chunks of kChunk: runs of one id that
// lie within a chunk go to the table at once; a run that crosses a border leaves a partial sum in each chunk it
// touches, and a second kernel adds these, several at a time, so that an id at every second position keeps no single
// warp busy for long.

#include "cuda/kernels/embedding.h"

#include <limits>

#include "cuda/kernels/rows.cuh"

namespace glam::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = 64;  // sorted positions
constexpr int kBatch = 4;   // of them loaded at a time
constexpr int kLanes = 8;   // partial sums of a run that are added side by side
constexpr float kMissing = std::numeric_limits<float>::quiet_NaN();

// Threads along a row of `pieces`: a power of two, at most `most`.
int threads_along(int64_t pieces, int most) {
  int threads = 1;
  while (threads < most && threads < pieces) threads *= 2;
  return threads;
}

template <bool whole, class T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const int64_t* ids_T, const T* table_VD, int64_t T_, int64_t V, int D, int threads_per_row, T* y_TD) {
  constexpr int size = Vector<T>::size;
  const int64_t t =
      int64_t{blockIdx.x} * (kThreads / threads_per_row) + static_cast<int>(threadIdx.x) / threads_per_row;
  if (t >= T_) return;
  const int64_t id = load(ids_T + t);
  const bool valid = id >= 0 && id < V;
  const T* const row = table_VD + (valid ? id : 0) * D;
  Vector<T> missing;
#pragma unroll
  for (int i = 0; i < size; ++i) missing[i] = narrow<T>(kMissing);
  for (int begin = static_cast<int>(threadIdx.x) % threads_per_row * size; begin < D; begin += threads_per_row * size) {
    store_piece<whole>(y_TD + t * D, begin, D, valid ? load_piece<whole>(row, begin, D) : missing);
  }
}

// Where the sum of a run within chunk c goes that began in an earlier chunk, or that began here and goes on in the
// next.
__device__ __forceinline__ int64_t partial_row(int64_t chunk, bool began_before) {
  return 2 * chunk + (began_before ? 0 : 1);
}

// Every row of the table has one run.
template <bool whole, class T, int size>
__device__ __forceinline__ void give_to_table(T* row_D, int begin, int D, bool add, const Sum<T> (&sum)[size]) {
  Vector<T, size> piece = {};
  if (add) piece = load_piece<whole, size>(row_D, begin, D);
#pragma unroll
  for (int i = 0; i < size; ++i) piece[i] = narrow<T>(add ? sum[i] + wide(piece[i]) : sum[i]);
  store_piece<whole>(row_D, begin, D, piece);
}

// Grid: (chunks, columns).
template <bool whole, class T>
__global__ void __launch_bounds__(kThreads)
    sum_chunks_kernel(const T* grad_TD, const int64_t* ids_T, const int64_t* order_T, int64_t T_, int64_t V, int D,
                      int threads_per_row, Sum<T>* partial, bool add, T* grad_table_VD) {
  using S = Sum<T>;
  constexpr int size = Vector<T>::size;
  const int64_t chunk =
      int64_t{blockIdx.x} * (kThreads / threads_per_row) + static_cast<int>(threadIdx.x) / threads_per_row;
  const int64_t first = chunk * kChunk, last = first + kChunk < T_ ? first + kChunk : T_;
  const int column =
      (static_cast<int>(blockIdx.y) * threads_per_row + static_cast<int>(threadIdx.x) % threads_per_row) * size;
  if (first >= T_ || column >= D) return;
  int64_t run_begin = first, id = load(ids_T + first);
  S sum[size] = {};
  const auto finish = [&](int64_t run_end) {
    const bool began_before = run_begin == first && first > 0 && load(ids_T + first - 1) == id;
    const bool goes_on = run_end == last && last < T_ && load(ids_T + last) == id;
    if (began_before || goes_on) {
      store_values<whole>(partial + partial_row(chunk, began_before) * D, column, D, sum);
    } else if (id >= 0 && id < V) {
      give_to_table<whole>(grad_table_VD + id * D, column, D, add, sum);
    }
  };
  for (int64_t batch = first; batch < last; batch += kBatch) {
    Vector<T> pieces[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (batch + j < last) pieces[j] = load_piece<whole>(grad_TD + load(order_T + batch + j) * D, column, D);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (batch + j >= last) break;
      const int64_t next = load(ids_T + batch + j);
      if (next != id) {
        finish(batch + j);
        run_begin = batch + j;
        id = next;
#pragma unroll
        for (int i = 0; i < size; ++i) sum[i] = 0;
      }
#pragma unroll
      for (int i = 0; i < size; ++i) sum[i] += wide(pieces[j][i]);
    }
  }
  finish(last);
}

template <class S>
struct RunShared {
  Vector<S> sums[kThreads];
};

// A block for each border between chunks; it works where a run crosses that border and no earlier one. Lane l of the
// run adds the chunks' sums l, l + kLanes, ...; lane 0 adds the lanes'. Grid: (chunks - 1, columns).
template <bool whole, class T>
__global__ void __launch_bounds__(kThreads) sum_runs_kernel(const int64_t* ids_T, int64_t T_, int64_t V, int D,
                                                            const Sum<T>* partial, bool add, T* grad_table_VD) {
  using S = Sum<T>;
  constexpr int size = Vector<S>::size;
  auto& shared = shared_storage<RunShared<S>>();
  const int64_t chunk = blockIdx.x, first = chunk * kChunk, last = first + kChunk;
  const int64_t id = load(ids_T + last - 1);
  if (load(ids_T + last) != id || id < 0 || id >= V) return;
  if (first > 0 && load(ids_T + first - 1) == id) return;
  int64_t low = last + 1, high = T_;  // the run's end lies in [low, high]
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (load(ids_T + middle) == id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int64_t chunks = (low - 1) / kChunk - chunk + 1;  // that the run touches
  constexpr int threads = kThreads / kLanes;
  const int lane = static_cast<int>(threadIdx.x) / threads, thread = static_cast<int>(threadIdx.x) % threads;
  const int column = (static_cast<int>(blockIdx.y) * threads + thread) * size;
  S sum[size] = {};
  if (column < D) {
#pragma unroll 4
    for (int64_t i = lane; i < chunks; i += kLanes) {
      const Vector<S> part = load_piece<whole>(partial + partial_row(chunk + i, i > 0) * D, column, D);
#pragma unroll
      for (int k = 0; k < size; ++k) sum[k] += part[k];
    }
  }
  Vector<S> own;
#pragma unroll
  for (int k = 0; k < size; ++k) own[k] = sum[k];
  store(&shared.sums[threadIdx.x], own);
  __syncthreads();
  if (lane > 0 || column >= D) return;
  for (int other = 1; other < kLanes; ++other) {
    const Vector<S> others = load(&shared.sums[other * threads + thread]);
#pragma unroll
    for (int k = 0; k < size; ++k) sum[k] += others[k];
  }
  give_to_table<whole>(grad_table_VD + id * D, column, D, add, sum);
}

}  // namespace

void embedding(const int64_t* ids, const void* table, Type type, int64_t T, int64_t V, int64_t D, void* y,
               cudaStream_t stream) {
  dispatch_type(type, [&](auto zero) {
    using Element = decltype(zero);
    const int threads_per_row = threads_along(ceil_div(D, Vector<Element>::size), kThreads);
    dispatch_bool(rows_are_vectors<Element>(D, table, y), [&](auto whole) {
      launch(&gather_kernel<decltype(whole)::value, Element>,
             dim3(static_cast<unsigned>(ceil_div(T, kThreads / threads_per_row))), dim3(kThreads), 0, stream, ids,
             static_cast<const Element*>(table), T, V, D, threads_per_row, static_cast<Element*>(y));
    });
  });
}

int64_t embedding_partial_size(int64_t T, int64_t D) { return 2 * ceil_div(T, kChunk) * D; }

void embedding_backward(const void* grad, Type type, const int64_t* sorted_ids, const int64_t* order, int64_t T,
                        int64_t V, int64_t D, void* partial, bool add, void* grad_table, cudaStream_t stream) {
  dispatch_type(type, [&](auto zero) {
    using Element = decltype(zero);
    using S = Sum<Element>;
    const int64_t pieces = ceil_div(D, Vector<Element>::size), chunks = ceil_div(T, kChunk);
    const int threads_per_row = threads_along(pieces, kThreads);
    const int64_t columns_of_run = int64_t{kThreads / kLanes} * Vector<S>::size;
    dispatch_bool(rows_are_vectors<Element>(D, grad, partial, grad_table), [&](auto whole) {
      launch(&sum_chunks_kernel<decltype(whole)::value, Element>,
             dim3(static_cast<unsigned>(ceil_div(chunks, kThreads / threads_per_row)),
                  static_cast<unsigned>(ceil_div(pieces, threads_per_row))),
             dim3(kThreads), 0, stream, static_cast<const Element*>(grad), sorted_ids, order, T, V, D, threads_per_row,
             static_cast<S*>(partial), add, static_cast<Element*>(grad_table));
      if (chunks < 2) return;
      launch(&sum_runs_kernel<decltype(whole)::value, Element>,
             dim3(static_cast<unsigned>(chunks - 1), static_cast<unsigned>(ceil_div(D, columns_of_run))),
             dim3(kThreads), sizeof(RunShared<S>), stream, sorted_ids, T, V, D, static_cast<const S*>(partial), add,
             static_cast<Element*>(grad_table));
    });
  });
}

}  // namespace glam::cuda
