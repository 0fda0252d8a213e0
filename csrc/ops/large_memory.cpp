#include "ops/large_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>

#include "ops/huge_pages.h"

namespace glam {
namespace {

constexpr size_t kLargeBytes = size_t{4} << 20;

struct Block {
  void* data;
  size_t bytes;
};

class LargeMemory final : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive everything else.
  static LargeMemory& get() {
    static auto* const memory = new LargeMemory;
    return *memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    auto* const block = new Block(take(round_up_to(bytes, kHugePage)));
    return {block->data, block, &LargeMemory::release, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

 private:
  // The smallest kept block that is large enough and not much larger, or a new one.
  Block take(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      auto found = kept_.end();
      for (auto block = kept_.begin(); block != kept_.end(); ++block) {
        const bool fits = block->bytes >= bytes && block->bytes - bytes <= bytes / 8;
        if (fits && (found == kept_.end() || block->bytes < found->bytes)) found = block;
      }
      if (found != kept_.end()) {
        const Block block = *found;
        kept_.erase(found);
        kept_bytes_ -= block.bytes;
        count_used(block.bytes);
        return block;
      }
    }
    void* const data = allocate_huge_pages(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "glam: expected ", bytes, " bytes of memory, got none");
    const std::lock_guard lock(mutex_);
    count_used(bytes);
    drop_beyond_peak();
    return {data, bytes};
  }

  static void release(void* context) {
    auto* const block = static_cast<Block*>(context);
    get().keep(*block);
    delete block;
  }

  void keep(const Block& block) {
#ifdef MADV_FREE
    madvise(block.data, block.bytes, MADV_FREE);
#endif
    const std::lock_guard lock(mutex_);
    used_bytes_ -= block.bytes;
    kept_bytes_ += block.bytes;
    kept_.push_back(block);
    drop_beyond_peak();
  }

  void count_used(size_t bytes) {
    used_bytes_ += bytes;
    peak_bytes_ = std::max(peak_bytes_, used_bytes_);
  }
  // Oldest first. The quarter is for calls of other shapes in between, which would otherwise cost the largest blocks.
  void drop_beyond_peak() {
    while (used_bytes_ + kept_bytes_ > peak_bytes_ + peak_bytes_ / 4) {
      kept_bytes_ -= kept_.front().bytes;
      std::free(kept_.front().data);
      kept_.pop_front();
    }
  }

  std::mutex mutex_;
  std::list<Block> kept_;
  size_t kept_bytes_ = 0, used_bytes_ = 0, peak_bytes_ = 0;
};

}  // namespace

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto dtype = at::typeMetaToScalarType(options.dtype());
  size_t bytes = c10::elementSize(dtype);
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes < kLargeBytes || !options.device().is_cpu()) return at::empty(sizes, options);
  return at::detail::empty_generic(sizes, &LargeMemory::get(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   at::MemoryFormat::Contiguous);
}

}  // namespace glam
