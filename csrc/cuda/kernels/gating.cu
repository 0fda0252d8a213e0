// One warp per token: lane l holds the logits of experts l, l + 32, ... in registers. Forward, in three launches over
// chunks of a group's tokens: (1) softmax, choices, gates, and per chunk the sums of p and the experts' counts; (2) per
// group, what the chunks before each chunk have used, and aux_loss; (3) slots, ranked in token order, and final gates.
// Counts are integers; sums of p are added in the order (token of a warp, warp, chunk).
#include "cuda/kernels/gating.h"

#include "cuda/kernels/probabilities.cuh"

namespace glam::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTokensPerWarp = kGatingChunk / kWarps;
constexpr int kSlotThreads = kGatingChunk;  // a token each
constexpr int kSlotWarps = kSlotThreads / kWarp;
constexpr int kStrips = 8;  // of a group's chunks, in the scan

constexpr double kTiny = 1e-9;
constexpr double kExcluded = -0.7 * 3.4028234663852886e38;  // logit of the first expert when sampling

constexpr int32_t kNoSlot = -1;  // masked, or skipped by the policy
constexpr int32_t kOverCapacity = -2;
constexpr int32_t kZeroGate = -3;

struct Noise {
  const void* values;  // null: none
  bool is_double;

  __device__ double operator[](int64_t i) const {
    return is_double ? load(static_cast<const double*>(values) + i)
                     : static_cast<double>(load(static_cast<const float*>(values) + i));
  }
};

// Gumbel-max over the logits with the first expert excluded; in double, so that the draw does not hang on rounding.
template <class T, int per_lane>
__device__ int sample_second(const T* logits_E, const Noise& noise, int64_t token, int E, int lane, int first) {
  Largest<double> largest{-std::numeric_limits<double>::infinity(), E};
#pragma unroll 1
  for (int i = 0; i < per_lane; ++i) {
    const int e = lane + kWarp * i;
    if (e >= E) break;
    const double uniform = noise[token * E + e];
    const double gumbel = -log(-log(uniform < 0. ? 0. : uniform > 1. ? 1. : uniform));
    const double value = (e == first ? kExcluded : static_cast<double>(wide(load(logits_E + e)))) + gumbel;
    if (value > largest.value) largest = {value, e};  // not a NaN
  }
  largest.over_warp();
  return largest.index < E ? largest.index : 0;
}

template <class Acc>
struct ChooseStorage {
  int32_t first_count[kMostGatedExperts], second_count[kMostGatedExperts];
  Acc p_sum[kWarps][kMostGatedExperts];
};

// Ids, gates before slots, positions 0 (wants a slot) or -1; per chunk the sums and counts.
// One block per multiprocessor is enough for the compiler: for more it would spill.
template <class T, int per_lane>
__global__ void __launch_bounds__(kThreads, 1)
    choose(const GatingProblem problem, const T* logits_TE, const bool* mask_T, Noise noise, Sum<T>* gates_T2,
           int32_t* ids_T2, int32_t* positions_T2, GatingWorkspace workspace) {
  using Acc = Sum<T>;
  auto& storage = shared_storage<ChooseStorage<Acc>>();
  const int E = static_cast<int>(problem.E), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int e = threadIdx.x; e < E; e += kThreads) {
    store(&storage.first_count[e], int32_t{0});
    store(&storage.second_count[e], int32_t{0});
  }
  __syncthreads();

  const auto chunks_of_group = static_cast<uint32_t>(problem.chunks_of_group());
  const int64_t group = blockIdx.x / chunks_of_group, chunk = blockIdx.x % chunks_of_group;
  const int64_t group_end = (group + 1) * problem.group_size;
  const int64_t begin = group * problem.group_size + chunk * kGatingChunk + warp * kTokensPerWarp;
  const int64_t end = begin + kTokensPerWarp < group_end ? begin + kTokensPerWarp : group_end;

  Acc sums[per_lane] = {};
  for (int64_t t = begin; t < end; ++t) {
    const T* const logits_E = logits_TE + t * E;
    const bool real = !mask_T || load(mask_T + t);
    Probabilities<Acc, per_lane> probabilities(E, lane);
    int first = 0, second = E > 1 ? 1 : 0;
    Acc gate_first = 0, gate_second = 0;
    bool wants_second = real;
    if (probabilities.softmax(logits_E)) {
      first = probabilities.first_largest(-1);
      second = problem.second == SecondChoice::sampling ? sample_second<T, per_lane>(logits_E, noise, t, E, lane, first)
                                                        : probabilities.first_largest(real ? first : -1);
      const Acc g1 = probabilities.of(first), g2 = second == first ? Acc(0) : probabilities.of(second);
      const Acc total = g1 + g2 + static_cast<Acc>(kTiny);
      gate_first = problem.normalize_before_capacity ? g1 / total : g1;
      gate_second = problem.normalize_before_capacity ? g2 / total : g2;
      if (real && problem.second == SecondChoice::random) {
        const double threshold = problem.second_threshold > kTiny ? problem.second_threshold : kTiny;
        wants_second = noise[t] * threshold < static_cast<double>(g2 / total);
      }
#pragma unroll
      for (int i = 0; i < per_lane; ++i) sums[i] += real ? probabilities.p[i] : Acc(0);
    } else {
      gate_first = gate_second = std::numeric_limits<Acc>::quiet_NaN();
#pragma unroll
      for (int i = 0; i < per_lane; ++i) sums[i] += real ? std::numeric_limits<Acc>::quiet_NaN() : Acc(0);
    }
    if (lane < 2) {
      store(ids_T2 + 2 * t + lane, lane == 0 ? first : second);
      store(gates_T2 + 2 * t + lane, !real ? Acc(0) : lane == 0 ? gate_first : gate_second);
      store(positions_T2 + 2 * t + lane, (lane == 0 ? real : wants_second) ? 0 : kNoSlot);
    }
    if (lane == 0 && real) atomicAdd(&storage.first_count[first], 1);
    if (lane == 0 && wants_second) atomicAdd(&storage.second_count[second], 1);
  }
