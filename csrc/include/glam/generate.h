// Sampling from a GLaM with a key-value cache, without Python. The same tokens as glam_ext.generate and as the exported
// archive's generate method give for the same inputs.
#pragma once

#include <glam/nn.h>

#include <functional>
#include <vector>

namespace glam {

struct GenerateOptions {
  int64_t max_new_tokens = 64;
  double temperature = 1.;  // 0: greedy
  int64_t top_k = 0;        // 0: all
  double top_p = 1.;
  int64_t seed = 0;
  std::vector<int64_t> stop_tokens = {1};  // the end-of-text token of the tokenizer
  // Called after each step with the new tokens int64 [B] (0 in finished rows); returning false ends the generation.
  std::function<bool(const torch::Tensor& tokens)> on_step;
};

struct Generated {
  torch::Tensor tokens;  // int64 [B, max_new_tokens], 0 after a row's end
  torch::Tensor counts;  // int32 [B]: how many each row has, its stop token included
};

// prompts int64 [B, N], padded on the right; lengths int32 [B], each in [1, N]. Runs without gradients, as inference
// whatever the model's mode. Throws c10::Error for a prompt of length 0, a negative temperature, or top_p outside (0, 1].
Generated generate(nn::GLaM& model, const torch::Tensor& prompts, const torch::Tensor& lengths,
                   const GenerateOptions& options = {});

}  // namespace glam
