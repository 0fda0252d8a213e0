// glam_ext._C: the pybind face of libglam_core, and the only file that knows Python.
//
// The ops need nothing here: they are registered with torch and reached as torch.ops.glam.*. One bind_* function per
// subject, called from the module definition at the end; anything that computes releases the GIL.

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "glam/build_info.h"

namespace py = pybind11;

namespace {

void bind_build_info(py::module_& m) {
  m.def(
      "build_info",
      [] {
        const auto info = glam::build_info();
        py::dict out;
        out["version"] = info.version;
        out["torch_version"] = info.torch_version;
        out["compiler"] = info.compiler;
        out["cxx_standard"] = info.cxx_standard;
        out["cuda"] = info.cuda;
        out["cuda_reason"] = info.cuda_reason;
        out["cuda_architectures"] = info.cuda_architectures;
        out["isa_compiled"] = info.isa_compiled;
        out["isa_supported"] = info.isa_supported;
        out["isa_active"] = info.isa_active;
        out["openmp"] = info.openmp;
        out["num_threads"] = info.num_threads;
        out["parallel_workers"] = info.parallel_workers;
        return out;
      },
      "Facts of the build and of the running process, as glam::BuildInfo.");
}

}  // namespace

PYBIND11_MODULE(_C, m) { bind_build_info(m); }
