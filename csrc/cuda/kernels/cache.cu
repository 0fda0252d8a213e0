// Blocks take kWidth words of every row at a time. Beams that stay are neither read nor written; a beam that many rows
// take is read from memory once and for the others from the cache.

#include "cuda/kernels/cache.h"

#include "cuda/kernels/rows.cuh"

namespace glam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 8;  // words of a row that a block moves at once: a cache line of the widest
constexpr int64_t kSharedBytes = 48 * 1024;
constexpr int64_t kBuffers = 64, kWorkspaceBytes = int64_t{64} << 20;  // at most, unless a single buffer is larger

// A block's buffer of the widest words, and how many of them a workspace holds.
constexpr int64_t widest_buffer(int64_t B) { return B * kWidth * 16; }
constexpr int64_t num_buffers(int64_t B) { return clamp(kWorkspaceBytes / widest_buffer(B), 1, kBuffers); }

// The widest word of which rows consist.
enum class Word { bytes16, bytes4, bytes1 };

struct Plan {
  Word word;
  int64_t words_per_row, buffer_bytes, blocks;
  bool in_shared;

  Plan(const void* cache, int64_t B, int64_t row_bytes) {
    const auto fits = [&](int64_t bytes) {
      return row_bytes % bytes == 0 && reinterpret_cast<uintptr_t>(cache) % static_cast<uintptr_t>(bytes) == 0;
    };
    word = fits(16) ? Word::bytes16 : fits(4) ? Word::bytes4 : Word::bytes1;
    const int64_t word_bytes = word == Word::bytes16 ? 16 : word == Word::bytes4 ? 4 : 1;
    words_per_row = row_bytes / word_bytes;
    buffer_bytes = B * kWidth * word_bytes;
    in_shared = buffer_bytes <= kSharedBytes;
    blocks = ceil_div(words_per_row, kWidth);
    if (in_shared) return;
    blocks = blocks < num_buffers(B) ? blocks : num_buffers(B);
  }
};

// Columns [kWidth * block, + kWidth), then those gridDim further on. buffer [B, kWidth]; null: in shared memory.
template <class W>
__global__ void __launch_bounds__(kThreads)
    reorder_kernel(W* cache, const int64_t* beams_B, int64_t B, int64_t words_per_row, W* buffers, W invalid) {
  W* const buffer = buffers != nullptr ? buffers + int64_t{blockIdx.x} * B * kWidth : &shared_storage<W>();
  const int thread = static_cast<int>(threadIdx.x), word = thread % kWidth;
  for (int64_t first = int64_t{blockIdx.x} * kWidth; first < words_per_row; first += int64_t{gridDim.x} * kWidth) {
    const bool active = first + word < words_per_row;
    W* const column = cache + first + word;
    for (int64_t b = thread / kWidth; active && b < B; b += kThreads / kWidth) {
      const int64_t beam = load(beams_B + b);
      if (beam == b) continue;
      store(buffer + b * kWidth + word, beam >= 0 && beam < B ? load(column + beam * words_per_row) : invalid);
    }
    __syncthreads();  // every row has been read
    for (int64_t b = thread / kWidth; active && b < B; b += kThreads / kWidth) {
      if (load(beams_B + b) != b) store(column + b * words_per_row, load(buffer + b * kWidth + word));
    }
    __syncthreads();
  }
}

template <class W>
void run(void* cache, const int64_t* beams, int64_t B, const Plan& plan, void* workspace, const W& invalid,
         cudaStream_t stream) {
  launch(&reorder_kernel<W>, dim3(static_cast<unsigned>(plan.blocks)), dim3(kThreads),
         plan.in_shared ? static_cast<size_t>(plan.buffer_bytes) : 0, stream, static_cast<W*>(cache), beams, B,
         plan.words_per_row, plan.in_shared ? nullptr : static_cast<W*>(workspace), invalid);
}

}  // namespace

int64_t reorder_workspace_bytes(int64_t B) {
  return widest_buffer(B) <= kSharedBytes ? 0 : num_buffers(B) * widest_buffer(B);
}

void reorder_cache(void* cache, const int64_t* beams, int64_t B, int64_t row_bytes, void* workspace,
                   cudaStream_t stream) {
  const Plan plan(cache, B, row_bytes);
  if (plan.word == Word::bytes16) {
    Vector<uint32_t> invalid;
    for (uint32_t& bits : invalid.values) bits = ~uint32_t{0};
    run(cache, beams, B, plan, workspace, invalid, stream);
  } else if (plan.word == Word::bytes4) {
    run(cache, beams, B, plan, workspace, ~uint32_t{0}, stream);
  } else {
    run(cache, beams, B, plan, workspace, static_cast<uint8_t>(0xff), stream);
  }
}

}  // namespace glam::cuda
