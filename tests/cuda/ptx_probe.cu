// Holds each function of kernels/ptx.cuh against plain C++: on the emulator and, compiled by nvcc, on a GPU. Since the
// emulator executes a stand-in for each PTX instruction, a run on a GPU is what shows that both mean the same.
//
//   nvcc -std=c++20 -arch=native -I csrc tests/cuda/ptx_probe.cu -o ptx_probe && ./ptx_probe
//
// Prints "ok", or the first difference and exits with 1.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/kernels/ptx.cuh"

namespace glam::cuda {
namespace {

constexpr int kSide = 16;

// --- Memory that both the host and the kernels read

#ifdef GLAM_EMULATE
template <class T>
T* allocate(size_t count) {
  return static_cast<T*>(std::aligned_alloc(128, (count * sizeof(T) + 127) / 128 * 128));
}
void finish() {}
#else
template <class T>
T* allocate(size_t count) {
  void* memory = nullptr;
  if (cudaMallocManaged(&memory, count * sizeof(T)) != cudaSuccess) {
    std::puts("no memory on a GPU");
    std::exit(1);
  }
  return static_cast<T*>(memory);
}
void finish() {
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) {
    std::puts(cudaGetErrorString(error));
    std::exit(1);
  }
}
#endif

// The kernels' conversions, for the host.
bf16 rounded(float x, bf16) { return __float2bfloat16_rn(x); }
f16 rounded(float x, f16) { return __float2half_rn(x); }
float exact(bf16 x) { return __bfloat162float(x); }
float exact(f16 x) { return __half2float(x); }

void expect(bool condition, const char* function, int lane, int i, double got, double expected) {
  if (condition) return;
  std::printf("%s: lane %d, element %d: got %g, expected %g\n", function, lane, i, got, expected);
  std::exit(1);
}

// --- cp.async: two groups, of which every second copy is a fill

struct CopyStorage {
  uint4 data[2][kWarp];
};

__global__ void copy_kernel(const uint4* source, uint4* target) {
  auto& shared = shared_storage<CopyStorage>();
  const int lane = threadIdx.x;
  for (int group = 0; group < 2; ++group) {
    ptx::cp_async_16(&shared.data[group][lane], source + group * kWarp + lane, (lane + group) % 2 == 0);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  __syncwarp();
  store(target + lane, load(&shared.data[0][kWarp - 1 - lane]));
  ptx::cp_async_wait<0>();
  __syncwarp();
  store(target + kWarp + lane, load(&shared.data[1][kWarp - 1 - lane]));
}

void probe_copies() {
  auto* source = allocate<uint4>(2 * kWarp);
  auto* target = allocate<uint4>(2 * kWarp);
  for (unsigned i = 0; i < 2 * kWarp; ++i) source[i] = {i + 1, i + 1001, i + 2001, i + 3001};
  std::memset(static_cast<void*>(target), 0xff, 2 * kWarp * sizeof(uint4));
  launch(copy_kernel, 1, kWarp, sizeof(CopyStorage), nullptr, source, target);
  finish();
  for (int i = 0; i < 2 * kWarp; ++i) {
    const int group = i / kWarp, lane = kWarp - 1 - i % kWarp;
    const uint4 copied = source[group * kWarp + lane], expected = (lane + group) % 2 == 0 ? copied : uint4{};
    const bool same = std::memcmp(&target[i], &expected, sizeof(uint4)) == 0;
    expect(same, "cp_async_16", lane, group, target[i].x, expected.x);
  }
}

// --- ldmatrix: lane l points at row l % 16, column l / 16 * 8 of a 16 x 16 matrix

struct MatrixStorage {
  alignas(16) uint16_t matrix[kSide][kSide];
};

struct Loads {
  unsigned x2[2], x2_trans[2], x4[4], x4_trans[4];
};

__global__ void load_kernel(const uint16_t* matrix, Loads* loads) {
  auto& shared = shared_storage<MatrixStorage>();
  const int lane = threadIdx.x;
  for (int i = lane; i < kSide * kSide; i += kWarp) shared.matrix[i / kSide][i % kSide] = matrix[i];
  __syncwarp();
  const uint16_t* row = &shared.matrix[lane % 16][lane / 16 * 8];
  Loads own;
  ptx::ldmatrix_x2(own.x2, row);
  ptx::ldmatrix_x2_trans(own.x2_trans, row);
  ptx::ldmatrix_x4(own.x4, row);
  ptx::ldmatrix_x4_trans(own.x4_trans, row);
  loads[lane] = own;
}

void probe_matrix_loads() {
  auto* matrix = allocate<uint16_t>(kSide * kSide);
  auto* loads = allocate<Loads>(kWarp);
  for (int i = 0; i < kSide * kSide; ++i) matrix[i] = static_cast<uint16_t>(i * 31 + 7);
  launch(load_kernel, 1, kWarp, sizeof(MatrixStorage), nullptr, matrix, loads);
  finish();
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      // Tile i has its upper left corner at row i % 2 * 8, column i / 2 * 8.
      const auto element = [&](int r, int c) { return matrix[(i % 2 * 8 + r) * kSide + i / 2 * 8 + c]; };
      const int g = lane / 4, t = lane % 4 * 2;
      const unsigned straight = element(g, t) | unsigned(element(g, t + 1)) << 16;
      const unsigned transposed = element(t, g) | unsigned(element(t + 1, g)) << 16;
      const Loads& got = loads[lane];
      expect(got.x4[i] == straight, "ldmatrix_x4", lane, i, got.x4[i], straight);
      expect(got.x4_trans[i] == transposed, "ldmatrix_x4_trans", lane, i, got.x4_trans[i], transposed);
      if (i >= 2) continue;
      expect(got.x2[i] == straight, "ldmatrix_x2", lane, i, got.x2[i], straight);
      expect(got.x2_trans[i] == transposed, "ldmatrix_x2_trans", lane, i, got.x2_trans[i], transposed);
    }
  }
}

