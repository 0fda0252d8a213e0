// GLaMConfig: presets, JSON, validation and the two rules derived from it (which layers have experts, capacity).
//
// The fields are listed once, in visit_fields; reading and writing walk that list. nlohmann/json stays in this file.
// Capacity: c = int(S * factor / E), at least 1, rounded up to a multiple of 4 when above 1 (praxis gshard_utils.py).

#include "glam/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <stdexcept>
#include <type_traits>

#include "io/strict_json.h"

namespace glam {
namespace {

using Json = nlohmann::ordered_json;

// Ids and per-dimension sizes are int32 in the ops.
constexpr int64_t kLargestSize = std::numeric_limits<int32_t>::max();
constexpr int64_t kCapacityMultiple = 4;

template <class Config, class Visitor>
void visit_fields(Config& config, Visitor&& field) {
  field("vocab_size", config.vocab_size);
  field("num_layers", config.num_layers);
  field("model_dim", config.model_dim);
  field("hidden_dim", config.hidden_dim);
  field("num_heads", config.num_heads);
  field("head_dim", config.head_dim);
  field("num_experts", config.num_experts);
  field("moe_first", config.moe_first);
  field("expert_activation", config.expert_activation);
  field("tie_embedding", config.tie_embedding);
  field("attention_extra_logit", config.attention_extra_logit);
  field("attention_logit_cap", config.attention_logit_cap);
  field("logit_cap", config.logit_cap);
  field("z_loss", config.z_loss);
  field("label_smoothing", config.label_smoothing);
  field("norm_eps", config.norm_eps);
  field("second_policy", config.second_policy);
  field("second_threshold", config.second_threshold);
  field("normalize_before_capacity", config.normalize_before_capacity);
  field("capacity_factor", config.capacity_factor);
  field("eval_capacity_factor", config.eval_capacity_factor);
  field("group_size", config.group_size);
  field("aux_loss_weight", config.aux_loss_weight);
  field("aux_loss_reduction", config.aux_loss_reduction);
  field("router_z_loss", config.router_z_loss);
  field("router_jitter", config.router_jitter);
  field("router_logit_cap", config.router_logit_cap);
  field("compute_dtype", config.compute_dtype);
  field("recompute", config.recompute);
}

constexpr std::array kRequiredKeys = {"num_layers", "model_dim", "hidden_dim", "num_heads", "head_dim"};

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument("glam::GLaMConfig: " + message); }

// A value as it stood in the JSON, cut so that a message stays readable.
std::string shown(const Json& value) {
  constexpr size_t kLongest = 60;
  const std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  return text.size() <= kLongest ? text : text.substr(0, kLongest) + "...";
}

[[noreturn]] void fail_type(const std::string& key, const char* type, const char* example, const Json& value) {
  fail("expected " + key + " to be " + type + ", got " + shown(value) + "; write it like " + example);
}

bool is_count(const Json& value) {
  if (value.is_number_unsigned()) return value.get<uint64_t>() <= std::numeric_limits<int64_t>::max();
  return value.is_number_integer();
}

void read(const std::string& key, const Json& value, int64_t& field) {
  if (!is_count(value)) fail_type(key, "an integer", "64", value);
  field = value.get<int64_t>();
}
void read(const std::string& key, const Json& value, double& field) {
  if (!value.is_number()) fail_type(key, "a finite number", "0.5", value);
  field = value.get<double>();
}
void read(const std::string& key, const Json& value, std::optional<double>& field) {
  if (value.is_null()) {
    field.reset();
    return;
  }
  if (!value.is_number()) fail_type(key, "a finite number or null", "2.0", value);
  field = value.get<double>();
}
void read(const std::string& key, const Json& value, bool& field) {
  if (!value.is_boolean()) fail_type(key, "a boolean", "true", value);
  field = value.get<bool>();
}
void read(const std::string& key, const Json& value, std::string& field) {
  if (!value.is_string()) fail_type(key, "a string", "\"relu\"", value);
  field = value.get<std::string>();
}

size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row.back();
}

std::vector<std::string> field_names() {
  std::vector<std::string> names;
  const GLaMConfig config;
  visit_fields(config, [&](const char* name, const auto&) { names.emplace_back(name); });
  return names;
}

[[noreturn]] void fail_unknown_key(const std::string& key) {
  const std::vector<std::string> names = field_names();
  const auto nearest = std::min_element(names.begin(), names.end(), [&](const auto& a, const auto& b) {
    return edit_distance(key, a) < edit_distance(key, b);
  });
  if (edit_distance(key, *nearest) <= std::max<size_t>(2, key.size() / 3)) {
    fail("unknown key " + shown(Json(key)) + "; did you mean " + *nearest + "?");
  }
  std::string known;
  for (const std::string& name : names) known += (known.empty() ? "" : ", ") + name;
  fail("unknown key " + shown(Json(key)) + "; remove it, the keys are " + known);
}

