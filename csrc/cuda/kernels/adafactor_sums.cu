// Sums of squares: of any arrays, and along the rows and columns of gradients. Column sums stay in registers; row sums
// go through the lanes.

#include <type_traits>

#include "cuda/kernels/adafactor.cuh"

namespace glam::cuda {
namespace {

using namespace adafactor;

// The sum of squares of this thread's elements; `overflow` stays 0 unless a square is infinite or NaN.
template <bool aligned, class T>
__device__ __forceinline__ double sum_of_squares(const T* x, int64_t count, const Place& place, Sum<T>& overflow) {
  double sum = 0;
#pragma unroll 2
  for (int64_t i = first_element<T>(place); i < count; i += element_stride<T>(place)) {
    const Vector<T> part = load_part<aligned>(x, i, count);
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) {
      const Sum<T> value = wide(part[j]);
      sum += static_cast<double>(value) * value;
      overflow += value * value * Sum<T>(0);
    }
  }
  return sum;
}

struct SquaresItem {
  const void* x;
  int64_t count;
  double* partial_B2;
};

template <bool aligned, class T>
__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ Batch<SquaresItem> batch) {
  auto& shared = shared_storage<PairShared>();
  const Place place = this_place(batch);
  const SquaresItem& item = batch.items[place.item];
  Sum<T> overflow = 0;
  const double sum = sum_of_squares<aligned>(static_cast<const T*>(item.x), item.count, place, overflow);
  double sums[2] = {sum, overflow == Sum<T>(0) ? 0. : 1.};
  block_sums(sums, shared.sums);
  if (threadIdx.x > 0) return;
  store(item.partial_B2 + 2 * place.block, sums[0]);
  store(item.partial_B2 + 2 * place.block + 1, sums[1]);
}

struct FinishSquaresItem {
  const double* partial_B2;
  int blocks;
  double* sum;
  bool* nonfinite;
};

__global__ void __launch_bounds__(kThreads)
    finish_squares_kernel(const __grid_constant__ Batch<FinishSquaresItem> batch) {
  auto& shared = shared_storage<PairShared>();
  const FinishSquaresItem& item = batch.items[this_place(batch).item];
  const double total = sum_of_partials(item.partial_B2, item.blocks, 2, shared.sums);
  const double bad = sum_of_partials(item.partial_B2 + 1, item.blocks, 2, shared.sums);
  if (threadIdx.x > 0) return;
  store(item.sum, total);
  store(item.nonfinite, bad != 0);
}

// grad, rows and columns are null if the parameter is not factored.
template <class T>
struct SumsItem {
  const T *grad_NRC, *weight_NRC;
  double* squares_B;
  T* rows;     // [tiles, rows of a tile]
  T* columns;  // [N row tiles, C]
  int64_t count;
  int R, C;
};

// The row and column sums of a warp's tile; returns the sum of the weight's squares.
template <bool whole, class T>
__device__ __forceinline__ double sums_of_tile(const SumsItem<T>& item, unsigned block) {
  constexpr int size = Vector<T>::size;
  const int C = item.C, lane = static_cast<int>(threadIdx.x) % kWarp;
  const Tiles tiles = Tiles::of<T>(item.R, C);
  const Tile tile = this_tile<T>(tiles, item.R, block);
  const bool active = tile.column < C;
  const T *grad_RC = item.grad_NRC + tile.row * C, *weight_RC = item.weight_NRC + tile.row * C;
  T columns[size] = {}, row_sum_of_lane = 0;
  double squares = 0;
  for (int first = 0; first < tile.rows; first += kBatch) {
    Vector<T> grad[kBatch], weight[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t at = int64_t{first + b} * C;
      if (!active || first + b >= tile.rows) continue;
      grad[b] = load_piece<whole>(grad_RC + at, tile.column, C);
      weight[b] = load_piece<whole>(weight_RC + at, tile.column, C);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      T row_sum = 0;
      if (active && first + b < tile.rows) {
#pragma unroll
        for (int i = 0; i < size; ++i) {
          const T square = grad[b][i] * grad[b][i];
          row_sum += square;
          columns[i] += square;
          squares += static_cast<double>(weight[b][i]) * weight[b][i];
        }
      }
      row_sum = warp_sum(row_sum);
      if (lane == (first + b) % kWarp) row_sum_of_lane = row_sum;
    }
    const int done = first + kBatch;
    if (done % kWarp == 0 || done >= tile.rows) {
      const int row = first / kWarp * kWarp + lane;
      if (row < tile.rows) store(item.rows + tile.index * tiles.rows + row, row_sum_of_lane);
    }
  }
  if (active && tile.rows > 0) {
    store_values<whole>(item.columns + int64_t{tile.strip} * C, tile.column, C, columns);
  }
  return squares;
}

