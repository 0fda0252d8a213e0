// Scores are walked by a block per row, the bias by distance being read from a line per head. Every sum has a fixed
// order: the columns of a row over the threads, the buckets of the bias's gradient over the lanes of a warp, its rows
// in chunks.

#include "cuda/kernels/attention.h"

#include <cmath>

#include "cuda/kernels/softmax.cuh"
#include "ops/relative_buckets.h"

namespace glam::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBuckets = static_cast<int>(kNumBuckets);
static_assert(kBuckets == kWarp, "a lane for each bucket");
constexpr int kRowsPerChunk = 16;  // of the bias's gradient, for one block

// Distances of each bucket b: [first[b], first[b + 1]). The last has no end.
struct Buckets {
  int first[kBuckets];

  constexpr Buckets() : first{} {
    for (int64_t d = 0; d <= kFirstDistances.back(); ++d) {
      if (d == 0 || bucket_of_distance(d) != bucket_of_distance(d - 1))
        first[bucket_of_distance(d)] = static_cast<int>(d);
    }
  }
};

// What a query sees.
struct Query {
  int64_t position;  // -1: nothing
  bool is_valid;     // its row has room
  int32_t segment;
  const int32_t* segments;  // of the keys

  __device__ __forceinline__ Query(const AttentionShape& shape, int64_t b, int64_t n)
      : position(n), is_valid(true), segment(0), segments(nullptr) {
    if (shape.positions != nullptr) {
      const int64_t first = load(shape.positions + b);
      is_valid = first >= -1 && first + shape.N <= shape.L;
      position = is_valid && first >= 0 ? first + n : -1;
    }
    if (shape.segments != nullptr && position >= 0) {
      segments = shape.segments + b * shape.L;
      segment = load(segments + position);
      if (segment == 0) position = -1;
    }
  }
  __device__ __forceinline__ bool sees(int64_t key) const {
    return key <= position && (segments == nullptr || load(segments + key) == segment);
  }
};

template <class S>
struct RowShared {
  S values[kMaxWarps];
};

template <class S>
__global__ void __launch_bounds__(kThreads)
    lines_kernel(const S* table, Buckets buckets, int64_t L, int64_t count, S* lines) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t h = i / L, distance = i % L;
  int bucket = 0;
#pragma unroll
  for (int b = 1; b < kBuckets; ++b) bucket += distance >= buckets.first[b] ? 1 : 0;
  store(lines + i, load(table + h * kBuckets + bucket));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_kernel(AttentionShape shape, const Sum<T>* lines, int64_t stride, T* bias) {
  const int64_t row = blockIdx.x, n = row % shape.N, h = row / shape.N % shape.H, b = row / shape.N / shape.H;
  const Query query(shape, b, n);
  const Sum<T>* const line = lines + h * shape.L;
  // A key at a time: a thread with a vector of them would read its part of the line far from its neighbours'.
#pragma unroll 4
  for (int64_t key = threadIdx.x; key < stride; key += kThreads) {
    const Sum<T> value = query.sees(key) ? load(line + (query.position - key)) : -kInfinity<Sum<T>>;
    store(bias + row * stride + key, narrow<T>(value));
  }
}

__global__ void __launch_bounds__(kThreads)
    factors_kernel(AttentionShape shape, const float* raw_lse, int64_t raw_stride, float* lse, float* factor) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= shape.B * shape.H * shape.N) return;
  const int64_t n = i % shape.N, bh = i / shape.N;
  const Query query(shape, bh / shape.H, n);
  float log_sum = shape.extra_logit ? 0.f : kInfinity<float>;
  float share = query.is_valid ? 0.f : kNaN<float>;
  if (query.position >= 0) {
    const float raw = load(raw_lse + bh * raw_stride + n);
    // log(e^raw + 1), and what e^raw is of that sum.
    log_sum = shape.extra_logit ? (raw > 0 ? raw : 0.f) + std::log1p(std::exp(-std::abs(raw))) : raw;
    share = shape.extra_logit ? 1.f / (1.f + std::exp(-raw)) : 1.f;
  }
  if (lse != nullptr) store(lse + i, log_sum);
  store(factor + i, share);
}

// A row of scores and what belongs to it. Loops over its keys stay as they are: unrolled, the branches of logit() need
// more registers for their reconvergence than there are.
template <bool capped, class S>
struct ScoreRow {
  Query query;
  const S* line;
  S cap;

