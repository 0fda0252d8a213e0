// In which order the emulator runs threads, and its faces for C++ and, through ctypes, for Python.
//
// GLAM_EMULATOR_ORDER (forward, reverse, random) and GLAM_EMULATOR_SEED set the start values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glam::cuda::emulator {

// forward: threads and blocks by index, asynchronous copies as late as possible. reverse: the other way round, copies
// at once. random: everything by the seed, and atomics let other threads in.
enum class Order { forward, reverse, random };

struct Config {
  Order order = Order::random;
  uint64_t seed = 1;
};

// Every launch starts from the seed anew, so that a failure repeats whatever ran before. Change it between launches
// only.
Config& config();

}  // namespace glam::cuda::emulator

extern "C" {
// False where the order is unknown.
bool glam_emulator_configure(const char* order, uint64_t seed);

// Counting forgets what was counted before.
void glam_emulator_start_counting();
void glam_emulator_stop_counting();
// What was counted (see counters.h), as JSON or as a table; valid until the next call.
const char* glam_emulator_report();
const char* glam_emulator_table();

// Once an array is registered, load() and store() to global memory must stay within the registered ones.
void glam_emulator_register_array(const void* array, size_t bytes, const char* name);
void glam_emulator_forget_arrays();
}
