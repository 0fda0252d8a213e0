// sample_sorted: a row belongs to a block. Candidates come sorted, so that a choice ends as soon as the running weight
// exceeds its target, usually within the first kThreads of them. Running weights are prefix sums within a warp, over
// the warps, over the tiles, in float64.

#include "cuda/kernels/sampling.h"

#include <cmath>
#include <limits>

#include "cuda/kernels/rows.cuh"

namespace glam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// As csrc/ops/philox.h, for the device.
__device__ __forceinline__ uint32_t philox_first_word(int64_t seed, int64_t stream, int64_t index) {
  const auto low = [](int64_t x) { return static_cast<uint32_t>(static_cast<uint64_t>(x)); };
  const auto high = [](int64_t x) { return static_cast<uint32_t>(static_cast<uint64_t>(x) >> 32); };
  uint32_t c0 = low(index), c1 = high(index), c2 = low(stream), c3 = high(stream), k0 = low(seed), k1 = high(seed);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c0;
}

__global__ void __launch_bounds__(kThreads)
    uniform_kernel(int64_t seed, int64_t stream, const int64_t* index, int64_t count, float* out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  store(out + i, static_cast<float>(philox_first_word(seed, stream, load(index + i)) >> 8) * 0x1p-24f);
}

struct Best {
  double logit;
  int64_t index;
  int has_nan;
};

// The larger logit, the lower index among equals; a NaN anywhere is remembered.
__device__ __forceinline__ Best better(const Best& a, const Best& b) {
  const bool first = a.logit != b.logit ? a.logit > b.logit : a.index < b.index;
  return {first ? a.logit : b.logit, first ? a.index : b.index, a.has_nan | b.has_nan};
}

__device__ __forceinline__ Best best_of_warp(Best best) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    best = better(best,
                  {__shfl_xor_sync(kAllLanes, best.logit, distance), __shfl_xor_sync(kAllLanes, best.index, distance),
                   __shfl_xor_sync(kAllLanes, best.has_nan, distance)});
  }
  return best;
}

__device__ __forceinline__ bool is_unit(float uniform) { return uniform >= 0 && uniform < 1; }

