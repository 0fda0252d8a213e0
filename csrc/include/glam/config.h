// GLaMConfig: every choice that makes a GLaM model, with its JSON form, its validation and its parameter count.
//
// Letters: V vocabulary, L layers, D model dim, F hidden dim, H heads, A head dim, E experts, S tokens of a group.
// The Python dataclass glam_ext.GLaMConfig has the same fields in the same order and validates through this file.
// Sources: GLaM (arXiv 2112.06905), table 4 for the presets; google/praxis glam.py and tensorflow/lingvo
// gshard_builder.py for the defaults that the paper leaves open.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace glam {

struct GLaMConfig {
  int64_t vocab_size = 256000;  // the paper's text; the small rows of its table 4 were counted with 32,000
  // Required, hence invalid until set.
  int64_t num_layers = 0;
  int64_t model_dim = 0;
  int64_t hidden_dim = 0;  // of the dense feed-forward and of every expert alike
  int64_t num_heads = 0;
  int64_t head_dim = 0;     // num_heads * head_dim need not equal model_dim: it is twice as wide in 64B/64E
  int64_t num_experts = 0;  // 0 or 1: the dense model
  bool moe_first = true;    // experts in layers 0, 2, 4, ...; false: in 1, 3, 5, ...
  std::string expert_activation = "relu";  // relu | gelu | geglu (adds a third matrix, wg)
  bool tie_embedding = true;
  bool attention_extra_logit = true;  // one more logit, 0, in every attention softmax ("softmax plus one")
  double attention_logit_cap = 0.;    // c * tanh(x / c); 0: none
  double logit_cap = 0.;              // the same on the output logits
  double z_loss = 1e-4;               // times logsumexp(logits)^2; the public builders', not in the paper's text
  double label_smoothing = 0.;
  double norm_eps = 1e-6;
  std::string second_policy = "all";           // all | random | sampling: how the second expert is chosen
  double second_threshold = 0.;                // of the random policy; 0.5 keeps the second with probability 2 * gate
  bool normalize_before_capacity = true;       // gates sum to 1 before over-capacity choices are dropped
  double capacity_factor = 2.;                 // slots per token while training; <= 0: nothing is dropped
  std::optional<double> eval_capacity_factor;  // unset: nothing is dropped, as capped routing is not causal
  int64_t group_size = 0;                      // 0: one sequence; -1: the whole micro-batch; otherwise tokens
  double aux_loss_weight = 0.01;
  std::string aux_loss_reduction = "sum";  // sum | mean over the MoE layers
  double router_z_loss = 0.;
  double router_jitter = 0.;
  double router_logit_cap = 0.;
  std::string compute_dtype = "bfloat16";  // bfloat16 | float32; parameters are float32 either way
  bool recompute = false;                  // recompute the activations of a layer in its backward

  // One of preset_names(). Throws std::invalid_argument for another name.
  static GLaMConfig preset(const std::string& name);
  // Optional keys may be absent. An unknown or repeated key, a wrong type or an impossible value throws
  // std::invalid_argument with the key and the fix; so does text that is not JSON.
  static GLaMConfig from_json(const std::string& text);
  // All fields in the order above; indent < 0 gives one line.
  std::string to_json(int indent = -1) const;
  // The one validation of both languages. Throws std::invalid_argument with the key and the fix.
  void validate() const;

  bool is_moe_layer(int64_t layer) const;
  int64_t num_moe_layers() const;
  // Slots of one expert in a routing group of group_size tokens, padding counted; -1: nothing is dropped.
  int64_t capacity(int64_t group_size, bool training) const;

  bool operator==(const GLaMConfig&) const = default;
};

// "tiny", "debug", then the eleven rows of table 4 by their printed names, "0.1B" to "64B/64E".
const std::vector<std::string>& preset_names();

// Parameters by part. `total` is the sum of the parts; `active` counts two experts per MoE layer instead of E.
struct ParameterCount {
  int64_t total = 0;
  int64_t active = 0;
  int64_t attention = 0;      // q, k, v, o
  int64_t dense_ffn = 0;      // gated: three matrices
  int64_t experts = 0;        // not gated: two matrices per expert (three for geglu)
  int64_t router = 0;         // wholly active
  int64_t embedding = 0;      // once if tied, twice if not
  int64_t norms = 0;          // two per layer and the final one
  int64_t relative_bias = 0;  // [H, 32] per layer
};

// Arithmetic only: nothing is allocated.
ParameterCount count_parameters(const GLaMConfig& config);

}  // namespace glam
