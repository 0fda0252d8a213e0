// Many small problems in one launch: what describes them is the kernel's argument, and a block finds the one it is for.
#pragma once

#include <stdexcept>
#include <vector>

#include "cuda/kernels/device.cuh"

namespace glam::cuda {

constexpr size_t kBatchBytes = 4096 - 96;  // a kernel's arguments are 4 KB at most, and there are others

template <class Item>
struct Batch {
  static constexpr int kMost =
      static_cast<int>((kBatchBytes - 2 * sizeof(unsigned)) / (sizeof(Item) + sizeof(unsigned)));

  Item items[kMost];
  unsigned first_block[kMost + 1];  // of each item; behind the last one the number of blocks
  int count;
};

// A block's item, and which of its blocks it is.
struct Place {
  int item;
  unsigned block, blocks;
};

template <class Item>
__device__ __forceinline__ Place this_place(const Batch<Item>& batch) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  const unsigned first = batch.first_block[low];
  return {.item = low, .block = blockIdx.x - first, .blocks = batch.first_block[low + 1] - first};
}

// Items for one kernel, as many launches as it takes.
template <class Item>
class Batches {
 public:
  void add(const Item& item, int64_t blocks) {
    if (blocks == 0) return;
    if (blocks > kMostBlocks)
      throw std::runtime_error("glam: a CUDA kernel's grid is too small for an array this large");
    const auto is_full = [blocks](const Batch<Item>& batch) {
      return batch.count == Batch<Item>::kMost || batch.first_block[batch.count] + blocks > kMostBlocks;
    };
    if (batches_.empty() || is_full(batches_.back())) batches_.push_back({});
    Batch<Item>& batch = batches_.back();
    batch.items[batch.count] = item;
    batch.first_block[batch.count + 1] = batch.first_block[batch.count] + static_cast<unsigned>(blocks);
    ++batch.count;
  }
  // f(batch, grid) for each launch.
  template <class F>
  void for_each(F&& f) const {
    static_assert(sizeof(Batch<Item>) <= kBatchBytes);
    for (const Batch<Item>& batch : batches_) f(batch, dim3(batch.first_block[batch.count]));
  }

 private:
  static constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // of a grid

  std::vector<Batch<Item>> batches_;
};

}  // namespace glam::cuda
