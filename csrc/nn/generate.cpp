#include <glam/generate.h>
#include <glam/ops.h>
#include <torch/torch.h>

namespace glam {
namespace {

using torch::Tensor;

void check(const Tensor& prompts, const Tensor& lengths, const GenerateOptions& options) {
  constexpr auto kName = "glam::generate";
  TORCH_CHECK(prompts.dim() == 2 && prompts.scalar_type() == torch::kLong, kName,
              ": expected prompts to be Long [B, N], got ", prompts.scalar_type(), " ", prompts.sizes());
  TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == prompts.size(0) && lengths.scalar_type() == torch::kInt, kName,
              ": expected lengths to be Int [B] with B = ", prompts.size(0), ", got ", lengths.scalar_type(), " ",
              lengths.sizes());
  TORCH_CHECK(lengths.numel() == 0 || (lengths.min().item<int>() >= 1 && lengths.max().item<int>() <= prompts.size(1)),
              kName, ": expected lengths in [1, N] with N = ", prompts.size(1), ", got ", lengths);
  TORCH_CHECK(options.max_new_tokens >= 0, kName, ": expected max_new_tokens >= 0, got ", options.max_new_tokens);
}

}  // namespace

Generated generate(nn::GLaM& model, const Tensor& prompts, const Tensor& lengths, const GenerateOptions& options) {
  check(prompts, lengths, options);
  const torch::NoGradGuard no_grad;
  const int64_t batch = prompts.size(0);
  const auto cache = model->init_cache(batch, prompts.size(1) + options.max_new_tokens);
  const Tensor stop = torch::tensor(options.stop_tokens, prompts.options());
  // Row b draws from counters (b, i) of the seed: its tokens do not depend on the other rows.
  const Tensor rows = torch::arange(batch, prompts.options()) * (int64_t{1} << 32);
  Generated out{torch::zeros({batch, options.max_new_tokens}, prompts.options()), torch::zeros_like(lengths)};
  Tensor finished = torch::zeros({batch}, prompts.options().dtype(torch::kBool));
  Tensor positions = torch::zeros_like(lengths), current = prompts, current_lengths = lengths;
  for (int64_t i = 0; i < options.max_new_tokens; ++i) {
    const Tensor logits = model->step(current, cache, positions, current_lengths);
    const Tensor uniform = counter_uniform(options.seed, 0, rows + i);
    Tensor chosen = sample_logits(logits, uniform, options.temperature, options.top_k, options.top_p);
    chosen = torch::where(finished, torch::zeros_like(chosen), chosen);
    out.tokens.select(1, i).copy_(chosen);
    out.counts += finished.logical_not().to(out.counts.scalar_type());
    finished = finished | torch::isin(chosen, stop);
    if (options.on_step && !options.on_step(chosen)) break;
    if (finished.all().item<bool>()) break;
    positions = torch::where(finished, torch::full_like(lengths, -1), lengths + i);
    current_lengths = torch::ones_like(lengths);
    current = chosen.unsqueeze(1);
  }
  return out;
}

}  // namespace glam
