// See misuse_kernels.h.
#include "misuse_kernels.h"

#include <map>

#include "cuda/emulator/memory.h"
#include "cuda/kernels/ptx.cuh"

namespace planted {

using namespace glam::cuda;

namespace {

constexpr int kThreads = 64;

struct Storage {
  float values[kThreads];
};

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < kWarp) {
    __syncthreads();  // place: divergent_barrier
  } else {
    __syncthreads();  // place: divergent_barrier
  }
}

__global__ void divergent_warp_kernel(int* result) {
  if (threadIdx.x % kWarp < 16) {
    *result = __shfl_sync(kAllLanes, 1, 0);  // place: divergent_warp
  } else {
    *result = __shfl_sync(kAllLanes, 2, 0);  // place: divergent_warp
  }
}

__global__ void missing_lane_kernel(int* result) {
  int value = 1;
  if (threadIdx.x % kWarp != 7) value = __shfl_xor_sync(kAllLanes, value, 1);  // place: missing_lane
  __syncthreads();                                                             // place: missing_lane
  *result = value;
}

__global__ void outside_own_mask_kernel() {
  __syncwarp(0x7fffffff);  // place: outside_own_mask
}

__global__ void shuffle_from_outside_kernel(int* result) {
  if (threadIdx.x % kWarp < 16) *result = __shfl_sync(0xffff, 1, 20);  // place: shuffle_from_outside
}

__global__ void early_exit_kernel() {
  __syncthreads();  // place: early_exit
  if (threadIdx.x == 40) return;
  __syncthreads();  // place: early_exit
}

__global__ void early_exit_of_lane_kernel(int* result) {
  if (threadIdx.x == 3) return;
  *result = __any_sync(kAllLanes, 1);  // place: early_exit_of_lane
}

// Three lanes, each waiting for the next.
__global__ void deadlock_kernel() {
  if (threadIdx.x == 0) __syncwarp(0b011);  // place: deadlock
  if (threadIdx.x == 1) __syncwarp(0b110);  // place: deadlock
  if (threadIdx.x == 2) __syncwarp(0b101);  // place: deadlock
}

__global__ void misaligned_vector_kernel(const float* x, float* y) {
  store(y, load(reinterpret_cast<const Vector<float>*>(x + 1))[0]);  // place: misaligned_vector
}

__global__ void misaligned_copy_kernel(const float* x) {
  auto& shared = shared_storage<Storage>();
  ptx::cp_async_16(shared.values, x + 2);  // place: misaligned_copy
}

__global__ void copy_to_global_kernel(const float* x, float* y) {
  ptx::cp_async_16(y, x);  // place: copy_to_global
}

__global__ void matrix_from_global_kernel(const float* x) {
  unsigned d[4];
  ptx::ldmatrix_x4(d, x);  // place: matrix_from_global
}

__global__ void out_of_bounds_read_kernel(const float* x, float* y, int count) {
  if (threadIdx.x == 0) store(y, load(x + count));  // place: out_of_bounds_read
}

__global__ void out_of_bounds_write_kernel(float* y) {
  store(y - 1, 1.0f);  // place: out_of_bounds_write
}

__global__ void out_of_bounds_atomic_kernel(float* y) {
  atomicAdd(y - 1, 1.0f);  // place: out_of_bounds_atomic
}

__global__ void shared_overrun_kernel() {
  auto& shared = shared_storage<Storage>();
  store(shared.values + 1 + threadIdx.x, 1.0f);  // place: shared_overrun
}

__global__ void large_struct_kernel() {
  shared_storage<Storage>().values[threadIdx.x] = 1;  // place: large_struct
}

__global__ void empty_kernel() {}

__global__ void nested_launch_kernel() {
  launch(empty_kernel, 1, 1, 0, nullptr);  // place: nested_launch
}

__global__ void trap_kernel() {
  if (threadIdx.x == 5) __trap();  // place: trap
}

