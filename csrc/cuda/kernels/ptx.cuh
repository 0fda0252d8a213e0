// All PTX of the project: asynchronous copies, matrix loads from shared memory, tensor-core products. Each instruction
// stands beside what the emulator does in its place (csrc/cuda/emulator); tests/cuda/ptx_probe.cu holds both against
// plain C++.
//
// Fragments: which elements of a matrix a lane holds, with g = lane / 4 and t = lane % 4. A register holds two 16-bit
// elements, the lower column (of A) or row (of B) in its lower half. From the PTX ISA manual, "Warp Level Matrix
// Instructions", sections "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix":
//
//   A [16 x 16], row by row        a[0]  row g      columns 2t, 2t + 1      a[2]  row g      columns 2t + 8, 2t + 9
//                                  a[1]  row g + 8  columns 2t, 2t + 1      a[3]  row g + 8  columns 2t + 8, 2t + 9
//   B [16 x 8], column by column   b[0]  rows 2t, 2t + 1      column g      b[1]  rows 2t + 8, 2t + 9  column g
//   C [16 x 8], fp32               c[0], c[1]  row g      columns 2t, 2t + 1
//                                  c[2], c[3]  row g + 8  columns 2t, 2t + 1
//   ldmatrix, 8 x 8 tile i, whose row r starts at the address of lane 8i + r
//                                  d[i]  row g, columns 2t, 2t + 1; with .trans: rows 2t, 2t + 1 of column g
//
// So ldmatrix_x4 loads A from a row-major [16 x 16] if lane l points at row l % 16, column l / 16 * 8. From a row-major
// B [16 x 16], ldmatrix_x4_trans with the same addresses gives b of two products, {d[0], d[1]} and {d[2], d[3]}.
#pragma once

#include "cuda/kernels/device.cuh"

#ifdef GLAM_EMULATE
#include <bit>
#include <cstring>
#endif

namespace glam::cuda::ptx {

// --- Asynchronous copies from global to shared memory ("cp.async", "cp.async.commit_group", "cp.async.wait_group")
//
// A thread's copies since its last commit are a group. After a wait the thread sees the data of its own finished
// groups; other threads see them after a barrier that follows.

#ifdef GLAM_EMULATE
inline void copy_16_bytes(void* target, const void* source, bool valid) {
  if (valid) {
    *static_cast<uint4*>(target) = *static_cast<const uint4*>(source);
  } else {
    *static_cast<uint4*>(target) = {};
  }
}
#endif

// 16 bytes; zeros, without looking at the source, where not `valid`. Both addresses are multiples of 16.
#ifdef GLAM_EMULATE
inline void cp_async_16(void* target, const void* source, bool valid = true, Here here = Here::current()) {
  emulator::check_shared(emulator::Access::write, target, 16, 16, here);
  if (valid) emulator::check_access(emulator::Access::read, source, 16, 16, here);
  emulator::start_copy(copy_16_bytes, target, source, valid);
}
#else
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void cp_async_16(void* target, const void* source, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
#endif

// Closes the group.
#ifdef GLAM_EMULATE
inline void cp_async_commit() { emulator::commit_copies(); }
#else
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
#endif

// Until at most kPending of the youngest groups are on their way.
#ifdef GLAM_EMULATE
template <int kPending>
void cp_async_wait() {
  emulator::wait_for_copies(kPending);
}
#else
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#endif

// --- Matrix loads from shared memory ("ldmatrix")
//
// kTiles tiles of 8 x 8 16-bit elements. Lane l of the first 8 * kTiles points at 16 bytes: row l % 8 of tile l / 8.
// The other lanes' pointers are not looked at. The whole warp takes part.

#ifdef GLAM_EMULATE
template <int kTiles, bool kTransposed>
void ldmatrix(unsigned (&d)[kTiles], const void* row, Here here) {
  const unsigned lane = emulator::current->lane;
  if (lane < 8 * kTiles) emulator::check_shared(emulator::Access::read, row, 16, 16, here);
  const emulator::Slot* rows =
      emulator::exchange_values(kAllLanes, row, kTransposed ? "ldmatrix.trans" : "ldmatrix", here);
  const auto element = [&](unsigned tile, unsigned r, unsigned c) -> unsigned {
    return emulator::value_of<const uint16_t*>(rows[tile * 8 + r])[c];
  };
  const unsigned g = lane / 4, t = lane % 4 * 2;
  for (unsigned i = 0; i < kTiles; ++i) {
    d[i] = kTransposed ? element(i, t, g) | element(i, t + 1, g) << 16 : element(i, g, t) | element(i, g, t + 1) << 16;
  }
}

inline void ldmatrix_x2(unsigned (&d)[2], const void* row, Here here = Here::current()) {
  ldmatrix<2, false>(d, row, here);
}
inline void ldmatrix_x2_trans(unsigned (&d)[2], const void* row, Here here = Here::current()) {
  ldmatrix<2, true>(d, row, here);
}
inline void ldmatrix_x4(unsigned (&d)[4], const void* row, Here here = Here::current()) {
  ldmatrix<4, false>(d, row, here);
}
inline void ldmatrix_x4_trans(unsigned (&d)[4], const void* row, Here here = Here::current()) {
  ldmatrix<4, true>(d, row, here);
}
#else
__device__ __forceinline__ void ldmatrix_x2(unsigned (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(unsigned (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
#endif

// --- Tensor-core products ("mma.sync.aligned.m16n8k16")
//
// C += A B with A and B of T = bf16 or f16 and C in fp32, by the whole warp. The order of the sixteen additions is not
// documented: a GPU and the emulator differ within rounding.

#ifdef GLAM_EMULATE
template <class T>
void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], Here here = Here::current()) {
  struct Registers {
    unsigned a[4], b[2];
  };
  const Registers own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const emulator::Slot* lanes = emulator::exchange_values(kAllLanes, own, "mma.m16n8k16", here);
  const auto half_of = [](unsigned pair, int half) {
    return wide(std::bit_cast<T>(static_cast<uint16_t>(pair >> 16 * half)));
  };
  const unsigned g = emulator::current->lane / 4, t = emulator::current->lane % 4;

  // This lane's rows g and g + 8 of A and columns 2t and 2t + 1 of B, each from the four lanes that hold it.
  float a_rows[2][16], b_columns[2][16];
  for (unsigned source = 0; source < 4; ++source) {
    const auto from = emulator::value_of<Registers>(lanes[g * 4 + source]);
    for (int i = 0; i < 8; ++i) a_rows[i / 2 % 2][source * 2 + i % 2 + i / 4 * 8] = half_of(from.a[i / 2], i % 2);
  }
  for (unsigned source = 0; source < 8; ++source) {
    const unsigned column = source / 4, k = source % 4 * 2;
    const auto from = emulator::value_of<Registers>(lanes[(t * 2 + column) * 4 + source % 4]);
    for (int i = 0; i < 4; ++i) b_columns[column][k + i % 2 + i / 2 * 8] = half_of(from.b[i / 2], i % 2);
  }
  for (int i = 0; i < 4; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += a_rows[i / 2][k] * b_columns[i % 2][k];
    c[i] += sum;
  }
}
#else
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}
#endif

}  // namespace glam::cuda::ptx
