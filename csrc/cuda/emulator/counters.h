// Counters of what a kernel asks of the memory system, by kernel and source line; off until they are started.
//
// One access of a warp is what its lanes do at the same source line for the same time (each thread's n-th visit). In
// global memory it costs the 32-byte sectors that it touches and needs as many as its distinct bytes fill: the ratio is
// how well it coalesces. In shared memory it costs passes: in each, every one of the 32 banks gives one 4-byte word,
// and accesses of 8 or 16 bytes go by halves or quarters of the warp. More passes than the distinct words need are bank
// conflicts. Only load(), store(), atomics and the functions of ptx.cuh are seen.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/emulator/memory.h"
#include "cuda/emulator/scheduler.h"

namespace glam::cuda::emulator::counters {

bool counting();
void start();
void stop();

void count_launch(const std::string& kernel, const Launch& launch);
void count_access(Access access, bool shared, const void* address, size_t bytes, Location here);
void end_block();

// {"launches": [{"kernel", "grid", "block", "shared_bytes"}, ...] in order,
//  "accesses": [{"kernel", "file", "line", "space", "access", "warp_accesses", "bytes", "cost", "needed"}, ...]}
// where cost and needed are sectors for the space "global" and passes for "shared".
std::string json();
std::string table();

}  // namespace glam::cuda::emulator::counters
