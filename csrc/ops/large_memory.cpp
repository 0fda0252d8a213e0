#include "ops/large_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>

#include "ops/huge_pages.h"

namespace glam {
namespace {

constexpr size_t kLargeBytes = kHugePage;
// A block that so many allocations have not used is offered to the system. Not sooner: where the system looks for such
// pages at once, as some virtual machines do, a step would wait for the zeroing of the memory that it takes again.
constexpr int64_t kIdleAllocations = 4096;

// A block may be used again for a tensor of nearly its size: sizes are rounded up by a sixteenth at most.
size_t block_bytes(size_t bytes) { return round_up_to(bytes, std::min(kHugePage, std::bit_floor(bytes) / 16)); }

struct Block {
  void* data;
  size_t bytes;
  int64_t kept_at = 0;      // allocations until then
  bool is_offered = false;  // to the system
};

void* allocate_or_throw(size_t bytes) {
  void* const data = allocate_huge_pages(bytes);
  TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "glam: expected ", bytes, " bytes of memory, got none");
  return data;
}

class LargeMemory final : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive everything else.
  static LargeMemory& get() {
    static auto* const memory = new LargeMemory;
    return *memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    auto* const block = new Block(take(block_bytes(bytes)));
    return {block->data, block, &LargeMemory::release, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

 private:
  using Kept = std::list<Block>;

  // The smallest kept block that is large enough and not much larger, of several the last one that was freed, which may
  // still be in a cache; or a new one.
  Block take(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      ++allocations_;
      offer_idle();
      auto found = kept_.end();
      for (auto block = kept_.begin(); block != kept_.end(); ++block) {
        const bool fits = block->bytes >= bytes && block->bytes - bytes <= bytes / 8;
        if (fits && (found == kept_.end() || block->bytes <= found->bytes)) found = block;
      }
      if (found != kept_.end()) {
        const Block block{found->data, found->bytes};
        remove(found);
        use(block.bytes);
        return block;
      }
    }
    const Block block{allocate_or_throw(bytes), bytes};
    const std::lock_guard lock(mutex_);
    use(bytes);
    return block;
  }

  static void release(void* context) {
    auto* const block = static_cast<Block*>(context);
    get().keep(*block);
    delete block;
  }

  void keep(Block block) {
    const std::lock_guard lock(mutex_);
    used_bytes_ -= block.bytes;
    kept_bytes_ += block.bytes;
    block.kept_at = allocations_;
    kept_.push_back(block);
    bound();
  }

  void use(size_t bytes) {
    used_bytes_ += bytes;
    peak_bytes_ = std::max(peak_bytes_, used_bytes_);
    bound();
  }

  void remove(Kept::iterator block) {
    (block->is_offered ? offered_bytes_ : kept_bytes_) -= block->bytes;
    kept_.erase(block);
  }

  void offer(Block& block) {
    if (block.is_offered) return;
#ifdef MADV_FREE
    madvise(block.data, block.bytes, MADV_FREE);
#endif
    block.is_offered = true;
    kept_bytes_ -= block.bytes;
    offered_bytes_ += block.bytes;
  }

  void offer_idle() {
    for (Block& block : kept_) {
      if (allocations_ - block.kept_at <= kIdleAllocations) return;  // as all after it
      offer(block);
    }
  }

  // The last one that was freed is offered first: steps come round, so it is the one that is needed last.
  void bound() {
    for (auto block = kept_.rbegin(); used_bytes_ + kept_bytes_ > peak_bytes_ / 4 * 5 && block != kept_.rend();
         ++block) {
      offer(*block);
    }
    while (used_bytes_ + kept_bytes_ + offered_bytes_ > peak_bytes_ / 2 * 3) {
      void* const data = kept_.front().data;
      remove(kept_.begin());
      std::free(data);
    }
  }

  std::mutex mutex_;
  Kept kept_;  // in the order of kept_at
  int64_t allocations_ = 0;
  size_t used_bytes_ = 0, peak_bytes_ = 0;
  size_t kept_bytes_ = 0, offered_bytes_ = 0;  // of kept blocks: those that are not offered, and those that are
};

class LastingMemory final : public c10::Allocator {
 public:
  static LastingMemory& get() {
    static LastingMemory memory;
    return memory;
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* const data = allocate_or_throw(bytes);
    return {data, data, &std::free, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
};

at::Tensor empty_from(c10::Allocator& memory, at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto dtype = at::typeMetaToScalarType(options.dtype());
  size_t bytes = c10::elementSize(dtype);
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes < kLargeBytes || !options.device().is_cpu()) return at::empty(sizes, options);
  return at::detail::empty_generic(sizes, &memory, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   at::MemoryFormat::Contiguous);
}

}  // namespace

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return empty_from(LargeMemory::get(), sizes, options);
}

at::Tensor empty_lasting(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return at::empty(sizes, options);  // a mode wants to see it
  return empty_from(LastingMemory::get(), sizes, options);
}

}  // namespace glam
