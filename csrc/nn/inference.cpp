#include "nn/inference.h"

#include <glam/ops.h>
#include <torch/torch.h>

#include <array>
#include <string_view>

#include "ops/packed_layout.h"

namespace glam::nn {
namespace {

constexpr auto kName = "glam::GLaM.prepare_for_inference";
constexpr std::array<std::string_view, 3> kStay = {".scale", ".relative_bias", ".router"};

bool is_table(std::string_view name) { return name == "embedding.weight" || name == "output.weight"; }

}  // namespace

void check_can_be_prepared(const GLaMConfig& config, torch::ScalarType dtype) {
  TORCH_CHECK_VALUE(dtype == torch::kBFloat16 || dtype == torch::kChar, kName,
                    ": expected dtype to be bfloat16 or int8, got ", dtype);
  const std::pair<const char*, int64_t> widths[] = {{"model_dim", config.model_dim},
                                                    {"hidden_dim", config.hidden_dim},
                                                    {"num_heads * head_dim", config.num_heads * config.head_dim}};
  for (const auto& [name, width] : widths) {
    TORCH_CHECK_VALUE(width % kStripColumns == 0, kName, ": expected ", name, " to be a multiple of ", kStripColumns,
                      ", got ", width, "; a model of such widths can run in bfloat16 by .to(torch::kBFloat16)");
  }
}

Tensor prepared(const std::string& name, const Tensor& plain, torch::ScalarType dtype) {
  for (const std::string_view end : kStay) {
    if (name.ends_with(end)) return plain;
  }
  if (!is_table(name)) return pack_weight(plain, dtype);
  return plain.size(0) % kStripColumns == 0 ? pack_weight(plain.t(), dtype) : plain.to(torch::kBFloat16);
}

void replace(Tensor parameter, const Tensor& values) {
  parameter.requires_grad_(false);
  parameter.mutable_grad().reset();
  parameter.set_data(values);
}

bool GLaMImpl::is_prepared() const { return layers_->ptr<BlockImpl>(0)->attention->q.dim() == 3; }

void GLaMImpl::prepare_for_inference(torch::ScalarType dtype) {
  check_can_be_prepared(config_, dtype);
  TORCH_CHECK(!is_prepared(), kName, ": expected plain weights, got a model that is prepared already");
  TORCH_CHECK(parallel_.group.empty(), kName,
              ": expected a model that holds all experts, got one of an expert-parallel "
              "group; load its checkpoint in one process");
  const Tensor& table = embedding_->weight;
  TORCH_CHECK(
      table.device().is_cpu() && (table.scalar_type() == torch::kFloat || table.scalar_type() == torch::kBFloat16),
      kName, ": expected Float or BFloat16 parameters on the CPU, got ", table.scalar_type(), " on ", table.device());
  const torch::NoGradGuard no_grad;
  for (const auto& item : named_parameters()) replace(item.value(), prepared(item.key(), item.value().detach(), dtype));
  eval();
}

}  // namespace glam::nn