  __device__ __forceinline__ ScoreRow(const AttentionShape& shape, const AttentionPart& part, const S* lines, S cap_)
      : ScoreRow(shape, lines, cap_, part.sequence + head_of_part(shape) / static_cast<unsigned>(part.heads),
                 part.head + head_of_part(shape) % static_cast<unsigned>(part.heads)) {}
  __device__ __forceinline__ ScoreRow(const AttentionShape& shape, const S* lines, S cap_, int64_t b, int64_t h)
      : query(shape, b, blockIdx.x % static_cast<unsigned>(shape.N)), line(lines + h * shape.L), cap(cap_) {}
  // Divisions of 32 bits: those of 64 are calls, which registers have to be saved for.
  static __device__ __forceinline__ unsigned head_of_part(const AttentionShape& shape) {
    return blockIdx.x / static_cast<unsigned>(shape.N);
  }
  // -infinity where masked.
  __device__ __forceinline__ S logit(S product, int64_t key) const {
    if (!query.sees(key)) return -kInfinity<S>;
    const S sum = product + load(line + (query.position - key));
    if constexpr (capped) return cap * std::tanh(sum / cap);
    return sum;
  }
  // d logit / d sum.
  __device__ __forceinline__ S slope([[maybe_unused]] S logit) const {
    if constexpr (capped) return S(1) - logit / cap * (logit / cap);
    return S(1);
  }
};

template <bool capped, class T>
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(AttentionShape shape, AttentionPart part, const Sum<T>* lines, Sum<T> cap, Sum<T>* scores,
                   Sum<T>* lse, Sum<T>* factor) {
  using S = Sum<T>;
  auto& shared = shared_storage<RowShared<S>>();
  const ScoreRow<capped, S> row(shape, part, lines, cap);
  S* const row_scores = scores + int64_t{blockIdx.x} * shape.L;
  S largest = shape.extra_logit ? S(0) : -kInfinity<S>;
#pragma unroll 1
  for (int64_t key = threadIdx.x; key < shape.L; key += kThreads) {
    const S logit = row.logit(load(row_scores + key), key);
    largest = logit > largest ? logit : largest;
  }
  largest = block_max(largest, shared.values);
  const S shift = largest == -kInfinity<S> ? S(0) : largest;
  S sum = 0;
#pragma unroll 1
  for (int64_t key = threadIdx.x; key < shape.L; key += kThreads) {
    const S numerator = std::exp(row.logit(load(row_scores + key), key) - shift);
    sum += numerator;
    store(row_scores + key, wide(narrow<T>(numerator)));
  }
  sum = block_sum(sum, shared.values);
  if (threadIdx.x > 0) return;
  if (shape.extra_logit) sum += std::exp(-shift);
  store(lse + blockIdx.x, sum == S(0) ? kInfinity<S> : shift + std::log(sum));
  store(factor + blockIdx.x, !row.query.is_valid ? kNaN<S> : sum == S(0) ? S(0) : S(1) / sum);
}

template <bool capped, class T>
__global__ void __launch_bounds__(kThreads)
    score_gradient_kernel(AttentionShape shape, AttentionPart part, const Sum<T>* lines, Sum<T> cap, const Sum<T>* lse,
                          Sum<T>* scores, Sum<T>* grads) {
  using S = Sum<T>;
  auto& shared = shared_storage<RowShared<S>>();
  const ScoreRow<capped, S> row(shape, part, lines, cap);
  S *const row_scores = scores + int64_t{blockIdx.x} * shape.L, *const row_grads =
                                                                    grads + int64_t{blockIdx.x} * shape.L;
  const S shift = load(lse + blockIdx.x);
  S delta = 0;
#pragma unroll 1
  for (int64_t key = threadIdx.x; key < shape.L; key += kThreads) {
    const S probability = std::exp(row.logit(load(row_scores + key), key) - shift);
    if (probability != S(0)) delta += probability * load(row_grads + key);
  }
  delta = block_sum(delta, shared.values);
#pragma unroll 1
  for (int64_t key = threadIdx.x; key < shape.L; key += kThreads) {
    const S logit = row.logit(load(row_scores + key), key), probability = std::exp(logit - shift);
    // What is masked has no probability and no slope.
    const S grad = probability == S(0) ? S(0) : probability * (load(row_grads + key) - delta) * row.slope(logit);
    store(row_scores + key, wide(narrow<T>(probability)));
    store(row_grads + key, wide(narrow<T>(grad)));
  }
}

