// Access checks: see memory.h. Compiled without a sanitizer's instrumentation.
#include "cuda/emulator/memory.h"

#include <cstdio>
#include <map>

#include "cuda/emulator/config.h"
#include "cuda/emulator/counters.h"

namespace glam::cuda::emulator {

bool watching = false;

namespace {

struct Array {
  size_t bytes;
  std::string name;
};

// By address.
std::map<uintptr_t, Array>& arrays() {
  static std::map<uintptr_t, Array> arrays;
  return arrays;
}

std::string describe(const void* address) {
  char text[32];
  std::snprintf(text, sizeof(text), "%p", address);
  if (const uintptr_t offset = shared_memory.offset_of(address); offset < shared_memory.bytes + kSharedMargin) {
    return std::string(text) + " (byte " + std::to_string(offset) + " of shared memory)";
  }
  return text;
}

void check_bounds(const void* address, size_t bytes, Location here) {
  const auto number = reinterpret_cast<uintptr_t>(address);
  auto after = arrays().upper_bound(number);
  std::string nearest = "before all of them";
  if (after != arrays().begin()) {
    const auto& [start, array] = *std::prev(after);
    if (number + bytes <= start + array.bytes) return;
    nearest = "byte " + std::to_string(number - start) + " after the start of " + array.name + ", which has " +
              std::to_string(array.bytes);
  }
  fail("an access of " + std::to_string(bytes) + " bytes to global memory outside every registered array (" + nearest +
           ")",
       here);
}

}  // namespace

void register_array(const void* array, size_t bytes, const std::string& name) {
  arrays()[reinterpret_cast<uintptr_t>(array)] = {bytes, name};
  watching = true;
}

void forget_arrays() {
  arrays().clear();
  watching = counters::counting();
}

void fail_alignment(const void* address, size_t alignment, Location here) {
  fail("a misaligned access to " + describe(address) + ", which is no multiple of " + std::to_string(alignment), here);
}

void fail_shared(const void* address, size_t bytes, Location here) {
  fail("an access of " + std::to_string(bytes) + " bytes to " + describe(address) + " is not within the " +
           std::to_string(shared_memory.bytes) + " bytes of the block's shared memory",
       here);
}

void watch(Access access, const void* address, size_t bytes, Location here) {
  const bool shared = shared_memory.contains(address);
  if (!shared && on_own_stack(address)) return;
  if (!shared && !arrays().empty()) check_bounds(address, bytes, here);
  if (counters::counting()) counters::count_access(access, shared, address, bytes, here);
}

}  // namespace glam::cuda::emulator

void glam_emulator_register_array(const void* array, size_t bytes, const char* name) {
  glam::cuda::emulator::register_array(array, bytes, name);
}

void glam_emulator_forget_arrays() { glam::cuda::emulator::forget_arrays(); }