// --- mma: small integers, so that every order of additions gives the same

template <class T>
__global__ void product_kernel(const T* a, const T* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
  const auto pair = [](T low, T high) {
    unsigned bits[2] = {};
    memcpy(&bits[0], &low, sizeof(T));
    memcpy(&bits[1], &high, sizeof(T));
    return bits[0] | bits[1] << 16;
  };
  unsigned a_fragment[4], b_fragment[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    const T* first = a + (g + i % 2 * 8) * kSide + t + i / 2 * 8;
    a_fragment[i] = pair(first[0], first[1]);
    sums[i] = c[(g + i / 2 * 8) * 8 + t + i % 2];
  }
  for (int i = 0; i < 2; ++i) b_fragment[i] = pair(b[(t + i * 8) * 8 + g], b[(t + i * 8 + 1) * 8 + g]);
  ptx::mma_m16n8k16<T>(sums, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t + i % 2] = sums[i];
}

template <class T>
void probe_product(const char* name) {
  auto* a = allocate<T>(kSide * kSide);
  auto* b = allocate<T>(kSide * 8);
  auto* c = allocate<float>(kSide * 8);
  for (int i = 0; i < kSide * kSide; ++i) a[i] = rounded(static_cast<float>(i * 7 % 23 - 11), T());
  for (int i = 0; i < kSide * 8; ++i) b[i] = rounded(static_cast<float>(i * 5 % 19 - 9), T());
  for (int i = 0; i < kSide * 8; ++i) c[i] = static_cast<float>(i);
  launch(product_kernel<T>, 1, kWarp, 0, nullptr, a, b, c);
  finish();
  for (int i = 0; i < kSide; ++i) {
    for (int j = 0; j < 8; ++j) {
      float expected = static_cast<float>(i * 8 + j);
      for (int k = 0; k < kSide; ++k) expected += exact(a[i * kSide + k]) * exact(b[k * 8 + j]);
      expect(c[i * 8 + j] == expected, name, i, j, c[i * 8 + j], expected);
    }
  }
}

}  // namespace
}  // namespace glam::cuda

int main() {
  using namespace glam::cuda;
  probe_copies();
  probe_matrix_loads();
  probe_product<bf16>("mma_m16n8k16<bf16>");
  probe_product<f16>("mma_m16n8k16<f16>");
  std::puts("ok");
}