// The block's rows by bucket. A lane adds up the few distances of its own bucket; those of the last, which are most of
// a long row, are shared by all lanes.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_partial_kernel(const T* grads, Buckets buckets, int64_t N, int64_t stride, int64_t chunks, Sum<T>* partial) {
  using S = Sum<T>;
  constexpr int kWarps = kThreads / kWarp;
  auto& shared = shared_storage<ColumnSums<S>>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row_of_heads = int64_t{blockIdx.x} / chunks, begin = int64_t{blockIdx.x} % chunks * kRowsPerChunk;
  const int64_t end = begin + kRowsPerChunk < N ? begin + kRowsPerChunk : N;
  int first = 0, last = 0;  // of this lane's bucket; unrolled, for an index known at run time would put them in memory
#pragma unroll
  for (int b = 0; b + 1 < kBuckets; ++b) {
    first = lane == b ? buckets.first[b] : first;
    last = lane == b ? buckets.first[b + 1] : last;
  }
  const int64_t far = buckets.first[kBuckets - 1];
  S sum = 0, far_sum = 0;
  for (int64_t n = begin + warp; n < end; n += kWarps) {
    const T* const row = grads + (row_of_heads * N + n) * stride;
    for (int64_t d = first; d < last && d <= n; ++d) sum += wide(load(row + (n - d)));
    for (int64_t key = lane; key <= n - far; key += kWarp) far_sum += wide(load(row + key));
  }
  far_sum = warp_sum(far_sum);
  store(&shared.of_warp[warp][lane], lane == kBuckets - 1 ? far_sum : sum);
  __syncthreads();
  if (warp > 0) return;
  S total = 0;
  for (int w = 0; w < kWarps; ++w) total += load(&shared.of_warp[w][lane]);
  store(partial + int64_t{blockIdx.x} * kBuckets + lane, total);
}

// A block per head.
template <class S>
__global__ void __launch_bounds__(kColumnWarps* kWarp)
    bias_sum_kernel(const S* partial, int64_t B, int64_t H, int64_t chunks, S* grad) {
  auto& shared = shared_storage<ColumnSums<double>>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t h = blockIdx.x;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = warp; i < B * chunks; i += kColumnWarps) {
    sum += load(partial + ((i / chunks * H + h) * chunks + i % chunks) * kBuckets + lane);
  }
  store(&shared.of_warp[warp][lane], sum);
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < kColumnWarps; ++w) sum += load(&shared.of_warp[w][lane]);
  store(grad + h * kBuckets + lane, static_cast<S>(sum));
}

// A block per row of the cache that is written, or read.
template <bool whole, class T>
__global__ void __launch_bounds__(kThreads)
    write_cache_kernel(const T* x, int64_t N, int64_t L, int64_t columns, const int32_t* positions, T* cache) {
  const int64_t b = int64_t{blockIdx.x} / N, n = int64_t{blockIdx.x} % N, first = load(positions + b);
  if (first < 0 || first + N > L) return;
  const T* const from = x + int64_t{blockIdx.x} * columns;
  T* const to = cache + (b * L + first + n) * columns;
  for (int64_t piece = threadIdx.x; piece < ceil_div(columns, Vector<T>::size); piece += kThreads) {
    const int64_t begin = piece * Vector<T>::size;
    store_piece<whole>(to, begin, columns, load_piece<whole>(from, begin, columns));
  }
}
template <bool whole, class T>
__global__ void __launch_bounds__(kThreads)
    read_cache_kernel(const T* cache, int64_t N, int64_t L, int64_t columns, const int32_t* positions, T* out) {
  const int64_t b = int64_t{blockIdx.x} / L, key = int64_t{blockIdx.x} % L, first = load(positions + b);
  const bool is_visible = first >= 0 && key < first + N;
  const T* const from = cache + int64_t{blockIdx.x} * columns;
  for (int64_t piece = threadIdx.x; piece < ceil_div(columns, Vector<T>::size); piece += kThreads) {
    const int64_t begin = piece * Vector<T>::size;
    Vector<T> values;
    if (is_visible) {
      values = load_piece<whole>(from, begin, columns);
    } else {
#pragma unroll
      for (int i = 0; i < Vector<T>::size; ++i) values[i] = narrow<T>(0.f);
    }
    store_piece<whole>(out + int64_t{blockIdx.x} * columns, begin, columns, values);
  }
}

dim3 blocks(int64_t count) { return dim3(static_cast<unsigned>(count)); }

}  // namespace

void attention_lines(const void* table, Type type, int64_t H, int64_t L, void* lines, cudaStream_t stream) {
  dispatch_sum(type, [&](auto zero) {
    using S = decltype(zero);
    launch(&lines_kernel<S>, blocks(ceil_div(H * L, kThreads)), dim3(kThreads), 0, stream, static_cast<const S*>(table),
           Buckets(), L, H * L, static_cast<S*>(lines));
  });
}

