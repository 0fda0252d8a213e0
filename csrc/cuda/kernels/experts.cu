// Two kinds of products. Over rows: a block takes up to 64 rows of one segment and 64 columns; the activation is
// applied while its operand is read, and the hidden gradient is made where dy Wo^T lands, in the epilogue. Over an
// expert's rows: a block takes a 64 x 64 tile of one weight's gradient and walks the expert's segments. Weights are
// rounded to the activations' type as they are read, activations and scaled gradients too, as a tensor-core product
// would have them.
#include "cuda/kernels/experts.h"

#include "cuda/kernels/activation.cuh"
#include "cuda/kernels/product.cuh"

namespace glam::cuda {
namespace {

constexpr int kGateThreads = 128;

// The value of x as an operand of type T sees it.
template <class T, class S>
__device__ __forceinline__ Sum<T> rounded(S x) {
  if constexpr (std::is_same_v<T, S>) {
    return wide(x);
  } else {
    return wide(narrow<T>(x));
  }
}

// Rows picked through a plan; `of` is the row of data, -1 for a row without a token. Choices number less than 2^31: a
// 64-bit division would be a call.
template <class T>
struct Rows {
  const T* data;
  const int32_t* choice_of_row;
  int32_t num_choices, all_choices;

  explicit Rows(const RowSource& source)
      : data(static_cast<const T*>(source.data)),
        choice_of_row(source.choice_of_row),
        num_choices(static_cast<int32_t>(source.num_choices)),
        all_choices(static_cast<int32_t>(source.num_tokens * source.num_choices)) {}
  __device__ int32_t choice(int64_t row) const { return load(choice_of_row + row); }
  __device__ int64_t of(int64_t row) const {
    if (!choice_of_row) return row;
    const int32_t choice = this->choice(row);
    return choice < 0 || choice >= all_choices ? -1 : choice / num_choices;
  }
  __device__ Sum<T> at(int64_t row, int64_t width, int64_t column) const {
    const int64_t source = of(row);
    return source < 0 ? Sum<T>(0) : wide(load(data + source * width + column));
  }
};

// act(pre) of [R, F] pre-activations.
template <class T>
struct HiddenRows {
  const T *pre, *pre_gate;
  Activation activation;
  int64_t F;

  __device__ Sum<T> at(int64_t row, int64_t column) const {
    const int64_t i = row * F + column;
    const auto value = wide(load(pre + i));
    const auto gate = activation == Activation::geglu ? wide(load(pre_gate + i)) : value;
    return rounded<T>(activate(activation, value, gate));
  }
};

// The gate of a row's choice; 1 without gates, 0 for a row without a choice.
template <class T>
struct Gates {
  const Sum<T>* gates;