struct LargestShared {
  Best of_warp[kWarps];
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    largest_kernel(const T* logits_BV, const float* uniform_B, int64_t V, int64_t* chosen_B) {
  auto& shared = shared_storage<LargestShared>();
  const int64_t b = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  Best best{-kInfinity, kNone, 0};
#pragma unroll 4
  for (int64_t v = thread; v < V; v += kThreads) {
    const double logit = load(logits_BV + b * V + v);
    best = better(best, {logit, v, logit != logit});
  }
  best = best_of_warp(best);
  if (lane == 0) store(&shared.of_warp[warp], best);
  __syncthreads();
  if (warp > 0) return;
  best = best_of_warp(load(&shared.of_warp[lane < kWarps ? lane : 0]));
  if (lane > 0) return;
  const bool valid = best.has_nan == 0 && std::abs(best.logit) < kInfinity && is_unit(load(uniform_B + b));
  store(chosen_B + b, valid ? best.index : -1);
}

struct SampleShared {
  double sums[kMaxWarps];
  double of_warp[kWarps];
  int64_t first[kWarps];
};

// Where a walk down the candidates stopped.
struct Stop {
  int64_t rank;   // of the first candidate of positive weight at which the sum passes the target, or kNone
  double weight;  // the running weight there
};

// Walks the candidates [0, kept) in tiles of one a thread. passes(running): whether a running weight passes the target.
template <class Weight, class Passes>
__device__ Stop walk(int64_t kept, SampleShared& shared, const Weight& weight_of, const Passes& passes) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  double before = 0;  // the weight of all tiles before this one
  for (int64_t begin = 0; begin < kept; begin += kThreads) {
    const int64_t rank = begin + thread;
    const double weight = rank < kept ? weight_of(rank) : 0.;
    double running = weight;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const double lower = __shfl_up_sync(kAllLanes, running, distance);
      if (lane >= distance) running += lower;
    }
    if (lane == kWarp - 1) store(&shared.of_warp[warp], running);
    __syncthreads();
    double offset = before;
    for (int w = 0; w < warp; ++w) offset += load(&shared.of_warp[w]);
    running += offset;
    const unsigned passed = __ballot_sync(kAllLanes, weight > 0 && passes(running));
    if (lane == 0) store(&shared.first[warp], passed == 0 ? kNone : begin + warp * kWarp + __ffs(passed) - 1);
    for (int w = 0; w < kWarps; ++w) before += load(&shared.of_warp[w]);
    __syncthreads();
    int64_t first = kNone;
    for (int w = kWarps - 1; w >= 0; --w) {
      if (load(&shared.first[w]) != kNone) first = load(&shared.first[w]);
    }
    if (first != kNone) {
      // Every thread needs the sum that the thread of that candidate has.
      if (rank == first) store(&shared.sums[0], running);
      __syncthreads();
      const Stop stop{first, load(&shared.sums[0])};
      __syncthreads();
      return stop;
    }
  }
  __syncthreads();
  return {kNone, before};
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const T* sorted_BV, const int64_t* order_BV, const float* uniform_B, int64_t V, double temperature,
                  int64_t kept, double top_p, int64_t* chosen_B) {
  auto& shared = shared_storage<SampleShared>();
  const int64_t b = blockIdx.x;
  const T* const logits_V = sorted_BV + b * V;
  const double best = load(logits_V), least = load(logits_V + V - 1);
  const float uniform = load(uniform_B + b);
  const auto choose = [&](int64_t rank) {
    if (threadIdx.x == 0) store(chosen_B + b, rank < 0 ? rank : load(order_BV + b * V + rank));
  };
  // NaN is sorted to an end, which one by its sign, so the two vouch for all between them.
  if (!(std::abs(best) < kInfinity) || least != least || !is_unit(uniform)) return choose(-1);
  const auto weight_of = [&](int64_t rank) {
    const double logit = load(logits_V + rank);
    return logit == best ? 1. : std::exp((logit - best) / temperature);
  };
  double total = 0;
  for (int64_t rank = threadIdx.x; rank < kept; rank += kThreads) total += weight_of(rank);
  total = block_sum(total, shared.sums);
  __syncthreads();
  if (top_p < 1) {
    const double enough = top_p * total;
    const Stop stop = walk(kept, shared, weight_of, [=](double running) { return running >= enough; });
    if (stop.rank != kNone) {
      kept = stop.rank + 1;
      total = stop.weight;
    }
  }
  const double target = uniform * total;
  const Stop stop = walk(kept, shared, weight_of, [=](double running) { return running > target; });
  if (stop.rank != kNone) return choose(stop.rank);
  // Only rounding leads here: the last candidate of positive weight stands.
  int64_t low = 0, high = kept - 1;
  while (low < high) {
    const int64_t middle = high - (high - low) / 2;
    if (weight_of(middle) > 0) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  choose(low);
}

}  // namespace

void counter_uniform(int64_t seed, int64_t stream_number, const int64_t* index, int64_t count, float* out,
                     cudaStream_t stream) {
  launch(&uniform_kernel, dim3(static_cast<unsigned>(ceil_div(count, kThreads))), dim3(kThreads), 0, stream, seed,
         stream_number, index, count, out);
}

void choose_largest(const void* logits, Type type, const float* uniform, int64_t B, int64_t V, int64_t* chosen,
                    cudaStream_t stream) {
  dispatch_sum(type, [&](auto zero) {
    using T = decltype(zero);
    launch(&largest_kernel<T>, dim3(static_cast<unsigned>(B)), dim3(kThreads), sizeof(LargestShared), stream,
           static_cast<const T*>(logits), uniform, V, chosen);
  });
}

void sample_sorted(const void* sorted, Type type, const int64_t* order, const float* uniform, int64_t B, int64_t V,
                   double temperature, int64_t kept, double top_p, int64_t* chosen, cudaStream_t stream) {
  dispatch_sum(type, [&](auto zero) {
    using T = decltype(zero);
    launch(&sample_kernel<T>, dim3(static_cast<unsigned>(B)), dim3(kThreads), sizeof(SampleShared), stream,
           static_cast<const T*>(sorted), order, uniform, V, temperature, kept, top_p, chosen);
  });
}

}  // namespace glam::cuda
