// glam_ext._C: the pybind face of libglam_core, and the only file that knows Python.
//
// The ops need nothing here: they are registered with torch and reached as torch.ops.glam.*. One bind_* function per
// subject, called from the module definition at the end; anything that computes releases the GIL.

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include "glam/build_info.h"
#include "glam/checkpoint.h"
#include "glam/config.h"

namespace py = pybind11;

namespace {

void bind_build_info(py::module_& m) {
  m.attr("__version__") = glam::version();
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

// A configuration crosses as its JSON text: the Python dataclass stays an ordinary dataclass, and one parser serves all.
void bind_config(py::module_& m) {
  m.def(
      "canonical_config",
      [](const std::string& json, int indent) { return glam::GLaMConfig::from_json(json).to_json(indent); },
      py::arg("json"), py::arg("indent") = -1,
      "The validated configuration with every field; ValueError names the key.");
  m.def(
      "config_defaults", [] { return glam::GLaMConfig{}.to_json(); },
      "Every field with its default; the required ones are 0.");
  m.def("preset_names", &glam::preset_names);
  m.def("preset_config", [](const std::string& name) { return glam::GLaMConfig::preset(name).to_json(); });
  m.def(
      "moe_layers",
      [](const std::string& json) {
        const auto config = glam::GLaMConfig::from_json(json);
        std::vector<int64_t> layers;
        for (int64_t layer = 0; layer < config.num_layers; ++layer) {
          if (config.is_moe_layer(layer)) layers.push_back(layer);
        }
        return std::pair(config.num_moe_layers(), layers);
      },
      "(num_moe_layers, the layers with experts)");
  m.def("capacity", [](const std::string& json, int64_t group_size, bool training) {
    return glam::GLaMConfig::from_json(json).capacity(group_size, training);
  });
  m.def("count_parameters", [](const std::string& json) {
    const auto count = glam::count_parameters(glam::GLaMConfig::from_json(json));
    py::dict out;
    out["total"] = count.total;
    out["active"] = count.active;
    out["attention"] = count.attention;
    out["dense_ffn"] = count.dense_ffn;
    out["experts"] = count.experts;
    out["router"] = count.router;
    out["embedding"] = count.embedding;
    out["norms"] = count.norms;
    out["relative_bias"] = count.relative_bias;
    return out;
  });
}

py::dict checkpoint_facts(const glam::CheckpointFolder& folder) {
  py::dict out;
  out["path"] = folder.path;
  out["config"] = folder.config.to_json();
  py::list files;
  for (const auto& entry : folder.files) files.append(py::make_tuple(entry.file, entry.size, entry.sha256));
  out["files"] = files;
  return out;
}

void bind_io(py::module_& m) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  py::register_exception<glam::CheckpointError>(m, "CheckpointError", PyExc_RuntimeError);
  m.def("read_safetensors", &glam::read_safetensors, py::arg("file"), release_gil());
  m.def("write_safetensors", &glam::write_safetensors, py::arg("file"), py::arg("tensors"),
        py::arg("metadata") = std::map<std::string, std::string>{}, release_gil());
  m.def(
      "sha256", [](const py::bytes& bytes) { return glam::sha256(std::string_view(bytes)); },
      "Hexadecimal SHA-256 as the C++ side computes it.");
  m.def("sha256_of_file", &glam::sha256_of_file, py::arg("file"), release_gil());
  m.def(
      "open_checkpoint",
      [](const std::filesystem::path& path, bool hashes) {
        std::vector<std::string> warnings;
        const auto folder = [&] {
          const py::gil_scoped_release released;
          return glam::open_checkpoint(path, hashes ? glam::Verify::kHashes : glam::Verify::kSizes,
                                       [&](const std::string& message) { warnings.push_back(message); });
        }();
        py::dict out = checkpoint_facts(folder);
        out["warnings"] = warnings;
        out["trainer"] = glam::load_trainer_json(folder);
        return out;
      },
      py::arg("path"), py::arg("hashes") = true,
      "Path, config JSON, files, warnings and trainer JSON, as the C++ reader sees them.");
  m.def(
      "load_checkpoint_tensors",
      [](const std::filesystem::path& path, const std::string& stem, bool hashes) {
        const py::gil_scoped_release released;
        const auto verify = hashes ? glam::Verify::kHashes : glam::Verify::kSizes;
        return glam::load_tensors(glam::verify_checkpoint(path, verify), stem);
      },
      py::arg("folder"), py::arg("stem"), py::arg("hashes") = true);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  bind_build_info(m);
  bind_config(m);
  bind_io(m);
}