#pragma unroll
  for (int i = 0; i < per_lane; ++i) {
    if (lane + kWarp * i < E) store(&storage.p_sum[warp][lane + kWarp * i], sums[i]);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kThreads) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += static_cast<double>(load(&storage.p_sum[w][e]));
    const int64_t at = blockIdx.x * static_cast<int64_t>(E) + e;
    store(workspace.p_sums + at, sum);
    store(workspace.first_counts + at, load(&storage.first_count[e]));
    store(workspace.second_counts + at, load(&storage.second_count[e]));
  }
}

struct ScanStorage {
  int32_t first[kStrips][kWarp], second[kStrips][kWarp];
  double p[kStrips][kWarp];
};

// Grid (G, ceil(E / 32)): a lane per expert, a warp per strip of the group's chunks. The counts become the slots that
// the chunks before have used; aux_parts the 32 experts' part of sum over e of (fraction of first choices) * (mean of
// p).
__global__ void __launch_bounds__(kStrips* kWarp) scan_chunks(const GatingProblem problem, GatingWorkspace workspace) {
  auto& storage = shared_storage<ScanStorage>();
  const int lane = threadIdx.x % kWarp, strip = threadIdx.x / kWarp, E = static_cast<int>(problem.E);
  const int e = blockIdx.y * kWarp + lane;
  const int64_t chunks = problem.chunks_of_group(), stretch = ceil_div(chunks, kStrips);
  const int64_t begin = strip * stretch, end = begin + stretch < chunks ? begin + stretch : chunks;
  const int64_t base = blockIdx.x * chunks * E + e;
  int32_t first = 0, second = 0;
  double p = 0;
  for (int64_t chunk = begin; e < E && chunk < end; ++chunk) {
    first += load(workspace.first_counts + base + chunk * E);
    second += load(workspace.second_counts + base + chunk * E);
    p += load(workspace.p_sums + base + chunk * E);
  }
  store(&storage.first[strip][lane], first);
  store(&storage.second[strip][lane], second);
  store(&storage.p[strip][lane], p);
  __syncthreads();
  int32_t first_used = 0, second_used = 0, first_total = 0;
  double p_total = 0;
  for (int s = 0; s < kStrips; ++s) {
    const int32_t first_here = load(&storage.first[s][lane]);
    first_used += s < strip ? first_here : 0;
    second_used += s < strip ? load(&storage.second[s][lane]) : 0;
    first_total += first_here;
    p_total += load(&storage.p[s][lane]);
  }
  // Second choices come after all first ones that found a slot.
  second_used +=
      problem.capacity >= 0 && first_total > problem.capacity ? static_cast<int32_t>(problem.capacity) : first_total;
  for (int64_t chunk = begin; e < E && chunk < end; ++chunk) {
    int32_t* const first_here = workspace.first_counts + base + chunk * E;
    int32_t* const second_here = workspace.second_counts + base + chunk * E;
    const int32_t first_count = load(first_here), second_count = load(second_here);
    store(first_here, first_used);
    store(second_here, second_used);
    first_used += first_count;
    second_used += second_count;
  }
  if (strip == 0) {
    const double size = static_cast<double>(problem.group_size);
    const double part = warp_sum(e < E ? first_total / size * (p_total / size) : 0.);
    if (lane == 0) store(workspace.aux_parts + blockIdx.x * static_cast<int64_t>(gridDim.y) + blockIdx.y, part);
  }
}

struct SlotStorage {
  int32_t used[1];  // [warps, E]: tokens of the chunk's earlier warps that chose e
};

