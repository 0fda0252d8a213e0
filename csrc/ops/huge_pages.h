// Memory in huge pages, where the system has them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

namespace glam {

inline constexpr size_t kHugePage = size_t{2} << 20;

inline size_t round_up_to(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// Whole huge pages, and small ones for the rest. Null where there is no memory; given back by std::free.
inline void* allocate_huge_pages(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kHugePage, bytes) != 0) return nullptr;
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);  // advice only: a refusal changes nothing
#endif
  return data;
}

}  // namespace glam
