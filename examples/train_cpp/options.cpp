#include "options.h"

#include <glam/build_info.h>

#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>

#include "numbers.h"

namespace {

template <class Number>
Number parse_number(const std::string& option, const std::string& text) {
  if (const auto number = to_number<Number>(text)) return *number;
  throw std::invalid_argument("expected a number after " + option + ", got \"" + text + "\"");
}

glam::GLaMConfig read_config(const std::string& file) {
  std::ifstream stream(file);
  std::ostringstream text;
  text << stream.rdbuf();
  if (!stream) throw std::invalid_argument(file + ": cannot be read; check the path");
  return glam::GLaMConfig::from_json(text.str());
}

void check(const Options& options) {
  const auto require = [](bool holds, const char* expected) {
    if (!holds) throw std::invalid_argument(std::string("expected ") + expected + "; see --help");
  };
  require(!options.data.empty(), "a token folder");
  require(options.steps >= 0, "--steps to be at least 0");
  require(options.batch_size >= 1, "--batch-size to be at least 1");
  require(options.micro_batch_size >= 0, "--micro-batch-size to be at least 0");
  require(options.log_interval >= 1, "--log-interval to be at least 1");
  require(options.multiplier > 0, "--multiplier to be above 0");
  require(options.constant_steps >= 1, "--constant-steps to be at least 1");
  require(options.min_factored >= 1, "--min-factored to be at least 1");
  require(options.clip_norm >= 0, "--clip-norm to be at least 0");
  require(options.threads >= 0, "--threads to be at least 0");
}

}  // namespace

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  options.config = glam::GLaMConfig::preset("tiny");
  using Take = std::function<void(const std::string& option, const std::string& value)>;
  const auto number = [](auto& target) -> Take {
    return [&target](const std::string& option, const std::string& value) {
      target = parse_number<std::remove_reference_t<decltype(target)>>(option, value);
    };
  };
  const std::map<std::string, Take> takes = {
      {"--preset", [&](auto&, auto& name) { options.config = glam::GLaMConfig::preset(name); }},
      {"--config", [&](auto&, auto& file) { options.config = read_config(file); }},
      {"--out", [&](auto&, auto& folder) { options.out = folder; }},
      {"--steps", number(options.steps)},
      {"--batch-size", number(options.batch_size)},
      {"--micro-batch-size", number(options.micro_batch_size)},
      {"--seed", number(options.seed)},
      {"--expert", number(options.expert)},
      {"--exchange-chunks", number(options.exchange_chunks)},
      {"--multiplier", number(options.multiplier)},
      {"--constant-steps", number(options.constant_steps)},
      {"--min-factored", number(options.min_factored)},
      {"--clip-norm", number(options.clip_norm)},
      {"--log-interval", number(options.log_interval)},
      {"--threads", number(options.threads)},
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      options.help = true;
      return options;
    }
    if (const auto found = takes.find(argument); found != takes.end()) {
      if (i + 1 == arguments.size()) throw std::invalid_argument("expected a value after " + argument);
      found->second(argument, arguments[++i]);
    } else if (argument.starts_with("-") || !options.data.empty()) {
      throw std::invalid_argument("unknown argument " + argument + "; see --help");
    } else {
      options.data = argument;
    }
  }
  check(options);
  return options;
}

std::string usage() {
  const auto info = glam::build_info();
  std::ostringstream text;
  text << R"(usage: train DATA [options]

Trains a GLaM on a token folder (glam prepare), alone or as one of several processes: RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT say which, as torchrun --no-python sets them.
  --preset NAME (tiny)   --config FILE         a configuration as JSON, such as the config.json of a checkpoint
  --steps N (200)        --batch-size B (16)   rows of all processes       --seed N (0)
  --micro-batch-size M   rows of one forward pass (all of a process)
  --multiplier X (1)     --constant-steps N (10000)   X / sqrt(max(step, N)) is Adafactor's learning rate
  --min-factored N (128) of both sides of a matrix whose second moments are factored
  --clip-norm X (none)   of the whole gradient
  --expert P (1)         processes over which the experts are spread       --exchange-chunks N (1)
  --out FOLDER           writes the trained weights as a checkpoint folder
  --log-interval N (20)  --threads N           of one process, 0: as torch decides (0)

)";
  text << "glam_ext " << info.version << ", torch " << info.torch_version << ", instruction set " << info.isa_active
       << ", " << info.num_threads << " threads\n";
  return text.str();
}