// The slot of one choice of every token of the chunk, in token order; `used_E` slots were taken before the chunk.
__device__ int32_t slot_of(int32_t* used, int E, int expert, const int32_t* used_E, int64_t capacity) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < kSlotWarps * E; i += kSlotThreads) store(used + i, int32_t{0});
  __syncthreads();
  const unsigned same = __match_any_sync(kAllLanes, expert);
  const int rank = __popc(same & ((1u << lane) - 1));
  if (expert >= 0 && rank == 0) store(used + warp * E + expert, __popc(same));
  __syncthreads();
  int32_t slot = rank;
  if (expert >= 0) {
    slot += load(used_E + expert);
    for (int w = 0; w < warp; ++w) slot += load(used + w * E + expert);
  }
  __syncthreads();  // before the next call clears
  return capacity >= 0 && slot >= capacity ? kOverCapacity : slot;
}

template <class Acc>
__global__ void __launch_bounds__(kSlotThreads)
    assign_slots(const GatingProblem problem, GatingWorkspace workspace, int64_t aux_parts, const int32_t* ids_T2,
                 Acc* gates_T2, int32_t* positions_T2, Acc* aux_G) {
  int32_t* const used = shared_storage<SlotStorage>().used;
  const int E = static_cast<int>(problem.E);
  const auto chunks_of_group = static_cast<uint32_t>(problem.chunks_of_group());
  const int64_t group = blockIdx.x / chunks_of_group, chunk = blockIdx.x % chunks_of_group;
  const int64_t t = group * problem.group_size + chunk * kGatingChunk + threadIdx.x;
  const bool here = t < (group + 1) * problem.group_size;
  int32_t positions[2] = {kNoSlot, kNoSlot};
  Acc gates[2] = {};
  for (int k = 0; k < 2; ++k) {
    const bool wants = here && load(positions_T2 + 2 * t + k) == 0;
    const int expert = wants ? load(ids_T2 + 2 * t + k) : -1;
    const int32_t* const counts = k == 0 ? workspace.first_counts : workspace.second_counts;
    const int32_t slot = slot_of(used, E, expert, counts + blockIdx.x * static_cast<int64_t>(E), problem.capacity);
    if (!wants) continue;
    const Acc gate = load(gates_T2 + 2 * t + k);
    positions[k] = k == 1 && slot >= 0 && gate == Acc(0) ? kZeroGate : slot;
    gates[k] = positions[k] >= 0 ? gate : Acc(0);
  }
  if (here) {
    const Acc total = gates[0] + gates[1];
    for (int k = 0; k < 2; ++k) {
      if (!problem.normalize_before_capacity && positions[k] >= 0) gates[k] /= total;
      store(gates_T2 + 2 * t + k, gates[k]);
      store(positions_T2 + 2 * t + k, positions[k]);
    }
  }
  if (chunk == 0 && threadIdx.x == 0) {
    double sum = 0;
    for (int64_t i = 0; i < aux_parts; ++i) sum += load(workspace.aux_parts + group * aux_parts + i);
    store(aux_G + group, static_cast<Acc>(static_cast<double>(E) * sum));
  }
}

__global__ void __launch_bounds__(kThreads) count_first_choices(const GatingProblem problem, const int32_t* ids_T2,
                                                                const int32_t* positions_T2, int32_t* counts_GE) {
  const int64_t t = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (t >= problem.T || load(positions_T2 + 2 * t) == kNoSlot) return;
  const int expert = load(ids_T2 + 2 * t);
  if (expert >= 0 && expert < problem.E)
    atomicAdd(counts_GE + static_cast<uint32_t>(t) / static_cast<uint32_t>(problem.group_size) * problem.E + expert, 1);
}

