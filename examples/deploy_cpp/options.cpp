#include "options.h"

#include <glam/build_info.h>

#include <charconv>
#include <sstream>
#include <stdexcept>

#include "text.h"

namespace {

template <class Number>
Number parse_number(const std::string& option, const std::string& text) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) {
    throw std::invalid_argument("expected a number after " + option + ", got \"" + text + "\"");
  }
  return number;
}

std::vector<int64_t> parse_tokens(const std::string& option, const std::string& text) {
  std::vector<int64_t> tokens;
  std::istringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) tokens.push_back(parse_number<int64_t>(option, item));
  if (tokens.empty()) throw std::invalid_argument("expected token ids such as 5,6,7 after " + option + ", got none");
  return tokens;
}

std::optional<torch::ScalarType> parse_weights(const std::string& text) {
  if (text == "float32") return std::nullopt;
  if (text == "bfloat16") return torch::kBFloat16;
  if (text == "int8") return torch::kChar;
  throw std::invalid_argument("expected float32, bfloat16 or int8 after --weights, got \"" + text + "\"");
}

void check(const Options& options) {
  const auto require = [](bool holds, const char* expected) {
    if (!holds) throw std::invalid_argument(std::string("expected ") + expected + "; see --help");
  };
  require(!options.model.empty(), "an archive or a checkpoint folder");
  require(options.prompt.has_value() != !options.tokens.empty(), "either --prompt or --tokens");
  require(options.threads >= 0, "--threads to be at least 0");
  require(options.generate.max_new_tokens >= 0, "--max-new-tokens to be at least 0");
  require(options.generate.temperature >= 0, "--temperature to be at least 0");
  require(options.generate.top_k >= 0, "--top-k to be at least 0");
  require(options.generate.top_p > 0 && options.generate.top_p <= 1, "--top-p to be in (0, 1]");
}

}  // namespace

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& option = arguments[i];
    const auto value = [&]() -> const std::string& {
      if (i + 1 == arguments.size()) throw std::invalid_argument("expected a value after " + option);
      return arguments[++i];
    };
    if (option == "--help" || option == "-h") {
      options.help = true;
      return options;
    } else if (option == "--tokenizer") {
      options.tokenizer = value();
    } else if (option == "--prompt") {
      options.prompt = value();
    } else if (option == "--tokens") {
      options.tokens.push_back(parse_tokens(option, value()));
    } else if (option == "--max-new-tokens") {
      options.generate.max_new_tokens = parse_number<int64_t>(option, value());
    } else if (option == "--temperature") {
      options.generate.temperature = parse_number<double>(option, value());
    } else if (option == "--top-k") {
      options.generate.top_k = parse_number<int64_t>(option, value());
    } else if (option == "--top-p") {
      options.generate.top_p = parse_number<double>(option, value());
    } else if (option == "--seed") {
      options.generate.seed = parse_number<int64_t>(option, value());
    } else if (option == "--logits") {
      options.logits = value();
    } else if (option == "--weights") {
      options.weights = parse_weights(value());
    } else if (option == "--threads") {
      options.threads = parse_number<int>(option, value());
    } else if (option.starts_with("-") || !options.model.empty()) {
      throw std::invalid_argument("unknown argument " + option + "; see --help");
    } else {
      options.model = option;
    }
  }
  check(options);
  return options;
}

std::string usage() {
  const auto info = glam::build_info();
  std::ostringstream text;
  text << R"(usage: deploy MODEL (--prompt TEXT | --tokens 5,6,7 [--tokens ...]) [options]

Continues a prompt. MODEL is a TorchScript archive (glam export), a checkpoint folder or a run folder.
  --prompt TEXT         prints TEXT and what follows it
  --tokens 5,6,7        prints the ids that follow; given several times, a batch with a line for each
  --tokenizer FILE      a tokenizer.model; by default the one inside the archive
  --max-new-tokens N    (128)          --temperature X   0: the likeliest token (1)
  --top-k K             0: all (0)     --top-p P         1: all (1)      --seed N   (0)
  --logits FILE         writes the logits after each row's last token: float32 [rows, vocabulary]
  --weights W           of a folder's model: float32, or packed in bfloat16 or int8 (float32)
  --threads N           of one computation, 0: as torch decides (0)

)";
  text << "glam_ext " << info.version << ", torch " << info.torch_version << ", instruction set " << info.isa_active
       << ", " << info.num_threads << " threads; " << describe_text() << "\n";
  return text.str();
}