Json parse_object(const std::string& text) {
  Json object;
  try {
    object = parse_strict_json<Json>(text);
  } catch (const std::invalid_argument& error) {
    fail(error.what());
  }
  if (!object.is_object()) fail("expected a JSON object of configuration keys, got " + shown(object));
  return object;
}

std::string number(double value) { return Json(value).dump(); }

void check_at_least(const char* key, int64_t value, int64_t least) {
  if (value >= least && value <= kLargestSize) return;
  fail(std::string("expected ") + key + " to be between " + std::to_string(least) + " and " +
       std::to_string(kLargestSize) + ", got " + std::to_string(value) + "; set " + key + " in that range");
}

void check_non_negative(const char* key, double value, const char* zero_means) {
  if (std::isfinite(value) && value >= 0.) return;
  fail(std::string("expected ") + key + " to be finite and at least 0, got " + number(value) + "; use 0 for " +
       zero_means);
}

void check_fraction(const char* key, double value) {
  if (value >= 0. && value < 1.) return;  // also refuses NaN
  fail(std::string("expected ") + key + " to be at least 0 and below 1, got " + number(value) + "; use 0 for none");
}

void check_choice(const char* key, const std::string& value, const std::vector<std::string>& choices) {
  if (std::find(choices.begin(), choices.end(), value) != choices.end()) return;
  std::string listed;
  for (const std::string& choice : choices) listed += (listed.empty() ? "\"" : ", \"") + choice + "\"";
  fail(std::string("expected ") + key + " to be one of " + listed + ", got " + shown(Json(value)));
}

// The exact counts are int64, so a model beyond that is refused before anything multiplies.
void check_countable(const GLaMConfig& config) {
  const auto real = [](int64_t value) { return static_cast<long double>(value); };
  const long double ffn =
      3 * real(config.model_dim) * real(config.hidden_dim) * std::max(real(config.num_experts), 1.L);
  const long double attention = 4 * real(config.model_dim) * real(config.num_heads) * real(config.head_dim);
  const long double router_and_bias =
      real(config.model_dim) * (real(config.num_experts) + 3) + 32 * real(config.num_heads);
  const long double total = real(config.num_layers) * (ffn + attention + router_and_bias) +
                            2 * real(config.vocab_size) * real(config.model_dim);
  if (total < 9e18L) return;
  fail("expected fewer than 9e18 parameters; reduce num_layers, model_dim, hidden_dim, num_experts or vocab_size");
}

struct Table4Row {
  const char* name;
  int64_t num_layers, model_dim, hidden_dim, num_heads, head_dim, num_experts;
};

constexpr std::array<Table4Row, 11> kTable4 = {{
    {"0.1B", 12, 768, 3072, 12, 64, 0},
    {"0.1B/64E", 12, 768, 3072, 12, 64, 64},
    {"1.7B", 24, 2048, 8192, 16, 128, 0},
    {"1.7B/32E", 24, 2048, 8192, 16, 128, 32},
    {"1.7B/64E", 24, 2048, 8192, 16, 128, 64},
    {"1.7B/128E", 24, 2048, 8192, 16, 128, 128},
    {"1.7B/256E", 24, 2048, 8192, 16, 128, 256},
    {"8B", 32, 4096, 16384, 32, 128, 0},
    {"8B/64E", 32, 4096, 16384, 32, 128, 64},
    {"137B", 64, 8192, 65536, 128, 128, 0},
    {"64B/64E", 64, 8192, 32768, 128, 128, 64},
}};

}  // namespace

GLaMConfig GLaMConfig::from_json(const std::string& text) {
  const Json object = parse_object(text);
  GLaMConfig config;
  std::set<std::string> known;
  visit_fields(config, [&](const char* name, auto& field) {
    known.insert(name);
    if (const auto found = object.find(name); found != object.end()) read(name, *found, field);
  });
  for (const auto& [key, value] : object.items()) {
    if (!known.count(key)) fail_unknown_key(key);
  }
  for (const char* key : kRequiredKeys) {
    if (!object.contains(key)) fail(std::string("key ") + key + " is missing; it has no default, set it");
  }
  config.validate();
  return config;
}

std::string GLaMConfig::to_json(int indent) const {
  Json object = Json::object();
  visit_fields(*this, [&](const char* name, const auto& field) {
    if constexpr (std::is_same_v<std::decay_t<decltype(field)>, std::optional<double>>) {
      object[name] = field ? Json(*field) : Json(nullptr);
    } else {
      object[name] = field;
    }
  });
  return object.dump(indent);
}