template <bool whole, class T>
__global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ Batch<SumsItem<T>> batch) {
  auto& shared = shared_storage<PairShared>();
  const Place place = this_place(batch);
  const SumsItem<T>& item = batch.items[place.item];
  Sum<T> overflow = 0;
  const double squares = item.grad_NRC != nullptr ? sums_of_tile<whole>(item, place.block)
                                                  : sum_of_squares<whole>(item.weight_NRC, item.count, place, overflow);
  const double sum = block_sum(squares, shared.sums);
  if (threadIdx.x == 0) store(item.squares_B + place.block, sum);
}

template <class T>
struct FinishSumsItem {
  const double* squares_B;
  const T *rows, *columns;
  int num_squares;
  unsigned N;  // 0 if there are no row and column sums
  int R, C;
  T *row_sums, *col_sums;
  double* weight_squares;

  // Blocks of a matrix's rows and of its columns.
  __host__ __device__ __forceinline__ unsigned row_blocks() const { return (R - 1) / kThreads + 1; }
  __host__ __device__ __forceinline__ unsigned column_blocks() const { return (C - 1) / kWarp + 1; }
};

template <class T>
union FinishSumsShared {
  ColumnSums<T> columns;
  double squares[kMaxWarps];
};

static_assert(kColumnWarps * kWarp == kThreads, "the same block adds rows and columns");

// Blocks of rows first, then blocks of columns, then one for the weight's squares.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_sums_kernel(const __grid_constant__ Batch<FinishSumsItem<T>> batch) {
  auto& shared = shared_storage<FinishSumsShared<T>>();
  const Place place = this_place(batch);
  const FinishSumsItem<T>& item = batch.items[place.item];
  const int R = item.R, C = item.C;
  const unsigned row_blocks = item.row_blocks(), column_blocks = item.column_blocks();
  unsigned block = place.block;
  if (block < item.N * row_blocks) {
    const Tiles tiles = Tiles::of<T>(R, C);
    const int matrix = static_cast<int>(block / row_blocks),
              row = static_cast<int>(block % row_blocks * kThreads + threadIdx.x);
    if (row >= R) return;
    const int64_t tile = int64_t{matrix} * tiles.count() + int64_t{row / tiles.rows} * tiles.column_tiles;
    const T* const parts = item.rows + tile * tiles.rows + row % tiles.rows;
    T sum = 0;
#pragma unroll 4
    for (int i = 0; i < tiles.column_tiles; ++i) sum += load(parts + int64_t{i} * tiles.rows);
    store(item.row_sums + int64_t{matrix} * R + row, sum);
    return;
  }
  block -= item.N * row_blocks;
  if (block < item.N * column_blocks) {
    const Tiles tiles = Tiles::of<T>(R, C);
    const int matrix = static_cast<int>(block / column_blocks),
              column = static_cast<int>(block % column_blocks * kWarp + threadIdx.x % kWarp);
    const T* const parts = item.columns + int64_t{matrix} * tiles.row_tiles * C;
    const T sum = column_sum(parts, tiles.row_tiles, int64_t{C}, int64_t{column}, shared.columns);
    if (threadIdx.x < kWarp && column < C) store(item.col_sums + int64_t{matrix} * C + column, sum);
    return;
  }
  const double sum = sum_of_partials(item.squares_B, item.num_squares, 1, shared.squares);
  if (threadIdx.x == 0) store(item.weight_squares, sum);
}

// An array's and a parameter's parts of the workspace.
struct SquaresPartial {
  int64_t blocks;
  double* B2;

  static SquaresPartial take(const Array& x, Workspace& workspace) {
    const int64_t blocks = flat_blocks(x.count, static_cast<int>(16 / size_of(x.type)));
    return {blocks, workspace.take<double>(2 * blocks)};
  }
};

template <class T>
struct SumsPartial {
  int64_t blocks;
  double* squares;
  T *rows, *columns;

