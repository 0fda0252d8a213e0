// Checks of the CUDA functions that the emulator offers, each a kernel whose threads compare with plain C++.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace planted {

struct Check {
  std::string name;
  std::function<bool()> run;
};
std::vector<Check> function_checks();

// Launches, with counting on, kernels whose accesses are known.
void run_counted();

}  // namespace planted
