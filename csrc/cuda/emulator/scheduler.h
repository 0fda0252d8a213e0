// One block of CUDA threads at a time, each thread a fiber, on the thread that calls launch().
//
// A thread runs until it waits: at __syncthreads for its block, at a warp-wide operation for the lanes of its mask. The
// scheduler then picks another by Config::order. Blocks run one after another, so a block that spins on another's flag
// never ends. What a kernel does wrong ends the launch with std::runtime_error naming kernel, block, thread, file and
// line; the fibers are thrown away and the next launch starts afresh. Threads must not end while others of the block
// still wait for them, which a GPU would forgive at __syncthreads.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

namespace glam::cuda::emulator {

using Location = std::source_location;

// --- Launches

struct Launch {
  const void* kernel;
  Location where;
  dim3 grid, block;
  size_t shared_bytes;
};

// Calls `body` once for each CUDA thread. Launches from several host threads take turns.
void run(const Launch& launch, const std::function<void()>& body);

// --- The thread that runs

struct Position {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned lane, warp;
};
extern const Position* current;

// Ends the launch.
[[noreturn]] void fail(const std::string& message, Location here);

// Lets other threads in, now and then, if the order is random.
void maybe_yield();

// --- Waiting for others

enum class Vote { none, count, all, any };

// All threads of the block; the vote's result over their values.
int barrier(Vote vote, int value, Location here);

constexpr size_t kSlotBytes = 32;
struct alignas(16) Slot {
  unsigned char bytes[kSlotBytes];
};
// All lanes of the mask: each leaves its slot and, once all have, reads the 32 slots until it waits again. Only with
// `orders_memory` are writes before it visible to the other lanes after it.
const Slot* exchange(unsigned mask, const Slot& slot, const char* operation, Location here, bool orders_memory = false);

// What __threadfence orders.
void fence();

// --- Asynchronous copies (cp.async)

// Copies or fills `target`; instrumented, as it comes from the kernel's source.
using CopyFunction = void (*)(void* target, const void* source, bool valid);

// The copy happens at some time before the wait that covers it.
void start_copy(CopyFunction copy, void* target, const void* source, bool valid);
void commit_copies();
// All but the `pending` youngest groups are done.
void wait_for_copies(int pending);

// --- The block's shared memory

constexpr size_t kMaxSharedBytes = 163 * 1024;  // of compute capability 8.0, the least that kernels are built for
constexpr size_t kSharedAlignment = 1024;
constexpr size_t kSharedMargin = 4096;  // after the block's bytes: nothing else lies there, every access is an error

// Filled with 0xFF, a NaN in every floating-point type, before each block.
struct SharedMemory {
  unsigned char* data = nullptr;
  size_t bytes = 0;

  // How far behind the start an address lies; huge for one before it.
  uintptr_t offset_of(const void* pointer) const {
    return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(data);
  }
  bool contains(const void* pointer) const { return data && offset_of(pointer) < bytes; }
};
extern SharedMemory shared_memory;

// For access checks: the address is on the running thread's stack.
bool on_own_stack(const void* address);
// Of the kernel that runs, for reports.
const std::string& running_kernel();
std::string to_text(Location here);

}  // namespace glam::cuda::emulator