void attention_bias(const AttentionShape& shape, Type type, const void* lines, int64_t stride, void* bias,
                    cudaStream_t stream) {
  dispatch_type(type, [&](auto zero) {
    using T = decltype(zero);
    launch(&bias_kernel<T>, blocks(shape.B * shape.H * shape.N), dim3(kThreads), 0, stream, shape,
           static_cast<const Sum<T>*>(lines), stride, static_cast<T*>(bias));
  });
}

void attention_factors(const AttentionShape& shape, const float* raw_lse, int64_t raw_stride, float* lse, float* factor,
                       cudaStream_t stream) {
  launch(&factors_kernel, blocks(ceil_div(shape.B * shape.H * shape.N, kThreads)), dim3(kThreads), 0, stream, shape,
         raw_lse, raw_stride, lse, factor);
}

void attention_softmax(const AttentionShape& shape, const AttentionPart& part, Type type, const void* lines,
                       double logit_cap, void* scores, void* lse, void* factor, cudaStream_t stream) {
  dispatch_type(type, [&](auto zero) {
    using T = decltype(zero);
    using S = Sum<T>;
    dispatch_bool(logit_cap > 0, [&](auto capped) {
      launch(&softmax_kernel<decltype(capped)::value, T>, blocks(part.sequences * part.heads * shape.N), dim3(kThreads),
             sizeof(RowShared<S>), stream, shape, part, static_cast<const S*>(lines), static_cast<S>(logit_cap),
             static_cast<S*>(scores), static_cast<S*>(lse), static_cast<S*>(factor));
    });
  });
}

void attention_score_gradient(const AttentionShape& shape, const AttentionPart& part, Type type, const void* lines,
                              double logit_cap, const void* lse, void* scores, void* grads, cudaStream_t stream) {
  dispatch_type(type, [&](auto zero) {
    using T = decltype(zero);
    using S = Sum<T>;
    dispatch_bool(logit_cap > 0, [&](auto capped) {
      launch(&score_gradient_kernel<decltype(capped)::value, T>, blocks(part.sequences * part.heads * shape.N),
             dim3(kThreads), sizeof(RowShared<S>), stream, shape, part, static_cast<const S*>(lines),
             static_cast<S>(logit_cap), static_cast<const S*>(lse), static_cast<S*>(scores), static_cast<S*>(grads));
    });
  });
}

int64_t bias_gradient_chunks(int64_t N) { return ceil_div(N, kRowsPerChunk); }

void bias_gradient_partial(const void* grads, Type type, int64_t rows, int64_t N, int64_t stride, void* partial,
                           cudaStream_t stream) {
  dispatch_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t chunks = bias_gradient_chunks(N);
    launch(&bias_partial_kernel<T>, blocks(rows * chunks), dim3(kThreads), sizeof(ColumnSums<Sum<T>>), stream,
           static_cast<const T*>(grads), Buckets(), N, stride, chunks, static_cast<Sum<T>*>(partial));
  });
}

void bias_gradient(const void* partial, Type type, int64_t B, int64_t H, int64_t N, void* grad, cudaStream_t stream) {
  dispatch_sum(type, [&](auto zero) {
    using S = decltype(zero);
    launch(&bias_sum_kernel<S>, blocks(H), dim3(kColumnWarps * kWarp), sizeof(ColumnSums<double>), stream,
           static_cast<const S*>(partial), B, H, bias_gradient_chunks(N), static_cast<S*>(grad));
  });
}

void write_cache(const void* x, Type type, int64_t B, int64_t N, int64_t L, int64_t columns, const int32_t* positions,
                 void* cache, cudaStream_t stream) {
  dispatch_type(type, [&](auto zero) {
    using T = decltype(zero);
    dispatch_bool(rows_are_vectors<T>(columns, x, cache), [&](auto whole) {
      launch(&write_cache_kernel<decltype(whole)::value, T>, blocks(B * N), dim3(kThreads), 0, stream,
             static_cast<const T*>(x), N, L, columns, positions, static_cast<T*>(cache));
    });
  });
}

void read_cache(const void* cache, Type type, int64_t B, int64_t N, int64_t L, int64_t columns,
                const int32_t* positions, void* out, cudaStream_t stream) {
  dispatch_type(type, [&](auto zero) {
    using T = decltype(zero);
    dispatch_bool(rows_are_vectors<T>(columns, cache, out), [&](auto whole) {
      launch(&read_cache_kernel<decltype(whole)::value, T>, blocks(B * L), dim3(kThreads), 0, stream,
             static_cast<const T*>(cache), N, L, columns, positions, static_cast<T*>(out));
    });
  });
}

}  // namespace glam::cuda
