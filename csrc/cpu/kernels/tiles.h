// The tile registers of AMX (Intel SDM volume 1, chapter 18, and TDPBF16PS in volume 2): eight, of 16 rows of 64 bytes
// each. Every function is one instruction. GLAM_EMULATE_AMX replaces them by what the manual's pseudo code says, with
// which tests run the same product core on any CPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AMX_BF16__) || defined(GLAM_EMULATE_AMX)
#define GLAM_AMX 1
#else
#define GLAM_AMX 0
#endif

#if GLAM_AMX
namespace glam::cpu::GLAM_ISA::tiles {

inline constexpr int kRows = 16;
inline constexpr int kColumns = 16;    // float sums, or pairs of bfloat16
inline constexpr int kFirstRight = 6;  // registers 6 and 7 hold right sides

#if defined(GLAM_EMULATE_AMX)

inline thread_local uint32_t registers[8][kRows][kColumns];
inline thread_local int left_rows = 0;  // 0: not configured
template <int kTile>
inline int rows_of() {
  if (left_rows == 0) __builtin_trap();
  return kTile < kFirstRight ? left_rows : kRows;
}

inline float half_of(uint32_t pair, int index) {
  const uint32_t bits = index == 0 ? pair << 16 : pair & 0xffff0000u;
  return __builtin_bit_cast(float, bits);
}

inline void configure(int rows = kRows) { left_rows = rows; }
inline void release() { left_rows = 0; }
template <int kTile>
inline void zero() {
  std::memset(registers[kTile], 0, rows_of<kTile>() * sizeof(registers[kTile][0]));
}
template <int kTile>
inline void load(const void* data, int64_t stride) {
  for (int i = 0; i < rows_of<kTile>(); ++i) {
    std::memcpy(registers[kTile][i], static_cast<const char*>(data) + i * stride, sizeof(registers[kTile][i]));
  }
}
template <int kTile>
inline void store(void* data, int64_t stride) {
  for (int i = 0; i < rows_of<kTile>(); ++i) {
    std::memcpy(static_cast<char*>(data) + i * stride, registers[kTile][i], sizeof(registers[kTile][i]));
  }
}
template <int kSum, int kLeft, int kRight>
inline void multiply() {
  static_assert(kSum < kFirstRight && kLeft < kFirstRight && kRight >= kFirstRight);
  for (int m = 0; m < rows_of<kSum>(); ++m) {
    float halves[2][kColumns] = {};
    for (int k = 0; k < kColumns; ++k) {
      for (int n = 0; n < kColumns; ++n) {
        for (int i = 0; i < 2; ++i) {
          const float left = half_of(registers[kLeft][m][k], i), right = half_of(registers[kRight][k][n], i);
          halves[i][n] = __builtin_fmaf(left, right, halves[i][n]);
        }
      }
    }
    for (int n = 0; n < kColumns; ++n) {
      const float sum = __builtin_bit_cast(float, registers[kSum][m][n]);
      registers[kSum][m][n] = __builtin_bit_cast(uint32_t, sum + (halves[0][n] + halves[1][n]));
    }
  }
}

#else

// The calling thread's registers until release(): sums and left sides of so many rows.
inline void configure(int rows = kRows) {
  struct alignas(64) Configuration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } configuration;
  static_assert(sizeof(Configuration) == 64);
  for (int tile = 0; tile < 8; ++tile) {
    configuration.rows[tile] = static_cast<uint8_t>(tile < kFirstRight ? rows : kRows);
  }
  asm volatile("ldtilecfg %0" : : "m"(configuration) : "memory");
}
inline void release() { asm volatile("tilerelease" : : : "memory"); }
template <int kTile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Rows of 64 bytes, stride bytes apart.
template <int kTile>
inline void load(const void* data, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(data), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store(void* data, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(data), "r"(stride), "i"(kTile) : "memory");
}
// sum[m][n] += sum over 16 pairs k of left[m][k] . right[k][n]: even and odd halves are summed on their own, then
// together. Round to nearest even; subnormal numbers are zeros.
template <int kSum, int kLeft, int kRight>
inline void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}

#endif

}  // namespace glam::cpu::GLAM_ISA::tiles
#endif