  __device__ Sum<T> of(const Rows<T>& rows, int64_t row) const {
    if (!gates) return Sum<T>(1);
    return rows.of(row) < 0 ? Sum<T>(0) : load(gates + rows.choice(row));
  }
};

// sums += the tile of a(row, k) w(expert, k, column) whose rows are `tile` and whose columns, of N, are blockIdx.y's.
template <bool w_along_k, class T, class A, class W>
__device__ void row_product(const RowTile& tile, int64_t depth, int64_t N, const A& a, const W& w,
                            TileSums<Sum<T>>& sums) {
  auto& storage = shared_storage<ProductStorage<Sum<T>>>();
  const int64_t first_column = blockIdx.y * static_cast<int64_t>(kTile);
  multiply_tile<true, w_along_k>(
      storage, depth, [&](int row, int64_t k) { return row < tile.rows ? a(tile.begin + row, k) : Sum<T>(0); },
      [&](int column, int64_t k) {
        return first_column + column < N ? w(tile.expert, k, first_column + column) : Sum<T>(0);
      },
      sums);
}

template <class Out, class Acc>
__device__ void store_tile(const RowTile& tile, int64_t N, const TileSums<Acc>& sums, Out* out) {
  const int64_t first_column = blockIdx.y * static_cast<int64_t>(kTile);
  for_each_sum<Acc>(sums, [&](int row, int column, Acc sum) {
    if (row < tile.rows && first_column + column < N) {
      store(out + (tile.begin + row) * N + first_column + column, narrow<Out>(sum));
    }
  });
}

template <class T, class W>
__global__ void __launch_bounds__(kProductThreads)
    up(Segments segments, Rows<T> rows, const W* wi, const W* wg, int64_t D, int64_t F, T* pre, T* pre_gate) {
  const RowTile tile = segments.find(blockIdx.x);
  if (tile.rows == 0) return;
  const W* const weight = blockIdx.z == 0 ? wi : wg;
  TileSums<Sum<T>> sums = {};
  if (tile.expert >= 0) {
    row_product<false, T>(
        tile, D, F, [&](int64_t row, int64_t k) { return rows.at(row, D, k); },
        [&](int64_t e, int64_t k, int64_t f) { return rounded<T>(load(weight + (e * D + k) * F + f)); }, sums);
  }
  store_tile(tile, F, sums, blockIdx.z == 0 ? pre : pre_gate);
}

template <class T, class W, class Out>
__global__ void __launch_bounds__(kProductThreads)
    down(Segments segments, HiddenRows<T> hidden, const W* wo, int64_t D, int64_t F, Out* out) {
  const RowTile tile = segments.find(blockIdx.x);
  if (tile.rows == 0) return;
  TileSums<Sum<T>> sums = {};
  if (tile.expert >= 0) {
    row_product<false, T>(
        tile, F, D, [&](int64_t row, int64_t k) { return hidden.at(row, k); },
        [&](int64_t e, int64_t k, int64_t d) { return rounded<T>(load(wo + (e * F + k) * D + d)); }, sums);
  }
  store_tile(tile, D, sums, out);
}

template <class T, class W>
__global__ void __launch_bounds__(kProductThreads)
    backward_hidden(Segments segments, Rows<T> grad, HiddenRows<T> hidden, const W* wo, Gates<T> gates, int64_t D,
                    T* grad_pre, T* grad_pre_gate, Sum<T>* grad_gate_parts) {
  using Acc = Sum<T>;
  const RowTile tile = segments.find(blockIdx.x);
  if (tile.rows == 0) return;
  const int64_t F = hidden.F;
  TileSums<Acc> sums = {};
  if (tile.expert >= 0) {
    row_product<true, T>(
        tile, D, F, [&](int64_t row, int64_t k) { return grad.at(row, D, k); },
        [&](int64_t e, int64_t k, int64_t f) { return rounded<T>(load(wo + (e * F + f) * D + k)); }, sums);
  }
  const bool geglu = hidden.activation == Activation::geglu;
  const int thread_row = threadIdx.x / kSide, thread_column = threadIdx.x % kSide;
  const int64_t column = blockIdx.y * static_cast<int64_t>(kTile) + thread_column;
  const int columns = F - column < kTile ? static_cast<int>(F - column) : kTile;  // from this thread's first one on
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int row = thread_row + kSide * i;
    const int64_t r = tile.begin + row;
    const bool inside = row < tile.rows;
    const Acc gate = inside && tile.expert >= 0 ? gates.of(grad, r) : Acc(0);
    Acc part = 0;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      if (!inside || kSide * j >= columns) continue;
      const int64_t at = r * F + column + kSide * j;
      const Acc pre = wide(load(hidden.pre + at));
      const Acc pre_gate = geglu ? wide(load(hidden.pre_gate + at)) : Acc(0);
      const auto activated = differentiate(hidden.activation, pre, pre_gate);
      part += activated.value * sums[i][j];
      const Acc scaled = gate * sums[i][j];
      store(grad_pre + at, narrow<T>(tile.expert < 0 ? Acc(0) : activated.by_pre * scaled));
      if (geglu) store(grad_pre_gate + at, narrow<T>(tile.expert < 0 ? Acc(0) : activated.by_gate * scaled));
    }
    if (!grad_gate_parts) continue;
    for (int distance = kSide / 2; distance > 0; distance /= 2) part += __shfl_xor_sync(kAllLanes, part, distance);
    if (inside && thread_column == 0) store(grad_gate_parts + r * gridDim.y + blockIdx.y, part);
  }
}

template <class Acc>
__global__ void __launch_bounds__(kGateThreads)
    sum_gate_parts(const int32_t* row_of_choice, int64_t choices, int64_t R, int64_t parts, const Acc* grad_gate_parts,
                   Acc* grad_gates) {
  const int64_t choice = blockIdx.x * static_cast<int64_t>(kGateThreads) + threadIdx.x;
  if (choice >= choices) return;
  const int64_t row = load(row_of_choice + choice);
  Acc sum = 0;
  for (int64_t i = 0; row >= 0 && row < R && i < parts; ++i) sum += load(grad_gate_parts + row * parts + i);
  store(grad_gates + choice, sum);
}

template <class T, class W, class Out>
__global__ void __launch_bounds__(kProductThreads)
    backward_rows(Segments segments, const T* grad_pre, const T* grad_pre_gate, const W* wi, const W* wg, int64_t D,
                  int64_t F, Out* grad_rows) {
  const RowTile tile = segments.find(blockIdx.x);
  if (tile.rows == 0) return;
  TileSums<Sum<T>> sums = {};
  const auto add = [&](const T* grad, const W* weight) {
    row_product<true, T>(
        tile, F, D, [&](int64_t row, int64_t k) { return wide(load(grad + row * F + k)); },
        [&](int64_t e, int64_t k, int64_t d) { return rounded<T>(load(weight + (e * D + d) * F + k)); }, sums);
  };
  if (tile.expert >= 0) add(grad_pre, wi);
  if (tile.expert >= 0 && wg) add(grad_pre_gate, wg);
  store_tile(tile, D, sums, grad_rows);
}