  static SumsPartial take(const AdafactorParameter& parameter, Workspace& workspace) {
    const int64_t blocks = blocks_of<T>(parameter);
    double* const squares = workspace.take<double>(blocks);
    if (!has_matrices(parameter)) return {blocks, squares, nullptr, nullptr};
    const Tiles tiles = tiles_of<T>(parameter);
    T* const rows = workspace.take<T>(parameter.N * tiles.count() * tiles.rows);
    return {blocks, squares, rows, workspace.take<T>(parameter.N * tiles.row_tiles * parameter.C)};
  }
};

}  // namespace

int64_t squared_norm_partial_bytes(std::span<const Array> xs) {
  Workspace workspace;
  for (const Array& x : xs) SquaresPartial::take(x, workspace);
  return workspace.bytes();
}

void squared_norm(std::span<const Array> xs, void* partial, double* sums, bool* nonfinite, cudaStream_t stream) {
  Batches<SquaresItem> squares[4][2];  // by type, and whether 16-byte accesses are possible
  Batches<FinishSquaresItem> finish;
  Workspace workspace(partial);
  for (const Array& x : xs) {
    const auto [blocks, partial_B2] = SquaresPartial::take(x, workspace);
    const auto i = &x - xs.data();
    squares[static_cast<int>(x.type)][rows_are_vectors<float>(0, x.data)].add({x.data, x.count, partial_B2}, blocks);
    finish.add({partial_B2, static_cast<int>(blocks), sums + i, nonfinite + i}, 1);
  }
  for (const Type type : {Type::f16, Type::bf16, Type::f32, Type::f64}) {
    dispatch_type(type, [&](auto zero) {
      for_each_bool([&](auto aligned) {
        squares[static_cast<int>(type)][aligned].for_each([&](const auto& batch, dim3 grid) {
          launch(&squares_kernel<decltype(aligned)::value, decltype(zero)>, grid, dim3(kThreads), sizeof(PairShared),
                 stream, batch);
        });
      });
    });
  }
  finish.for_each([&](const auto& batch, dim3 grid) {
    launch(&finish_squares_kernel, grid, dim3(kThreads), sizeof(PairShared), stream, batch);
  });
}

int64_t adafactor_sums_partial_bytes(AdafactorParameters parameters, Type type) {
  Workspace workspace;
  dispatch_sum(type, [&](auto zero) {
    for (const auto& parameter : parameters) SumsPartial<decltype(zero)>::take(parameter, workspace);
  });
  return workspace.bytes();
}

void adafactor_sums(AdafactorParameters parameters, Type type, void* partial, void* row_sums, void* col_sums,
                    double* weight_squares, cudaStream_t stream) {
  dispatch_sum(type, [&](auto zero) {
    using T = decltype(zero);
    Batches<SumsItem<T>> sums[2];  // rows that are no vectors, rows that are
    Batches<FinishSumsItem<T>> finish;
    Workspace workspace(partial);
    for (const AdafactorParameter& parameter : parameters) {
      const auto part = SumsPartial<T>::take(parameter, workspace);
      const bool factored = has_matrices(parameter);
      const int R = static_cast<int>(parameter.R), C = factored ? static_cast<int>(parameter.C) : 0;
      const auto* const grad = factored ? static_cast<const T*>(parameter.grad) : nullptr;
      const auto* const weight = static_cast<const T*>(parameter.weight);
      sums[rows_are_vectors<T>(C, grad, weight)].add(
          {grad, weight, part.squares, part.rows, part.columns, parameter.numel(), R, C}, part.blocks);
      const FinishSumsItem<T> item{.squares_B = part.squares,
                                   .rows = part.rows,
                                   .columns = part.columns,
                                   .num_squares = static_cast<int>(part.blocks),
                                   .N = factored ? static_cast<unsigned>(parameter.N) : 0,
                                   .R = R,
                                   .C = C,
                                   .row_sums = static_cast<T*>(row_sums) + parameter.rows,
                                   .col_sums = static_cast<T*>(col_sums) + parameter.columns,
                                   .weight_squares = weight_squares + (&parameter - parameters.data())};
      finish.add(item, int64_t{item.N} * (item.row_blocks() + item.column_blocks()) + 1);
    }
    for_each_bool([&](auto whole) {
      sums[whole].for_each([&](const auto& batch, dim3 grid) {
        launch(&sums_kernel<decltype(whole)::value, T>, grid, dim3(kThreads), sizeof(PairShared), stream, batch);
      });
    });
    finish.for_each([&](const auto& batch, dim3 grid) {
      launch(&finish_sums_kernel<T>, grid, dim3(kThreads), sizeof(FinishSumsShared<T>), stream, batch);
    });
  });
}

}  // namespace glam::cuda
