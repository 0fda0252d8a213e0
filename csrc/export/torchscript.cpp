// Builds the TorchScript module: a tree of modules that hold the parameters, the functions of glam_ext/functional.py
// compiled from their embedded text, and four methods that pass the parameters to them.

#include <glam/build_info.h>
#include <glam/checkpoint.h>
#include <glam/export.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "export/archive_file.h"
#include "export/functional_source.h"
#include "export/resolver.h"

namespace glam {
namespace {

using torch::jit::CompilationUnit;

// The fields of glam_ext.functional.Options, in its order, with their values.
class Options {
 public:
  explicit Options(const GLaMConfig& config) {
    add("num_layers", config.num_layers);
    add("num_heads", config.num_heads);
    add("head_dim", config.head_dim);
    add("num_experts", config.num_experts);
    add("moe_first", config.moe_first);
    add("expert_activation", config.expert_activation);
    add("tie_embedding", config.tie_embedding);
    add("attention_extra_logit", config.attention_extra_logit);
    add("attention_logit_cap", config.attention_logit_cap);
    add("logit_cap", config.logit_cap);
    add("z_loss", config.z_loss);
    add("label_smoothing", config.label_smoothing);
    add("norm_eps", config.norm_eps);
    add("second_policy", config.second_policy);
    add("second_threshold", config.second_threshold);
    add("normalize_before_capacity", config.normalize_before_capacity);
    add("capacity_factor", config.capacity_factor);
    add("eval_capacity_factor", config.eval_capacity_factor.value_or(0.));
    add("group_size", config.group_size);
    add("aux_loss_reduction", config.aux_loss_reduction);
    add("router_jitter", config.router_jitter);
    add("router_logit_cap", config.router_logit_cap);
    add("compute_dtype", config.compute_dtype);
    add("expert_group", std::string());
    add("expert_ranks", int64_t{1});
    add("exchange_chunks", int64_t{1});
  }
  c10::TupleTypePtr type() const {
    return c10::TupleType::createNamed(c10::QualifiedName("__torch__.glam.Options"), names_, types_);
  }
  c10::IValue value(const c10::TupleTypePtr& type) const { return c10::ivalue::Tuple::createNamed(values_, type); }

 private:
  template <class T>
  void add(const char* name, const T& value) {
    names_.emplace_back(name);
    types_.push_back(c10::getTypePtr<T>());
    values_.emplace_back(value);
  }
  std::vector<std::string> names_;
  std::vector<c10::TypePtr> types_;
  std::vector<c10::IValue> values_;
};

// The attribute that freezing asks for; an archive only infers.
void register_mode(torch::jit::Module& module) { module.register_attribute("training", c10::BoolType::get(), false); }

// Registers each parameter in a tree of modules named as in the state dict; its own module class for every place.
void add_parameters(torch::jit::Module& root, const nn::GLaM& model, const std::shared_ptr<CompilationUnit>& unit) {
  std::map<std::string, torch::jit::Module> modules = {{"", root}};
  const auto module_at = [&](const std::string& path, auto&& self) -> torch::jit::Module& {
    if (const auto found = modules.find(path); found != modules.end()) return found->second;
    const auto dot = path.rfind('.');
    const std::string parent = dot == std::string::npos ? "" : path.substr(0, dot);
    const std::string name = path.substr(dot == std::string::npos ? 0 : dot + 1);
    std::string atom = path;
    std::replace(atom.begin(), atom.end(), '.', '_');
    torch::jit::Module module(c10::QualifiedName(c10::QualifiedName("__torch__.glam"), "Part_" + atom), unit);
    register_mode(module);
    self(parent, self).register_module(name, module);
    return modules.emplace(path, module).first->second;
  };
  for (const auto& item : model->named_parameters()) {
    const auto dot = item.key().rfind('.');
    module_at(item.key().substr(0, dot), module_at)
        .register_parameter(item.key().substr(dot + 1), item.value().detach(), /*is_buffer=*/false);
  }
}

// self.layers.0.moe.wi as TorchScript can say it.
std::string attribute_path(const std::string& name) {
  std::string expression = "self";
  std::istringstream parts(name);
  for (std::string part; std::getline(parts, part, '.');) expression = "getattr(" + expression + ", \"" + part + "\")";
  return expression;
}

std::string methods_source(const nn::GLaM& model) {
  std::ostringstream source;
  source << "def parameter_dict(self) -> Dict[str, Tensor]:\n    return {";
  const char* separator = "";
  for (const auto& item : model->named_parameters()) {
    source << separator << "\"" << item.key() << "\": " << attribute_path(item.key());
    separator = ", ";
  }
  source << "}\n"
         << R"(
def forward(self, tokens: Tensor, segment_ids: Optional[Tensor]=None) -> Tensor:
    return functional.forward(tokens, segment_ids, self.parameter_dict(), self.options, False, [0, 0, 0])

def init_cache(self, batch: int, max_len: int) -> List[Tensor]:
    return functional.init_cache(batch, max_len, self.parameter_dict(), self.options)

def step(self, tokens: Tensor, cache: List[Tensor], positions: Tensor, lengths: Optional[Tensor]=None) -> Tuple[Tensor, List[Tensor]]:
    if lengths is None:
        lengths = torch.full_like(positions, tokens.size(1))
    return functional.step(tokens, cache, positions, lengths, self.parameter_dict(), self.options)

def generate(self, tokens: Tensor, lengths: Tensor, max_new_tokens: int, temperature: float=1.0, top_k: int=0, top_p: float=1.0, seed: int=0, stop_tokens: List[int]=[1]) -> Tuple[Tensor, Tensor]:
    return functional.generate(tokens, lengths, max_new_tokens, temperature, top_k, top_p, seed, stop_tokens, self.parameter_dict(), self.options)
)";
  return source.str();
}

[[noreturn]] void refuse(const std::filesystem::path& file, const std::string& what) {
  throw CheckpointError(file.string() + ": " + what);
}

// Throws if the archive is not one of this library, or of a format that this version does not know.
void check_format(const std::filesystem::path& file, const std::string& description) {
  const auto facts = nlohmann::json::parse(description, nullptr, /*allow_exceptions=*/false);
  if (!facts.is_object() || !facts.contains("format") || !facts["format"].is_number_integer()) {
    refuse(file, "expected an archive of glam_ext, got another one; export it with `glam export`");
  }
  if (facts["format"].get<int64_t>() > kArchiveFormat) {
    const auto writer = facts.find("glam_ext");
    const std::string wanted =
        writer != facts.end() && writer->is_string() ? writer->get<std::string>() : "of that format";
    refuse(file, "expected archive format " + std::to_string(kArchiveFormat) + " or older, got " +
                     facts["format"].dump() + "; use glam_ext " + wanted + " or export it again with this one");
  }
}

}  // namespace