void GLaMConfig::validate() const {
  check_at_least("vocab_size", vocab_size, 2);
  check_at_least("num_layers", num_layers, 1);
  check_at_least("model_dim", model_dim, 1);
  check_at_least("hidden_dim", hidden_dim, 1);
  check_at_least("num_heads", num_heads, 1);
  check_at_least("head_dim", head_dim, 1);
  check_at_least("num_experts", num_experts, 0);
  check_countable(*this);
  if (num_experts > 1 && num_moe_layers() == 0) {
    fail(
        "expected num_layers to be at least 2 when moe_first is false, got 1, which leaves no layer with experts; "
        "set moe_first = true or num_experts = 0");
  }
  check_choice("expert_activation", expert_activation, {"relu", "gelu", "geglu"});
  check_non_negative("attention_logit_cap", attention_logit_cap, "no cap");
  check_non_negative("logit_cap", logit_cap, "no cap");
  check_non_negative("z_loss", z_loss, "none");
  check_fraction("label_smoothing", label_smoothing);
  if (!(norm_eps > 0. && std::isfinite(norm_eps))) {
    fail("expected norm_eps to be finite and above 0, got " + number(norm_eps) + "; the usual value is 1e-6");
  }
  check_choice("second_policy", second_policy, {"all", "random", "sampling"});
  check_non_negative("second_threshold", second_threshold, "always keeping the second expert");
  if (second_threshold > 0. && second_policy != "random") {
    fail("expected second_threshold to be 0 when second_policy is \"" + second_policy + "\", got " +
         number(second_threshold) + "; only second_policy = \"random\" uses it");
  }
  if (!std::isfinite(capacity_factor)) {
    fail("expected capacity_factor to be finite, got " + number(capacity_factor) + "; use 0 to drop nothing");
  }
  if (eval_capacity_factor && !std::isfinite(*eval_capacity_factor)) {
    fail("expected eval_capacity_factor to be finite, got " + number(*eval_capacity_factor) +
         "; leave it unset to drop nothing");
  }
  if (group_size < -1) {
    fail("expected group_size to be -1 (the whole micro-batch), 0 (one sequence) or a number of tokens, got " +
         std::to_string(group_size));
  }
  check_non_negative("aux_loss_weight", aux_loss_weight, "none");
  check_choice("aux_loss_reduction", aux_loss_reduction, {"sum", "mean"});
  check_non_negative("router_z_loss", router_z_loss, "none");
  check_fraction("router_jitter", router_jitter);
  check_non_negative("router_logit_cap", router_logit_cap, "no cap");
  check_choice("compute_dtype", compute_dtype, {"bfloat16", "float32"});
}

GLaMConfig GLaMConfig::preset(const std::string& name) {
  const auto made = [](const Table4Row& row) {
    GLaMConfig config;
    config.num_layers = row.num_layers;
    config.model_dim = row.model_dim;
    config.hidden_dim = row.hidden_dim;
    config.num_heads = row.num_heads;
    config.head_dim = row.head_dim;
    config.num_experts = row.num_experts;
    return config;
  };
  for (const Table4Row& row : kTable4) {
    if (name == row.name) return made(row);
  }
  if (name == "tiny" || name == "debug") {
    GLaMConfig config = name == "tiny" ? made({"tiny", 2, 64, 256, 4, 16, 4}) : made({"debug", 4, 256, 1024, 4, 64, 8});
    config.vocab_size = name == "tiny" ? 512 : 4096;
    return config;
  }
  std::string listed;
  for (const std::string& known : preset_names()) listed += (listed.empty() ? "\"" : ", \"") + known + "\"";
  fail("unknown preset " + shown(Json(name)) + "; the presets are " + listed);
}

bool GLaMConfig::is_moe_layer(int64_t layer) const { return num_experts > 1 && layer % 2 == (moe_first ? 0 : 1); }

int64_t GLaMConfig::num_moe_layers() const {
  if (num_experts <= 1) return 0;
  return moe_first ? (num_layers + 1) / 2 : num_layers / 2;
}

int64_t GLaMConfig::capacity(int64_t group_size, bool training) const {
  const double factor = training ? capacity_factor : eval_capacity_factor.value_or(0.);
  if (num_experts <= 1 || factor <= 0.) return -1;
  const double exact = static_cast<double>(group_size) * factor / static_cast<double>(num_experts);
  const auto slots = static_cast<int64_t>(std::min(exact, static_cast<double>(kLargestSize - kCapacityMultiple)));
  if (slots <= 1) return 1;
  return (slots + kCapacityMultiple - 1) / kCapacityMultiple * kCapacityMultiple;
}

const std::vector<std::string>& preset_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all = {"tiny", "debug"};
    for (const Table4Row& row : kTable4) all.emplace_back(row.name);
    return all;
  }();
  return names;
}

}  // namespace glam