int depth_of(volatile int* levels) {
  volatile char frame[4096];
  frame[0] = 1;
  return *levels == 0 ? frame[0] : frame[0] + depth_of(levels);
}

__global__ void stack_overflow_kernel(volatile int* levels) { *levels = depth_of(levels); }

// Two arrays with memory of ours around them.
struct Arrays {
  alignas(16) float x[16] = {};
  alignas(16) float between[4] = {};
  alignas(16) float y[16] = {};
  int result = 0;
};

using Run = void (*)(Arrays&);

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), Arguments... arguments) {
  launch(kernel, 1, kThreads, sizeof(Storage), nullptr, arguments...);
}

const std::map<std::string, Run>& cases() {
  static const std::map<std::string, Run> cases = {
      {"divergent_barrier", [](Arrays&) { run(divergent_barrier_kernel); }},
      {"divergent_warp", [](Arrays& a) { run(divergent_warp_kernel, &a.result); }},
      {"missing_lane", [](Arrays& a) { run(missing_lane_kernel, &a.result); }},
      {"outside_own_mask", [](Arrays&) { run(outside_own_mask_kernel); }},
      {"shuffle_from_outside", [](Arrays& a) { run(shuffle_from_outside_kernel, &a.result); }},
      {"early_exit", [](Arrays&) { run(early_exit_kernel); }},
      {"early_exit_of_lane", [](Arrays& a) { run(early_exit_of_lane_kernel, &a.result); }},
      {"deadlock", [](Arrays&) { run(deadlock_kernel); }},
      {"misaligned_vector", [](Arrays& a) { run(misaligned_vector_kernel, a.x, a.y); }},
      {"misaligned_copy", [](Arrays& a) { run(misaligned_copy_kernel, a.x); }},
      {"copy_to_global", [](Arrays& a) { run(copy_to_global_kernel, a.x, a.y); }},
      {"matrix_from_global", [](Arrays& a) { run(matrix_from_global_kernel, a.x); }},
      {"out_of_bounds_read", [](Arrays& a) { run(out_of_bounds_read_kernel, a.x, a.y, 16); }},
      {"out_of_bounds_write", [](Arrays& a) { run(out_of_bounds_write_kernel, a.y); }},
      {"out_of_bounds_atomic", [](Arrays& a) { run(out_of_bounds_atomic_kernel, a.y); }},
      {"shared_overrun", [](Arrays&) { run(shared_overrun_kernel); }},
      {"large_struct", [](Arrays&) { launch(large_struct_kernel, 1, kThreads, 16, nullptr); }},
      {"nested_launch", [](Arrays&) { run(nested_launch_kernel); }},
      {"trap", [](Arrays&) { run(trap_kernel); }},
      {"large_block", [](Arrays&) { launch(empty_kernel, 1, 1025, 0, nullptr); }},             // place: large_block
      {"large_grid", [](Arrays&) { launch(empty_kernel, {1, 65536}, 32, 0, nullptr); }},       // place: large_grid
      {"much_shared", [](Arrays&) { launch(empty_kernel, 1, 32, 163 * 1024 + 1, nullptr); }},  // place: much_shared
  };
  return cases;
}

}  // namespace

std::vector<std::string> misuse_names() {
  std::vector<std::string> names;
  for (const auto& [name, run] : cases()) names.push_back(name);
  return names;
}

void run_misuse(const std::string& name) {
  Arrays arrays;
  if (name.starts_with("out_of_bounds")) {
    emulator::register_array(arrays.x, sizeof(arrays.x), "x");
    emulator::register_array(arrays.y, sizeof(arrays.y), "y");
  }
  struct Forget {
    ~Forget() { emulator::forget_arrays(); }
  };
  const Forget forget;
  cases().at(name)(arrays);
}

void run_stack_overflow() {
  int levels = 1;
  launch(stack_overflow_kernel, 1, 1, 0, nullptr, &levels);
}

}  // namespace planted