// gradient [E, M, N] of one weight: sum over the expert's rows r of a(r, m) * b(r, n).
template <class T, class W, class A, class B>
__device__ void weight_product(const Segments& segments, int64_t M, int64_t N, const A& a, const B& b, bool add,
                               W* gradient) {
  using Acc = Sum<T>;
  auto& storage = shared_storage<ProductStorage<Acc>>();
  const auto column_tiles = static_cast<uint32_t>(ceil_div(N, kTile));
  const int64_t e = blockIdx.y;
  const int64_t m0 = blockIdx.x / column_tiles * int64_t{kTile}, n0 = blockIdx.x % column_tiles * int64_t{kTile};
  TileSums<Acc> sums = {};
  for (int64_t segment = e; segment < segments.num_segments; segment += segments.num_experts) {
    const int64_t begin = segments.begin(segment), end = segments.begin(segment + 1);
    multiply_tile<false, false>(
        storage, end - begin, [&](int m, int64_t k) { return m0 + m < M ? a(begin + k, m0 + m) : Acc(0); },
        [&](int n, int64_t k) { return n0 + n < N ? b(begin + k, n0 + n) : Acc(0); }, sums);
  }
  for_each_sum<Acc>(sums, [&](int m, int n, Acc sum) {
    if (m0 + m >= M || n0 + n >= N) return;
    W* const to = gradient + (e * M + m0 + m) * N + n0 + n;
    store(to, narrow<W>(add ? static_cast<Sum<W>>(wide(load(to))) + static_cast<Sum<W>>(sum) : sum));
  });
}

template <class T, class W>
__global__ void __launch_bounds__(kProductThreads) backward_wo(Segments segments, HiddenRows<T> hidden, Rows<T> grad,
                                                               Gates<T> gates, int64_t D, bool add, W* grad_wo) {
  weight_product<T>(
      segments, hidden.F, D, [&](int64_t row, int64_t f) { return hidden.at(row, f); },
      [&](int64_t row, int64_t d) {
        const auto value = grad.at(row, D, d);
        return gates.gates ? rounded<T>(gates.of(grad, row) * value) : value;
      },
      add, grad_wo);
}

template <class T, class W>
__global__ void __launch_bounds__(kProductThreads)
    backward_wi(Segments segments, Rows<T> rows, const T* grad_pre, const T* grad_pre_gate, int64_t D, int64_t F,
                bool add, W* grad_wi, W* grad_wg) {
  const T* const grad = blockIdx.z == 0 ? grad_pre : grad_pre_gate;
  weight_product<T>(
      segments, D, F, [&](int64_t row, int64_t d) { return rows.at(row, D, d); },
      [&](int64_t row, int64_t f) { return wide(load(grad + row * F + f)); }, add, blockIdx.z == 0 ? grad_wi : grad_wg);
}

// f(T{}, W{}) for the types of activations and weights.
template <class F>
void dispatch_types(const ExpertProblem& problem, F&& f) {
  dispatch_type(problem.type, [&]<class T>(T t) {
    if (problem.weight_type == problem.type) return f(t, t);
    if constexpr (sizeof(T) == 2) f(t, float{});
  });
}

Segments segments_of(const ExpertProblem& problem) {
  return {problem.offsets, problem.S, problem.R, static_cast<int>(problem.E)};
}

dim3 row_grid(const ExpertProblem& problem, int64_t columns, int products = 1) {
  return dim3(most_row_tiles(problem.R, problem.S), ceil_div(columns, kTile), products);
}

template <class T>
HiddenRows<T> hidden_rows(const ExpertProblem& problem, const void* pre, const void* pre_gate) {
  return {static_cast<const T*>(pre), static_cast<const T*>(pre_gate), problem.activation, problem.F};
}

int products(const ExpertProblem& problem) { return problem.activation == Activation::geglu ? 2 : 1; }

}  // namespace

void expert_up(const ExpertProblem& problem, const RowSource& rows, const void* wi, const void* wg, void* pre,
               void* pre_gate, cudaStream_t stream) {
  dispatch_types(problem, [&]<class T, class W>(T, W) {
    launch(up<T, W>, row_grid(problem, problem.F, products(problem)), dim3(kProductThreads),
           sizeof(ProductStorage<Sum<T>>), stream, segments_of(problem), Rows<T>(rows), static_cast<const W*>(wi),
           static_cast<const W*>(wg), problem.D, problem.F, static_cast<T*>(pre), static_cast<T*>(pre_gate));
  });
}

