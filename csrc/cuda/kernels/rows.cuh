// Rows cut into pieces of 16 bytes over the threads of a block, and sums over those threads.
//
// A thread takes pieces thread, thread + threads, ... of its row. Where rows are not vectors (an odd width, a pointer
// that is not aligned) it takes the same pieces element by element, so that the order of a sum, hence its bits, depends
// on the width alone. All sums have a fixed order.
#pragma once

#include "cuda/kernels/device.cuh"

namespace glam::cuda {

constexpr int kMaxWarps = 32;  // of a block

constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Threads of a block that covers `pieces` with at most `per_thread` each: whole warps, at most `most` threads.
constexpr int threads_for(int64_t pieces, int64_t per_thread, int most) {
  return static_cast<int>(clamp(ceil_div(ceil_div(pieces, per_thread), kWarp) * kWarp, kWarp, most));
}

// Pieces of a row of `columns` elements.
template <class T, int size = Vector<T>::size>
__device__ __forceinline__ int pieces_of(int columns) {
  return (columns + size - 1) / size;
}

// f(std::true_type) or f(std::false_type).
template <class F>
void dispatch_bool(bool value, F&& f) {
  if (value) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

template <class F>
void for_each_bool(F&& f) {
  f(std::false_type{});
  f(std::true_type{});
}

// Elements [begin, begin + size) of a row, zeros where it has ended. `whole`: rows are vectors.
template <bool whole, int size, class T>
__device__ __forceinline__ Vector<T, size> load_piece(const T* row, int begin, int columns) {
  if constexpr (whole) {
    return load_vector<T, size>(row + begin);
  } else {
    Vector<T, size> piece;
#pragma unroll
    for (int i = 0; i < size; ++i) piece[i] = begin + i < columns ? load(row + begin + i) : narrow<T>(0.f);
    return piece;
  }
}
template <bool whole, class T>
__device__ __forceinline__ Vector<T> load_piece(const T* row, int begin, int columns) {
  return load_piece<whole, Vector<T>::size>(row, begin, columns);
}

template <bool whole, class T, int size>
__device__ __forceinline__ void store_piece(T* row, int begin, int columns, const Vector<T, size>& piece) {
  if constexpr (whole) {
    store_vector(row + begin, piece);
  } else {
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (begin + i < columns) store(row + begin + i, piece[i]);
    }
  }
}

// Elements [begin, begin + Vector<T>::size) of an array that is no row of anything, zeros where it has ended.
template <bool aligned, class T>
__device__ __forceinline__ Vector<T> load_part(const T* array, int64_t begin, int64_t count) {
  const int64_t left = count - begin;
  if constexpr (aligned) {
    if (left >= Vector<T>::size) return load_vector(array + begin);
  }
  return load_piece<false>(array + begin, 0, left < Vector<T>::size ? static_cast<int>(left) : Vector<T>::size);
}

template <bool aligned, class T>
__device__ __forceinline__ void store_part(T* array, int64_t begin, int64_t count, const Vector<T>& part) {
  const int64_t left = count - begin;
  if constexpr (aligned) {
    if (left >= Vector<T>::size) return store_vector(array + begin, part);
  }
  store_piece<false>(array + begin, 0, left < Vector<T>::size ? static_cast<int>(left) : Vector<T>::size, part);
}

// `size` elements, which may be more than one vector of their type: float32 beside 16-bit ones.
template <bool whole, int size, class S>
__device__ __forceinline__ void load_values(const S* row, int begin, int columns, S (&values)[size]) {
  constexpr int step = Vector<S>::size < size ? Vector<S>::size : size;
  static_assert(size % step == 0, "a piece holds whole vectors of the wider type");
#pragma unroll
  for (int first = 0; first < size; first += step) {
    const Vector<S> part = load_piece<whole>(row, begin + first, columns);
#pragma unroll
    for (int i = 0; i < step; ++i) values[first + i] = part[i];
  }
}

template <bool whole, int size, class S>
__device__ __forceinline__ void store_values(S* row, int begin, int columns, const S (&values)[size]) {
  constexpr int step = Vector<S>::size < size ? Vector<S>::size : size;
#pragma unroll
  for (int first = 0; first < size; first += step) {
    Vector<S> part;
#pragma unroll
    for (int i = 0; i < step; ++i) part[i] = values[first + i];
    store_piece<whole>(row, begin + first, columns, part);
  }
}

// Each of `count` values summed over the block, the same bits in every thread. `shared` is [count * kMaxWarps]; blocks
// are whole warps.
template <int count, class S>
__device__ __forceinline__ void block_sums(S (&values)[count], S* shared) {
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] = warp_sum(values[i]);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (warps == 1) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncthreads();  // whoever reads the last sums has done so
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < count; ++i) store(shared + i * kMaxWarps + warp, values[i]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] = warp_sum(lane < warps ? load(shared + i * kMaxWarps + lane) : S(0));
}

template <class S>
__device__ __forceinline__ S block_sum(S value, S* shared) {
  S values[1] = {value};
  block_sums(values, shared);
  return values[0];
}

// Sums down the columns of partial results [count, columns], kWarp columns at a time: warp w of a block of kColumnWarps
// adds rows w, w + kColumnWarps, ..., then warp 0 adds the warps' sums. Valid in warp 0.
constexpr int kColumnWarps = 8;

template <class S>
struct ColumnSums {
  S of_warp[kColumnWarps][kWarp];
};

template <class S>
__device__ __forceinline__ S column_sum(const S* partial, int64_t count, int64_t columns, int64_t column,
                                        ColumnSums<S>& shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  S sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t i = warp; i < count; i += kColumnWarps) sum += load(partial + i * columns + column);
  }
  store(&shared.of_warp[warp][lane], sum);
  __syncthreads();
  if (warp > 0) return sum;
  for (int i = 1; i < kColumnWarps; ++i) sum += load(&shared.of_warp[i][lane]);
  return sum;
}

}  // namespace glam::cuda
