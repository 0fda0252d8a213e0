// What this copy of libglam_core was built with and what it uses on this machine.
//
// Facts of the build (versions, compiler, backends, instruction sets) beside facts of the running process (threads, the
// instruction set chosen, whether at::parallel_for really starts workers). Python shows them as glam_ext.build_info().
#pragma once

#include <string>
#include <vector>

namespace glam {

struct BuildInfo {
  std::string version;        // of this package
  std::string torch_version;  // the LibTorch it was compiled against
  std::string compiler;
  long cxx_standard = 0;  // 202002 is C++20

  bool cuda = false;
  std::string cuda_reason;  // why CUDA is absent; empty when it is built in
  std::vector<std::string> cuda_architectures;

  std::vector<std::string> isa_compiled;
  std::vector<std::string> isa_supported;  // by this CPU
  std::string isa_active;

  bool openmp = false;       // this library was compiled with OpenMP
  int num_threads = 1;       // threads torch uses inside one op
  int parallel_workers = 1;  // threads that took part in a small at::parallel_for inside this library
};

// Of this package, as "0.1.0".
const char* version();

// Throws if GLAM_CPU_ISA asks for an instruction set that is not available.
BuildInfo build_info();

}  // namespace glam