void expert_down(const ExpertProblem& problem, const void* pre, const void* pre_gate, const void* wo, void* out,
                 bool out_wide, cudaStream_t stream) {
  dispatch_types(problem, [&]<class T, class W>(T, W) {
    const auto run = [&]<class Out>(Out) {
      launch(down<T, W, Out>, row_grid(problem, problem.D), dim3(kProductThreads), sizeof(ProductStorage<Sum<T>>),
             stream, segments_of(problem), hidden_rows<T>(problem, pre, pre_gate), static_cast<const W*>(wo), problem.D,
             problem.F, static_cast<Out*>(out));
    };
    out_wide ? run(Sum<T>{}) : run(T{});
  });
}

int64_t gate_parts(int64_t F) { return ceil_div(F, kTile); }

void expert_backward_hidden(const ExpertProblem& problem, const RowSource& grad, const void* pre, const void* pre_gate,
                            const void* wo, const void* gates, void* grad_pre, void* grad_pre_gate,
                            void* grad_gate_parts, cudaStream_t stream) {
  dispatch_types(problem, [&]<class T, class W>(T, W) {
    launch(backward_hidden<T, W>, row_grid(problem, problem.F), dim3(kProductThreads), sizeof(ProductStorage<Sum<T>>),
           stream, segments_of(problem), Rows<T>(grad), hidden_rows<T>(problem, pre, pre_gate),
           static_cast<const W*>(wo), Gates<T>{static_cast<const Sum<T>*>(gates)}, problem.D, static_cast<T*>(grad_pre),
           static_cast<T*>(grad_pre_gate), static_cast<Sum<T>*>(grad_gate_parts));
  });
}

void gate_gradients(const ExpertProblem& problem, const int32_t* row_of_choice, int64_t choices,
                    const void* grad_gate_parts, void* grad_gates, cudaStream_t stream) {
  dispatch_sum(problem.type, [&]<class Acc>(Acc) {
    launch(sum_gate_parts<Acc>, dim3(ceil_div(choices, kGateThreads)), dim3(kGateThreads), 0, stream, row_of_choice,
           choices, problem.R, gate_parts(problem.F), static_cast<const Acc*>(grad_gate_parts),
           static_cast<Acc*>(grad_gates));
  });
}

void expert_backward_rows(const ExpertProblem& problem, const void* grad_pre, const void* grad_pre_gate, const void* wi,
                          const void* wg, void* grad_rows, bool out_wide, cudaStream_t stream) {
  dispatch_types(problem, [&]<class T, class W>(T, W) {
    const auto run = [&]<class Out>(Out) {
      launch(backward_rows<T, W, Out>, row_grid(problem, problem.D), dim3(kProductThreads),
             sizeof(ProductStorage<Sum<T>>), stream, segments_of(problem), static_cast<const T*>(grad_pre),
             static_cast<const T*>(grad_pre_gate), static_cast<const W*>(wi), static_cast<const W*>(wg), problem.D,
             problem.F, static_cast<Out*>(grad_rows));
    };
    out_wide ? run(Sum<T>{}) : run(T{});
  });
}

void expert_backward_weights(const ExpertProblem& problem, const RowSource& grad, const RowSource& rows,
                             const void* pre, const void* pre_gate, const void* grad_pre, const void* grad_pre_gate,
                             const void* gates, bool add, void* grad_wi, void* grad_wo, void* grad_wg,
                             cudaStream_t stream) {
  const int64_t tiles = ceil_div(problem.D, kTile) * ceil_div(problem.F, kTile);
  dispatch_types(problem, [&]<class T, class W>(T, W) {
    const size_t shared_bytes = sizeof(ProductStorage<Sum<T>>);
    launch(backward_wo<T, W>, dim3(tiles, problem.E), dim3(kProductThreads), shared_bytes, stream, segments_of(problem),
           hidden_rows<T>(problem, pre, pre_gate), Rows<T>(grad), Gates<T>{static_cast<const Sum<T>*>(gates)},
           problem.D, add, static_cast<W*>(grad_wo));
    launch(backward_wi<T, W>, dim3(tiles, problem.E, products(problem)), dim3(kProductThreads), shared_bytes, stream,
           segments_of(problem), Rows<T>(rows), static_cast<const T*>(grad_pre), static_cast<const T*>(grad_pre_gate),
           problem.D, problem.F, add, static_cast<W*>(grad_wi), static_cast<W*>(grad_wg));
  });
}

}  // namespace glam::cuda
