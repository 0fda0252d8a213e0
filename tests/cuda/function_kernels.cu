// See function_kernels.h.
#include "function_kernels.h"

#include <vector>

#include "cuda/emulator/config.h"
#include "cuda/kernels/device.cuh"

namespace planted {

using namespace glam::cuda;

namespace {

// Each kernel adds to *errors for each comparison that fails.
using Errors = unsigned;

__device__ void expect(Errors* errors, bool condition) {
  if (!condition) atomicAdd(errors, 1u);
}

__global__ void indices_kernel(Errors* errors, int* visits) {
  const unsigned x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  const unsigned z = blockIdx.z * blockDim.z + threadIdx.z, width = gridDim.x * blockDim.x;
  const unsigned height = gridDim.y * blockDim.y;
  atomicAdd(visits + (z * height + y) * width + x, 1);
  expect(errors, blockDim.x == 5 && blockDim.y == 3 && blockDim.z == 2 && warpSize == 32);
}

template <class T>
__global__ void shuffles_kernel(Errors* errors) {
  const int lane = threadIdx.x % kWarp;
  const T value = static_cast<T>(lane);
  expect(errors, __shfl_sync(kAllLanes, value, 5) == T(5));
  expect(errors, __shfl_sync(kAllLanes, value, 37) == T(5));
  expect(errors, __shfl_sync(kAllLanes, value, 3, 8) == T(lane / 8 * 8 + 3));
  expect(errors, __shfl_xor_sync(kAllLanes, value, 9) == T(lane ^ 9));
  expect(errors, __shfl_xor_sync(kAllLanes, value, 9, 8) == T((lane ^ 9) / 8 > lane / 8 ? lane : lane ^ 9));
  expect(errors, __shfl_down_sync(kAllLanes, value, 3) == T(lane + 3 < 32 ? lane + 3 : lane));
  expect(errors, __shfl_down_sync(kAllLanes, value, 3, 16) == T(lane % 16 + 3 < 16 ? lane + 3 : lane));
  expect(errors, __shfl_up_sync(kAllLanes, value, 3) == T(lane >= 3 ? lane - 3 : lane));
  expect(errors, __shfl_up_sync(kAllLanes, value, 3, 16) == T(lane % 16 >= 3 ? lane - 3 : lane));
  expect(errors, warp_sum(value) == T(496) && warp_max(value) == T(31));
}

__global__ void votes_kernel(Errors* errors) {
  const int thread = threadIdx.x, lane = thread % kWarp;
  expect(errors, __ballot_sync(kAllLanes, lane % 2) == 0xaaaaaaaau);
  expect(errors, __any_sync(kAllLanes, lane == 9) && !__any_sync(kAllLanes, 0));
  expect(errors, __all_sync(kAllLanes, 7) && !__all_sync(kAllLanes, lane != 9));
  expect(errors, __match_any_sync(kAllLanes, lane % 4) == 0x11111111u << lane % 4);
  int all = 0;
  expect(errors, __match_all_sync(kAllLanes, 5.0f, &all) == kAllLanes && all);
  expect(errors, __match_all_sync(kAllLanes, lane, &all) == 0 && !all);
  expect(errors, __reduce_add_sync(kAllLanes, lane - 16) == -16);
  expect(errors, __reduce_min_sync(kAllLanes, lane - 16) == -16 && __reduce_max_sync(kAllLanes, lane) == 31);
  expect(errors,
         __reduce_or_sync(kAllLanes, 1u << lane) == kAllLanes && __reduce_and_sync(kAllLanes, ~0u << lane) == 1u << 31);
  expect(errors, __reduce_xor_sync(kAllLanes, 1u << lane % 31) == 0x7ffffffeu);
  if (lane < 8) expect(errors, __reduce_add_sync(0xff, lane) == 28);
  const int size = blockDim.x;
  expect(errors, __syncthreads_count(thread % 3 == 0) == (size + 2) / 3);
  expect(errors, __syncthreads_and(1) && !__syncthreads_and(thread != 40));
  expect(errors, __syncthreads_or(thread == 40) && !__syncthreads_or(0));
}

// Groups of lanes that change with every step meet in masks of their own.
__global__ void masks_kernel(Errors* errors) {
  const int lane = threadIdx.x % kWarp;
  for (int step = 0; step < 40; ++step) {
    const int key = (lane * 7 + lane * lane * step) % (step % 7 + 2);
    const unsigned peers = __match_any_sync(kAllLanes, key);
    for (int repeat = 0; repeat <= key; ++repeat) {
      const int leader = __ffs(static_cast<int>(peers)) - 1;
      expect(errors, __shfl_sync(peers, key * 100 + repeat, leader) == key * 100 + repeat);
      expect(errors, __ballot_sync(peers, 1) == peers);
    }
  }
}

struct Sums {
  int integer;
  unsigned bits, counter;
  float single;
  double twofold;
  long long smallest;
  unsigned long long largest;
};

__global__ void atomics_kernel(Sums* sums, Errors* errors) {
  const int thread = threadIdx.x;
  atomicAdd(&sums->integer, thread);
  atomicSub(&sums->integer, 1);
  atomicOr(&sums->bits, 1u << thread % 32);
  atomicAnd(&sums->bits, 0x7fffffffu);
  atomicInc(&sums->counter, 9);
  atomicAdd(&sums->single, 0.5f);
  atomicAdd(&sums->twofold, 0.25);
  atomicMin(&sums->smallest, -static_cast<long long>(thread));
  atomicMax(&sums->largest, static_cast<unsigned long long>(thread));
  if (thread == 0) {
    int word = 3;
    expect(errors, atomicCAS(&word, 3, 8) == 3 && word == 8 && atomicCAS(&word, 3, 9) == 8 && word == 8);
    expect(errors, atomicExch(&word, 1) == 8 && atomicXor(&word, 3) == 1 && word == 2);
    unsigned count = 0;
    expect(errors, atomicDec(&count, 5) == 0 && count == 5);
  }
}

__global__ void scalars_kernel(Errors* errors) {
  expect(errors, min(3, 4L) == 3 && max(2u, 5u) == 5 && max(NAN, 1.0f) == 1.0f && min(1.0f, NAN) == 1.0f);
  expect(errors, rsqrtf(4.0f) == 0.5f && __saturatef(3.0f) == 1.0f && __saturatef(NAN) == 0.0f);
  expect(errors, fabsf(__expf(1.0f) - 2.7182817f) < 1e-6f && __fdividef(3.0f, 2.0f) == 1.5f);
  expect(errors, __float_as_uint(1.0f) == 0x3f800000u && __int_as_float(0x40000000) == 2.0f);
  expect(errors, __clz(1) == 31 && __ffs(8) == 4 && __popc(0xf0u) == 4 && __brev(1u) == 1u << 31);
  expect(errors,
         __umulhi(1u << 31, 4u) == 2 && __funnelshift_l(1u << 31, 0, 1) == 1 && __funnelshift_r(0, 1, 1) == 1u << 31);
  expect(errors, __dp4a(0x01ff0203, 0x02030405, 10) == 10 + 2 - 3 + 8 + 15);
  expect(errors, wide(narrow<bf16>(1.0f + 1.0f / 256)) == 1.0f && wide(narrow<f16>(65536.0f)) == INFINITY);
  expect(errors, isfinite(1.0f) && isnan(wide(narrow<bf16>(NAN))));
}

struct Unwritten {
  float single;
  double twofold;
  bf16 brain;
  f16 half;
};

// Shared memory starts as NaN in every type, for each block.
__global__ void poison_kernel(Errors* errors) {
  auto& shared = shared_storage<Unwritten>();
  expect(errors,
         isnan(shared.single) && isnan(shared.twofold) && isnan(wide(shared.brain)) && isnan(wide(shared.half)));
  __syncthreads();
  shared.single = 1;
}

template <class... Parameters, class... Arguments>
bool runs_without_errors(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
  Errors errors = 0;
  launch(kernel, grid, block, sizeof(Unwritten), nullptr, arguments..., &errors);
  return errors == 0;
}

bool indices_are_right() {
  std::vector<int> visits(5 * 3 * 2 * 4 * 3 * 2);
  Errors errors = 0;
  launch(indices_kernel, dim3(4, 3, 2), dim3(5, 3, 2), 0, nullptr, &errors, visits.data());
  for (const int count : visits) errors += count != 1;
  return errors == 0;
}

bool atomics_are_right() {
  Sums sums = {};
  if (!runs_without_errors(atomics_kernel, 1, 100, &sums)) return false;
  return sums.integer == 4850 && sums.bits == 0x7fffffffu && sums.counter == 0 && sums.single == 50 &&
         sums.twofold == 25 && sums.smallest == -99 && sums.largest == 99;
}

// --- Counted accesses

constexpr int kSide = 32;

struct CountedStorage {
  float square[kSide][kSide];
  float padded[kSide][kSide + 1];
};

__global__ void counted_kernel(const float* x, float* y, Errors* total) {
  auto& shared = shared_storage<CountedStorage>();
  const int lane = threadIdx.x;
  const float together = load(x + lane);                                        // count: together
  const float apart = load(x + lane * 8);                                       // count: apart
  const auto vector = load(reinterpret_cast<const Vector<float>*>(x) + lane);   // count: vector
  const float same = load(x);                                                   // count: same
  for (int i = 0; i < 2; ++i) store(&shared.square[lane][i], together + same);  // count: conflicts
  for (int i = 0; i < 2; ++i) store(&shared.padded[lane][i], apart);            // count: padded
  if (lane < 16) store(y + lane, vector[0]);                                    // count: half
  atomicAdd(total, 1u);                                                         // count: atomic
}

}  // namespace

std::vector<Check> function_checks() {
  return {
      {"indices", indices_are_right},
      {"shuffles",
       [] {
         return runs_without_errors(shuffles_kernel<int>, 1, 64) &&
                runs_without_errors(shuffles_kernel<float>, 1, 32) &&
                runs_without_errors(shuffles_kernel<double>, 1, 32) &&
                runs_without_errors(shuffles_kernel<unsigned long long>, 1, 32);
       }},
      {"votes", [] { return runs_without_errors(votes_kernel, 2, 96); }},
      {"masks", [] { return runs_without_errors(masks_kernel, 1, 64); }},
      {"atomics", atomics_are_right},
      {"scalars", [] { return runs_without_errors(scalars_kernel, 1, 1); }},
      {"poison", [] { return runs_without_errors(poison_kernel, 3, 1); }},
  };
}

void run_counted() {
  alignas(32) float x[256] = {}, y[16];
  Errors total = 0;
  glam_emulator_start_counting();
  for (int i = 0; i < 2; ++i) launch(counted_kernel, 3, 32, sizeof(CountedStorage), nullptr, x, y, &total);
  launch(scalars_kernel, dim3(1, 2), 1, 0, nullptr, &total);
  glam_emulator_stop_counting();
  launch(counted_kernel, 1, 32, sizeof(CountedStorage), nullptr, x, y, &total);
}

}  // namespace planted
