// Kernels that break CUDA's rules: the emulator must end each launch with an error that names the places.
#pragma once

#include <string>
#include <vector>

namespace planted {

// The names that run_misuse() knows.
std::vector<std::string> misuse_names();

// Launches the kernel of this name, which throws. A line of misuse_kernels.cu with the comment "place: NAME" must be in
// the error's text.
void run_misuse(const std::string& name);

// Overflows a thread's stack, which ends the process.
void run_stack_overflow();

}  // namespace planted
