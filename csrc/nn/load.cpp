// From the tensors of a checkpoint folder to a model: every parameter is filled by name, and none is left over.

#include <glam/load.h>
#include <torch/torch.h>

#include <sstream>

#include "nn/inference.h"

namespace glam {
namespace {

[[noreturn]] void refuse(const std::filesystem::path& folder, const std::string& what) {
  throw CheckpointError(folder.string() + ": " + what +
                        "; its tensors and its config.json do not belong together, use another checkpoint or copy this "
                        "one again from its source");
}

std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  text << tensor.scalar_type() << " " << tensor.sizes();
  return text.str();
}

}  // namespace

nn::GLaM load_model(const std::filesystem::path& path, Verify verify, std::optional<torch::ScalarType> inference) {
  const CheckpointFolder folder = open_checkpoint(path, verify);
  if (inference) nn::check_can_be_prepared(folder.config, *inference);
  TensorMap tensors = load_tensors(folder, "model");
  nn::GLaM model(folder.config, /*seed=*/std::nullopt);  // memory that nobody has touched yet
  const torch::NoGradGuard no_grad;
  for (const auto& item : model->named_parameters()) {
    const auto& name = item.key();
    at::Tensor parameter = item.value();
    const auto found = tensors.find(name);
    if (found == tensors.end()) refuse(folder.path, "expected a tensor " + name + ", found none");
    if (found->second.scalar_type() != parameter.scalar_type() || found->second.sizes() != parameter.sizes()) {
      refuse(folder.path,
             "expected tensor " + name + " to be " + describe(parameter) + ", got " + describe(found->second));
    }
    // A tensor that stays as it is must not keep the file mapped.
    const at::Tensor values = inference ? nn::prepared(name, found->second, *inference) : found->second;
    if (values.is_same(found->second)) {
      parameter.copy_(values);
      parameter.requires_grad_(!inference);
    } else {
      nn::replace(parameter, values);
    }
    tensors.erase(found);
  }
  if (!tensors.empty()) {
    refuse(folder.path, "expected no tensor " + tensors.begin()->first + ", which the configuration does not have");
  }
  model->eval();
  return model;
}

}  // namespace glam