torch::jit::Module to_torchscript(const nn::GLaM& model) {
  TORCH_CHECK(model->parallel().group.empty(),
              "glam::export_torchscript: expected a model that holds all experts, got ",
              "one of an expert-parallel group; load its checkpoint in one process");
  const auto unit = std::make_shared<CompilationUnit>();
  const Options options(model->config());
  const auto options_type = options.type();
  unit->define(c10::QualifiedName(jit::kFunctionalPrefix), kFunctionalSource, jit::make_resolver(options_type, nullptr),
               nullptr);
  torch::jit::Module root(c10::QualifiedName("__torch__.glam.GLaM"), unit);
  register_mode(root);
  add_parameters(root, model, unit);
  root.register_attribute("options", options_type, options.value(options_type));
  root.define(methods_source(model), jit::make_resolver(options_type, unit));
  return root;
}

void export_torchscript(const nn::GLaM& model, const std::filesystem::path& file,
                        const std::map<std::string, std::string>& extra_files) {
  auto extra = extra_files;
  extra["config.json"] = model->config().to_json(2);
  extra["glam.json"] = nlohmann::json{{"format", kArchiveFormat}, {"glam_ext", version()}}.dump();
  write_archive(to_torchscript(model), file, extra);
}

Archive load_archive(const std::filesystem::path& file, const std::vector<std::string>& extra_file_names) {
  if (!std::filesystem::is_regular_file(file)) {
    refuse(file, "expected an archive, found no file; write one with `glam export`");
  }
  std::vector<std::string> names = extra_file_names;
  names.insert(names.end(), {"config.json", "glam.json"});
  auto extra = verify_archive(file, names);
  // Before the code is compiled: a newer one may use ops that this version does not have.
  check_format(file, extra["glam.json"]);
  try {
    return {torch::jit::load(file.string(), torch::kCPU), GLaMConfig::from_json(extra["config.json"]), extra};
  } catch (const std::exception& error) {
    const auto* const torch_error = dynamic_cast<const c10::Error*>(&error);
    refuse(file, std::string("expected an archive that this version of glam_ext and torch can read, got: ") +
                     (torch_error ? torch_error->what_without_backtrace() : error.what()) +
                     "; export it again with this version");
  }
}

}  // namespace glam
