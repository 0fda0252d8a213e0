// glam_ext._C: the pybind face of libglam_core, and the only file that knows Python.
//
// The ops need nothing here: they are registered with torch and reached as torch.ops.glam.*. One bind_* function per
// subject, called from the module definition at the end; anything that computes releases the GIL.

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include "glam/build_info.h"
#include "glam/checkpoint.h"
#include "glam/config.h"
#include "glam/data.h"
#include "glam/distributed.h"
#include "glam/export.h"
#include "glam/generate.h"
#include "glam/load.h"
#include "glam/nn.h"
#include "glam/ops.h"

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

// glam::AccumulateInPlace as a context manager.
struct AccumulateInPlaceContext {
  std::optional<glam::AccumulateInPlace> guard;
};

void bind_ops(py::module_& m) {
  py::class_<AccumulateInPlaceContext>(m, "AccumulateInPlace")
      .def(py::init<>())
      .def("__enter__", [](AccumulateInPlaceContext& self) { self.guard.emplace(); })
      .def("__exit__", [](AccumulateInPlaceContext& self, const py::args&) { self.guard.reset(); });
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
  m.def(
      "read_safetensors", [](const std::filesystem::path& file) { return glam::read_safetensors(file); },
      py::arg("file"), release_gil());
  m.def(
      "read_pieces",
      [](const std::filesystem::path& file) {
        std::map<std::string, std::tuple<at::Tensor, std::vector<int64_t>, std::vector<int64_t>>> pieces;
        for (auto& [name, piece] : glam::read_pieces(file)) {
          pieces.emplace(name, std::tuple(piece.tensor, piece.shape, piece.offset));
        }
        return pieces;
      },
      py::arg("file"), release_gil(), "Each tensor of a file, the shape of the whole one and its offset in that.");
  using Facts = std::tuple<std::string, std::string, std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>>;
  m.def(
      "problem_of_pieces",
      [](const std::string& name, const std::vector<Facts>& pieces) {
        std::vector<glam::PieceFacts> facts;
        for (const auto& [holder, dtype, shape, offset, sizes] : pieces) {
          facts.push_back({holder, dtype, shape, offset, sizes});
        }
        return glam::problem_of_pieces(name, facts);
      },
      py::arg("name"), py::arg("pieces"), "Of (holder, dtype, whole shape, offset, sizes) of each; empty if whole.");
  m.attr("PIECES_KEY") = glam::kPiecesKey;
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

void bind_data(py::module_& m) {
  m.def(
      "epoch_order",
      [](uint64_t seed, int64_t epoch, int64_t num_rows) {
        return at::tensor(glam::data::epoch_order(seed, epoch, num_rows), at::kLong);
      },
      py::arg("seed"), py::arg("epoch"), py::arg("num_rows"), py::call_guard<py::gil_scoped_release>(),
      "int64 [num_rows].");
}

// The model tree. Python's glam_ext.GLaM adopts its parameters: a tensor handed out twice is the same Python object.
void bind_model(py::module_& m) {
  using glam::nn::GLaMImpl;
  using OptionalTensor = std::optional<at::Tensor>;
  using release_gil = py::call_guard<py::gil_scoped_release>;
  const auto random = [](const std::tuple<int64_t, int64_t, int64_t>& counters) {
    return glam::nn::Randomness{std::get<0>(counters), std::get<1>(counters), std::get<2>(counters)};
  };
  using Counters = std::tuple<int64_t, int64_t, int64_t>;
  py::class_<GLaMImpl, std::shared_ptr<GLaMImpl>>(m, "GLaM")
      .def(py::init([](const std::string& config, std::optional<int64_t> seed, const std::string& device,
                       const std::string& expert_group, int64_t exchange_chunks) {
             return std::make_shared<GLaMImpl>(glam::GLaMConfig::from_json(config), seed, torch::Device(device),
                                               glam::nn::ExpertParallel{expert_group, exchange_chunks});
           }),
           py::arg("config"), py::arg("seed"), py::arg("device"), py::arg("expert_group") = "",
           py::arg("exchange_chunks") = 1)
      .def("local_experts",
           [](const GLaMImpl& model) { return std::pair(model.first_local_expert(), model.num_local_experts()); })
      .def("config", [](const GLaMImpl& model) { return model.config().to_json(); })
      .def("named_parameters",
           [](const GLaMImpl& model) {
             std::vector<std::pair<std::string, at::Tensor>> out;
             for (const auto& item : model.named_parameters()) out.emplace_back(item.key(), item.value());
             return out;
           })
      .def("train", [](GLaMImpl& model, bool on) { model.train(on); })
      .def_property_readonly("training", &GLaMImpl::is_training)
      .def(
          "forward",
          [random](GLaMImpl& model, const at::Tensor& tokens, const OptionalTensor& segment_ids,
                   const Counters& counters) { return model.forward(tokens, segment_ids, random(counters)); },
          release_gil())
      .def(
          "loss",
          [random](GLaMImpl& model, const at::Tensor& tokens, const at::Tensor& targets, const OptionalTensor& weights,
                   const OptionalTensor& segment_ids, const Counters& counters) {
            const auto loss = model.loss(tokens, targets, weights, segment_ids, random(counters));
            return std::make_tuple(loss.loss_sum, loss.aux, loss.router_z, loss.nll, loss.num_tokens,
                                   loss.router_statistics);
          },
          release_gil())
      .def("prepare_for_inference", &GLaMImpl::prepare_for_inference, release_gil())
      .def_property_readonly("is_prepared", &GLaMImpl::is_prepared)
      .def("init_cache", &GLaMImpl::init_cache, release_gil())
      .def("step", &GLaMImpl::step, release_gil());
  m.def(
      "load_model",
      [](const std::filesystem::path& folder, bool hashes, std::optional<at::ScalarType> inference) {
        return glam::load_model(folder, hashes ? glam::Verify::kHashes : glam::Verify::kSizes, inference).ptr();
      },
      py::arg("folder"), py::arg("hashes") = true, py::arg("inference") = py::none(), release_gil());
}

void bind_distributed(py::module_& m) {
  using glam::distributed::GradientReducer;
  using release_gil = py::call_guard<py::gil_scoped_release>;
  py::class_<GradientReducer>(m, "GradientReducer")
      .def(py::init([](const std::vector<std::pair<at::Tensor, std::string>>& parameters, int64_t bucket_bytes) {
             std::vector<glam::distributed::ReducedParameter> reduced;
             for (const auto& [parameter, group] : parameters) reduced.push_back({parameter, group});
             return std::make_unique<GradientReducer>(reduced, bucket_bytes);
           }),
           py::arg("parameters"), py::arg("bucket_bytes") = GradientReducer::kBucketBytes)
      .def("start", &GradientReducer::start)
      .def("finish", &GradientReducer::finish, release_gil());
}

void bind_deployment(py::module_& m) {
  using glam::nn::GLaMImpl;
  using release_gil = py::call_guard<py::gil_scoped_release>;
  m.def(
      "generate",
      [](const std::shared_ptr<GLaMImpl>& model, const at::Tensor& prompts, const at::Tensor& lengths,
         int64_t max_new_tokens, double temperature, int64_t top_k, double top_p, int64_t seed,
         std::vector<int64_t> stop_tokens, const std::optional<std::function<bool(at::Tensor)>>& on_step) {
        glam::GenerateOptions options{max_new_tokens, temperature, top_k, top_p, seed, std::move(stop_tokens), {}};
        options.on_step = [&on_step](const at::Tensor& tokens) {
          const py::gil_scoped_acquire acquired;
          if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // Ctrl-C
          return !on_step || (*on_step)(tokens);
        };
        glam::nn::GLaM holder(model);
        const py::gil_scoped_release released;
        const auto out = glam::generate(holder, prompts, lengths, options);
        return std::make_pair(out.tokens, out.counts);
      },
      "Tokens int64 [B, max_new_tokens] and counts int32 [B], as glam::generate; on_step gets each step's tokens.");
  m.def(
      "export_torchscript",
      [](const std::shared_ptr<GLaMImpl>& model, const std::filesystem::path& file,
         const std::map<std::string, std::string>& extra_files) {
        glam::export_torchscript(glam::nn::GLaM(model), file, extra_files);
      },
      py::arg("model"), py::arg("file"), py::arg("extra_files"), release_gil());
  m.def(
      "load_archive",
      [](const std::filesystem::path& file, const std::vector<std::string>& extra_file_names) {
        const auto archive = [&] {
          const py::gil_scoped_release released;
          return glam::load_archive(file, extra_file_names);
        }();
        py::dict extra_files;
        for (const auto& [name, content] : archive.extra_files) extra_files[py::str(name)] = py::bytes(content);
        return py::make_tuple(archive.module, archive.config.to_json(), extra_files);
      },
      py::arg("file"), py::arg("extra_file_names"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  bind_build_info(m);
  bind_ops(m);
  bind_config(m);
  bind_io(m);
  bind_data(m);
  bind_model(m);
  bind_distributed(m);
  bind_deployment(m);
}
