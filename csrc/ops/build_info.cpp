// Facts about this build and this process; see glam/build_info.h.

#include "glam/build_info.h"

#include <ATen/Parallel.h>

#include <set>
#include <sstream>
#include <thread>

#include "cpu/isa.h"

#if !defined(GLAM_VERSION) || !defined(GLAM_TORCH_VERSION) || !defined(GLAM_CUDA_REASON) || \
    !defined(GLAM_CUDA_ARCHITECTURES)
#error "GLAM_VERSION, GLAM_TORCH_VERSION, GLAM_CUDA_REASON and GLAM_CUDA_ARCHITECTURES are defined by CMakeLists.txt"
#endif

namespace glam {
namespace {

std::string compiler_name() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// None where CUDA is absent, however many were asked for.
std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
  std::istringstream list(*GLAM_CUDA_REASON ? "" : GLAM_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

// Without -fopenmp, at::parallel_for compiles to a plain loop and nothing says so: count the threads that show up.
int count_parallel_workers() {
  const int threads = at::get_num_threads();
  std::vector<std::thread::id> worker_of_chunk(threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker_of_chunk[i] = std::this_thread::get_id();
  });
  return static_cast<int>(std::set(worker_of_chunk.begin(), worker_of_chunk.end()).size());
}

}  // namespace

const char* version() { return GLAM_VERSION; }

BuildInfo build_info() {
  return {
      .version = version(),
      .torch_version = GLAM_TORCH_VERSION,
      .compiler = compiler_name(),
      .cxx_standard = __cplusplus,
      .cuda = *GLAM_CUDA_REASON == 0,
      .cuda_reason = GLAM_CUDA_REASON,
      .cuda_architectures = cuda_architectures(),
      .isa_compiled = compiled_isas(),
      .isa_supported = supported_isas(),
      .isa_active = isa_name(active_isa()),
#ifdef _OPENMP
      .openmp = true,
#endif
      .num_threads = at::get_num_threads(),
      .parallel_workers = count_parallel_workers(),
  };
}

}  // namespace glam
