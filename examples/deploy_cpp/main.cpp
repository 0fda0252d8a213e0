// Generates with a GLaM from a C++ program, in the two ways a model comes: a TorchScript archive, whose methods are
// called by name, and a checkpoint folder, which fills the native module tree. Both give the same bits as Python.
//
// Letters: B rows (prompts), N positions of the longest prompt, V vocabulary.

#include <glam/checkpoint.h>
#include <glam/export.h>
#include <glam/generate.h>
#include <glam/load.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>

#include "options.h"
#include "text.h"

namespace {

using torch::Tensor;

constexpr int64_t kBeginOfText = 2;

// What this program needs of a model, however it came.
struct Model {
  glam::GLaMConfig config;
  std::function<glam::Generated(const Tensor& prompts, const Tensor& lengths, const glam::GenerateOptions&)> generate;
  std::function<Tensor(const Tensor& tokens)> forward;  // int64 [B, N] -> float32 [B, N, V]
  std::string tokenizer;                                // bytes of a tokenizer.model, or empty
  std::string tokenizer_facts;                          // JSON with the hash of the right tokenizer, or empty
};

Model from_archive(const std::filesystem::path& file) {
  auto archive = glam::load_archive(file, {"tokenizer.model", "tokenizer.json"});
  const torch::jit::Module module = archive.module;
  return {.config = archive.config,
          .generate =
              [module](const Tensor& prompts, const Tensor& lengths, const glam::GenerateOptions& options) {
                const c10::List<int64_t> stop(options.stop_tokens);
                const auto out =
                    module.get_method("generate")({prompts, lengths, options.max_new_tokens, options.temperature,
                                                   options.top_k, options.top_p, options.seed, stop});
                const auto& parts = out.toTupleRef().elements();
                return glam::Generated{parts[0].toTensor(), parts[1].toTensor()};
              },
          .forward = [module](const Tensor& tokens) { return module.get_method("forward")({tokens}).toTensor(); },
          .tokenizer = archive.extra_files["tokenizer.model"],
          .tokenizer_facts = archive.extra_files["tokenizer.json"]};
}

Model from_folder(const std::filesystem::path& path, std::optional<torch::ScalarType> weights) {
  const auto folder = glam::open_checkpoint(path);
  // Its hashes have just been compared.
  glam::nn::GLaM model = glam::load_model(folder.path, glam::Verify::kSizes, weights);
  return {.config = model->config(),
          .generate =
              [model](const Tensor& prompts, const Tensor& lengths, const glam::GenerateOptions& options) mutable {
                return glam::generate(model, prompts, lengths, options);
              },
          .forward = [model](const Tensor& tokens) mutable { return model->forward(tokens); },
          .tokenizer = "",
          .tokenizer_facts = glam::load_trainer_json(folder)};
}

std::string read_file(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (!stream.is_open() || stream.bad()) throw std::runtime_error(file + ": cannot be read; check the path");
  return bytes;
}

std::unique_ptr<Text> text_for(const Options& options, const Model& model) {
  if (options.tokenizer.empty() && model.tokenizer.empty()) {
    throw std::runtime_error("expected --tokenizer FILE with --prompt: the model does not carry its tokenizer");
  }
  return load_text(options.tokenizer.empty() ? model.tokenizer : read_file(options.tokenizer), model.tokenizer_facts);
}

void check_tokens(const std::vector<std::vector<int64_t>>& rows, int64_t vocab_size) {
  for (const auto& row : rows) {
    for (const int64_t token : row) {
      if (token >= 0 && token < vocab_size) continue;
      throw std::runtime_error("expected token ids in [0, " + std::to_string(vocab_size) + "), got " +
                               std::to_string(token));
    }
  }
}

// Appends to each row what the model says next.
void generate(const Model& model, const glam::GenerateOptions& options, std::vector<std::vector<int64_t>>& rows) {
  size_t longest = 0;
  for (const auto& row : rows) longest = std::max(longest, row.size());
  const auto B = static_cast<int64_t>(rows.size()), N = static_cast<int64_t>(longest);
  const Tensor prompts = torch::zeros({B, N}, torch::kLong), lengths = torch::zeros({B}, torch::kInt);
  for (size_t b = 0; b < rows.size(); ++b) {
    lengths[b] = static_cast<int>(rows[b].size());
    std::copy(rows[b].begin(), rows[b].end(), prompts[b].mutable_data_ptr<int64_t>());
  }
  const auto start = std::chrono::steady_clock::now();
  const auto out = model.generate(prompts, lengths, options);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  int64_t total = 0;
  for (size_t b = 0; b < rows.size(); ++b) {
    const int64_t count = out.counts[b].item<int>();
    for (int64_t i = 0; i < count; ++i) rows[b].push_back(out.tokens[b][i].item<int64_t>());
    total += count;
  }
  std::fprintf(stderr, "%ld tokens in %.2f s, %.1f tokens per second\n", static_cast<long>(total), seconds.count(),
               total / seconds.count());
}

void write_logits(const Model& model, const std::vector<std::vector<int64_t>>& rows, const std::string& file) {
  std::ofstream stream(file, std::ios::binary);
  for (const auto& row : rows) {
    const Tensor logits_V = model.forward(torch::tensor(row, torch::kLong).unsqueeze(0))[0][-1].contiguous();
    stream.write(reinterpret_cast<const char*>(logits_V.const_data_ptr<float>()),
                 static_cast<std::streamsize>(logits_V.nbytes()));
  }
  stream.close();
  if (!stream) throw std::runtime_error(file + ": the logits could not be written; check the path and the disk's room");
}

void run(const Options& options) {
  if (options.threads > 0) at::set_num_threads(options.threads);
  const torch::NoGradGuard no_grad;

  // 1. The model.
  const Model model = std::filesystem::is_directory(options.model) ? from_folder(options.model, options.weights)
                                                                   : from_archive(options.model);

  // 2. The prompts as token ids.
  auto rows = options.tokens;
  std::unique_ptr<Text> text;
  if (options.prompt) {
    text = text_for(options, model);
    rows = {{kBeginOfText}};
    const auto prompt = text->encode(*options.prompt);
    rows[0].insert(rows[0].end(), prompt.begin(), prompt.end());
  }
  check_tokens(rows, model.config.vocab_size);

  // 3. What follows them.
  std::vector<size_t> prompt_sizes;
  for (const auto& row : rows) prompt_sizes.push_back(row.size());
  generate(model, options.generate, rows);
  if (text) {
    std::cout << text->decode(rows[0]) << '\n';
  } else {
    for (size_t b = 0; b < rows.size(); ++b) {
      for (size_t i = prompt_sizes[b]; i < rows[b].size(); ++i) {
        std::cout << (i == prompt_sizes[b] ? "" : ",") << rows[b][i];
      }
      std::cout << '\n';
    }
  }
  if (!options.logits.empty()) write_logits(model, rows, options.logits);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse_options({argv + 1, argv + argc});
    if (options.help) {
      std::cout << usage();
    } else {
      run(options);
    }
    return 0;
  } catch (const c10::Error& error) {
    std::cerr << "deploy: " << error.what_without_backtrace() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "deploy: " << error.what() << '\n';
  }
  return 1;
}