// dL/dz_e = p_e (dL/dp_e - sum over j of p_j dL/dp_j), in the form of cpu/gating.cpp in which nothing cancels when the
// first probability is nearly 1.
template <class T, int per_lane>
__global__ void __launch_bounds__(kThreads, 1)  // as above
    differentiate(const GatingProblem problem, const Sum<T>* grad_gates_T2, const Sum<T>* grad_aux_G,
                  const T* logits_TE, const int32_t* ids_T2, const int32_t* positions_T2, const int32_t* counts_GE,
                  T* grad_TE) {
  using Acc = Sum<T>;
  const int E = static_cast<int>(problem.E), lane = threadIdx.x % kWarp;
  const int64_t t = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp;
  if (t >= problem.T) return;
  const int32_t position_first = load(positions_T2 + 2 * t), position_second = load(positions_T2 + 2 * t + 1);
  const int first = load(ids_T2 + 2 * t), second = load(ids_T2 + 2 * t + 1);
  Probabilities<Acc, per_lane> probabilities(E, lane);
  const bool finite = probabilities.softmax(logits_TE + t * E);
  const bool known = first >= 0 && first < E && second >= 0 && second < E;

  Acc grad_first = 0, grad_second = 0, mean = 0;  // of the gates, with respect to p
  const bool kept_first = position_first >= 0, kept_second = position_second >= 0;
  if (known && grad_gates_T2 && (problem.normalize_before_capacity || (kept_first && kept_second))) {
    const Acc tiny = problem.normalize_before_capacity ? static_cast<Acc>(kTiny) : Acc(0);
    const Acc g1 = kept_first ? load(grad_gates_T2 + 2 * t) : Acc(0);
    const Acc g2 = kept_second ? load(grad_gates_T2 + 2 * t + 1) : Acc(0);
    const Acc p1 = probabilities.of(first), p2 = second == first ? Acc(0) : probabilities.of(second);
    const Acc total = p1 + p2 + tiny, square = total * total;
    grad_first = (g1 * (p2 + tiny) - g2 * p2) / square;
    grad_second = second == first ? Acc(0) : (g2 * (p1 + tiny) - g1 * p1) / square;
    mean = tiny * (g1 * p1 + g2 * p2) / square;
  }
  const bool has_aux = known && grad_aux_G;
  const int64_t group = static_cast<uint32_t>(t) / static_cast<uint32_t>(problem.group_size);
  const int32_t* const counts_E = counts_GE + group * E;
  const double size = static_cast<double>(problem.group_size);
  const Acc scale = has_aux ? load(grad_aux_G + group) * static_cast<Acc>(E / (size * size)) : Acc(0);
  const auto count = [&](int e) { return static_cast<Acc>(load(counts_E + e) - load(counts_E + first)); };
  Acc mean_count = 0;
  if (has_aux) {
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      const int e = probabilities.expert(i);
      if (e < E) mean_count += probabilities.p[i] * count(e);
    }
    mean_count = warp_sum(mean_count);
  }
#pragma unroll
  for (int i = 0; i < per_lane; ++i) {
    const int e = probabilities.expert(i);
    if (e >= E) continue;
    Acc grad_p = has_aux ? scale * (count(e) - mean_count) : Acc(0);
    if (e == first) grad_p += grad_first;
    if (e == second) grad_p += grad_second;
    Acc grad = probabilities.p[i] * (grad_p - mean);
    if (!finite) grad = std::numeric_limits<Acc>::quiet_NaN();
    if (position_first == kNoSlot) grad = 0;  // only a masked token has no first choice
    store(grad_TE + t * E + e, narrow<T>(grad));
  }
}

}  // namespace

void top2_gating(const GatingProblem& problem, const void* logits, Type type, const bool* mask, const void* noise,
                 bool noise_is_double, const GatingWorkspace& workspace, void* gates, int32_t* ids, int32_t* positions,
                 void* aux, cudaStream_t stream) {
  const int64_t chunks = problem.chunks(), E = problem.E, aux_parts = ceil_div(E, kWarp);
  dispatch_type(type, [&]<class T>(T) {
    using Acc = Sum<T>;
    dispatch_per_lane(E, [&](auto per_lane) {
      launch(choose<T, per_lane>, dim3(chunks), dim3(kThreads), sizeof(ChooseStorage<Acc>), stream, problem,
             static_cast<const T*>(logits), mask, Noise{noise, noise_is_double}, static_cast<Acc*>(gates), ids,
             positions, workspace);
    });
    launch(scan_chunks, dim3(problem.G, aux_parts), dim3(kStrips * kWarp), sizeof(ScanStorage), stream, problem,
           workspace);
    launch(assign_slots<Acc>, dim3(chunks), dim3(kSlotThreads), kSlotWarps * E * sizeof(int32_t), stream, problem,
           workspace, aux_parts, ids, static_cast<Acc*>(gates), positions, static_cast<Acc*>(aux));
  });
}

void top2_gating_backward(const GatingProblem& problem, const void* grad_gates, const void* grad_aux,
                          const void* logits, Type type, const int32_t* ids, const int32_t* positions,
                          int32_t* first_counts, void* grad_logits, cudaStream_t stream) {
  if (grad_aux) {
    launch(count_first_choices, dim3(ceil_div(problem.T, kThreads)), dim3(kThreads), 0, stream, problem, ids, positions,
           first_counts);
  }
  dispatch_type(type, [&]<class T>(T) {
    using Acc = Sum<T>;
    dispatch_per_lane(problem.E, [&](auto per_lane) {
      launch(differentiate<T, per_lane>, dim3(ceil_div(problem.T, kWarps)), dim3(kThreads), 0, stream, problem,
             static_cast<const Acc*>(grad_gates), static_cast<const Acc*>(grad_aux), static_cast<const T*>(logits), ids,
             positions, first_counts, static_cast<T*>(grad_logits));
    });
  });
}

}  // namespace glam::cuda
