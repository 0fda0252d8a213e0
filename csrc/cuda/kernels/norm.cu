// Forward: a row of up to kWarpColumns columns belongs to one warp, a wider one to a block; the row stays in registers
// between the sum and the product, as far as kKept elements a thread go. Backward: a block walks its rows one by one
// with the rows' x and grad, and its columns' part of the scale's gradient, in registers.

#include "cuda/kernels/norm.h"

#include <cmath>

#include "cuda/kernels/rows.cuh"

namespace glam::cuda {
namespace {

constexpr int kKept = 32;  // elements of a row that a thread of the forward keeps
constexpr int kWarpColumns = kKept * kWarp;
constexpr int kForwardThreads = 256;
constexpr int kBackwardThreads = 512;  // at most
constexpr int64_t kMaxBlocks = 1024, kMinRowsPerBlock = 8;

// Elements of a piece: as many of the scale are a vector, so that a warp reads both in whole sectors.
template <class T>
constexpr int kPiece = Vector<Sum<T>>::size;

// Elements of a row that a thread of the backward keeps: three times, hence fewer.
template <class T>
constexpr int kKeptBackward = std::is_same_v<T, double> ? 8 : 16;

template <class S>
struct ForwardShared {
  S sums[kMaxWarps];
};

struct BackwardShared {
  double sums[2 * kMaxWarps];
};

template <bool whole, class T>
__global__ void __launch_bounds__(kForwardThreads)
    norm_kernel(const T* x_TD, const Sum<T>* scale_D, Sum<T> eps, int64_t T_, int D, int threads_per_row, T* y_TD) {
  using S = Sum<T>;
  constexpr int size = kPiece<T>, kept = kKept / size;
  auto& shared = shared_storage<ForwardShared<S>>();
  const int thread = static_cast<int>(threadIdx.x) % threads_per_row;
  const int64_t row =
      int64_t{blockIdx.x} * (blockDim.x / threads_per_row) + static_cast<int>(threadIdx.x) / threads_per_row;
  if (row >= T_) return;  // a whole warp, of a block that has a row per warp
  const T* const x_D = x_TD + row * D;
  T* const y_D = y_TD + row * D;
  const int pieces = pieces_of<T, size>(D);
  const auto add_squares = [](const Vector<T, size>& piece, S& sum) {
#pragma unroll
    for (int i = 0; i < size; ++i) sum += wide(piece[i]) * wide(piece[i]);
  };
  Vector<T, size> x[kept];
  S squares = 0;
#pragma unroll
  for (int j = 0; j < kept; ++j) {
    const int piece = thread + j * threads_per_row;
    if (piece < pieces) {
      x[j] = load_piece<whole, size>(x_D, piece * size, D);
      add_squares(x[j], squares);
    }
  }
  for (int piece = thread + kept * threads_per_row; piece < pieces; piece += threads_per_row) {
    add_squares(load_piece<whole, size>(x_D, piece * size, D), squares);
  }
  squares = threads_per_row == kWarp ? warp_sum(squares) : block_sum(squares, shared.sums);
  const S root = S(1) / std::sqrt(squares / static_cast<S>(D) + eps);
  const auto write = [&](const Vector<T, size>& input, int piece) {
    S scale[size];
    load_values<whole>(scale_D, piece * size, D, scale);
    Vector<T, size> y;
#pragma unroll
    for (int i = 0; i < size; ++i) y[i] = narrow<T>(wide(input[i]) * root * scale[i]);
    store_piece<whole>(y_D, piece * size, D, y);
  };
#pragma unroll
  for (int j = 0; j < kept; ++j) {
    const int piece = thread + j * threads_per_row;
    if (piece < pieces) write(x[j], piece);
  }
  for (int piece = thread + kept * threads_per_row; piece < pieces; piece += threads_per_row) {
    write(load_piece<whole, size>(x_D, piece * size, D), piece);
  }
}

// The two terms of grad_x nearly cancel where s is close to a multiple of x, hence the doubles.
template <bool whole, class T>
__global__ void __launch_bounds__(kBackwardThreads)
    norm_backward_kernel(const T* grad_TD, const T* x_TD, const Sum<T>* scale_D, Sum<T> eps, int64_t T_, int D,
                         int64_t rows_per_block, T* grad_x_TD, Sum<T>* partial_BD) {
  using S = Sum<T>;
  constexpr int size = kPiece<T>, kept = kKeptBackward<T> / size;
  auto& shared = shared_storage<BackwardShared>();
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int pieces = pieces_of<T, size>(D);
  const int64_t begin = int64_t{blockIdx.x} * rows_per_block;
  const int64_t end = begin + rows_per_block < T_ ? begin + rows_per_block : T_;
  S* const partial_D = partial_BD + int64_t{blockIdx.x} * D;
  Vector<T, size> x[kept], grad[kept];
  S grad_scale[kept][size] = {};
  for (int64_t row = begin; row < end; ++row) {
    const T *const x_D = x_TD + row * D, *const grad_D = grad_TD + row * D;
    T* const grad_x_D = grad_x_TD + row * D;
    double sums[2] = {0, 0};  // of x^2 and of s x
    const auto add = [&](const Vector<T, size>& input, const Vector<T, size>& incoming, int piece) {
      S scale[size];
      load_values<whole>(scale_D, piece * size, D, scale);
#pragma unroll
      for (int i = 0; i < size; ++i) {
        const double value = wide(input[i]);
        sums[0] += value * value;
        sums[1] += static_cast<double>(wide(incoming[i])) * scale[i] * value;
      }
    };
#pragma unroll
    for (int j = 0; j < kept; ++j) {
      const int piece = thread + j * threads;
      if (piece < pieces) {
        x[j] = load_piece<whole, size>(x_D, piece * size, D);
        grad[j] = load_piece<whole, size>(grad_D, piece * size, D);
      }
    }
#pragma unroll
    for (int j = 0; j < kept; ++j) {
      const int piece = thread + j * threads;
      if (piece < pieces) add(x[j], grad[j], piece);
    }
    for (int piece = thread + kept * threads; piece < pieces; piece += threads) {
      add(load_piece<whole, size>(x_D, piece * size, D), load_piece<whole, size>(grad_D, piece * size, D), piece);
    }
    block_sums(sums, shared.sums);
    const double root = 1 / std::sqrt(sums[0] / static_cast<double>(D) + eps);
    const double along_x = root * root * sums[1] / static_cast<double>(D);
    const S root_S = static_cast<S>(root);
    const auto write = [&](const Vector<T, size>& input, const Vector<T, size>& incoming, int piece) {
      S scale[size];
      load_values<whole>(scale_D, piece * size, D, scale);
      Vector<T, size> grad_x;
#pragma unroll
      for (int i = 0; i < size; ++i) {
        const double s = static_cast<double>(wide(incoming[i])) * scale[i];
        grad_x[i] = narrow<T>(root * (s - wide(input[i]) * along_x));
      }
      store_piece<whole>(grad_x_D, piece * size, D, grad_x);
    };
#pragma unroll
    for (int j = 0; j < kept; ++j) {
      const int piece = thread + j * threads;
      if (piece < pieces) {
        write(x[j], grad[j], piece);
#pragma unroll
        for (int i = 0; i < size; ++i) grad_scale[j][i] += wide(grad[j][i]) * (wide(x[j][i]) * root_S);
      }
    }
    // Columns beyond those kept in registers: their sums grow in the workspace, which this thread alone touches.
    for (int piece = thread + kept * threads; piece < pieces; piece += threads) {
      const Vector<T, size> input = load_piece<whole, size>(x_D, piece * size, D);
      const Vector<T, size> incoming = load_piece<whole, size>(grad_D, piece * size, D);
      write(input, incoming, piece);
      S sum[size] = {};
      if (row > begin) load_values<whole>(partial_D, piece * size, D, sum);
#pragma unroll
      for (int i = 0; i < size; ++i) sum[i] += wide(incoming[i]) * (wide(input[i]) * root_S);
      store_values<whole>(partial_D, piece * size, D, sum);
    }
  }
#pragma unroll
  for (int j = 0; j < kept; ++j) {
    const int piece = thread + j * threads;
    if (piece < pieces) store_values<whole>(partial_D, piece * size, D, grad_scale[j]);
  }
}

template <class S>
__global__ void add_partials_kernel(const S* partial_BD, int64_t blocks, int64_t D, S* grad_scale_D) {
  auto& shared = shared_storage<ColumnSums<S>>();
  const int64_t column = int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp;
  const S sum = column_sum(partial_BD, blocks, D, column, shared);
  if (threadIdx.x < kWarp && column < D) store(grad_scale_D + column, sum);
}

int64_t rows_per_block(int64_t T) {
  const int64_t spread = ceil_div(T, kMaxBlocks);
  return spread > kMinRowsPerBlock ? spread : kMinRowsPerBlock;
}

}  // namespace

void rms_norm(const void* x, Type type, const void* scale, double eps, int64_t T, int64_t D, void* y,
              cudaStream_t stream) {
  dispatch_type(type, [&](auto zero) {
    using Element = decltype(zero);
    using S = Sum<Element>;
    const int threads_per_row = D <= kWarpColumns ? kWarp : kForwardThreads;
    const int64_t rows_of_block = kForwardThreads / threads_per_row;
    dispatch_bool(rows_are_vectors<Element>(D, x, scale, y), [&](auto whole) {
      launch(&norm_kernel<decltype(whole)::value, Element>, dim3(static_cast<unsigned>(ceil_div(T, rows_of_block))),
             dim3(kForwardThreads), sizeof(ForwardShared<S>), stream, static_cast<const Element*>(x),
             static_cast<const S*>(scale), static_cast<S>(eps), T, D, threads_per_row, static_cast<Element*>(y));
    });
  });
}

int64_t rms_norm_blocks(int64_t T) { return ceil_div(T, rows_per_block(T)); }

void rms_norm_backward(const void* grad, const void* x, Type type, const void* scale, double eps, int64_t T, int64_t D,
                       void* grad_x, void* partial, void* grad_scale, cudaStream_t stream) {
  dispatch_type(type, [&](auto zero) {
    using Element = decltype(zero);
    using S = Sum<Element>;
    constexpr int size = kPiece<Element>;
    const int threads = threads_for(ceil_div(D, size), kKeptBackward<Element> / size, kBackwardThreads);
    const int64_t blocks = rms_norm_blocks(T);
    dispatch_bool(rows_are_vectors<Element>(D, grad, x, scale, grad_x, partial), [&](auto whole) {
      launch(&norm_backward_kernel<decltype(whole)::value, Element>, dim3(static_cast<unsigned>(blocks)), dim3(threads),
             sizeof(BackwardShared), stream, static_cast<const Element*>(grad), static_cast<const Element*>(x),
             static_cast<const S*>(scale), static_cast<S>(eps), T, D, rows_per_block(T), static_cast<Element*>(grad_x),
             static_cast<S*>(partial));
    });
    launch(&add_partials_kernel<S>, dim3(static_cast<unsigned>(ceil_div(D, kWarp))), dim3(kColumnWarps * kWarp),
           sizeof(ColumnSums<S>), stream, static_cast<const S*>(partial), blocks, D, static_cast<S*>(grad_scale));
  });
}

}  // namespace glam::cuda
