// Working memory that a thread keeps between calls: fresh pages cost more than the arithmetic done in them.
// Declare one per purpose as `static thread_local Scratch`; contents are undefined at every get().
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "ops/huge_pages.h"

namespace glam::cpu {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  template <class T>
  T* get(int64_t elements) {
    const size_t bytes = static_cast<size_t>(elements) * sizeof(T);
    if (bytes > capacity_) grow(bytes);
    return static_cast<T*>(data_);
  }

 private:
  void grow(size_t bytes) {
    constexpr size_t kLine = 64;
    const bool huge = bytes >= kHugePage;
    const size_t rounded = round_up_to(bytes, huge ? kHugePage : kLine);
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
    data_ = huge ? allocate_huge_pages(rounded) : std::aligned_alloc(kLine, rounded);
    if (!data_) throw std::bad_alloc();
    capacity_ = rounded;
  }

  void* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace glam::cpu
