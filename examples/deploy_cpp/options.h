// The command line of the program.
#pragma once

#include <glam/generate.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

struct Options {
  std::string model;      // an archive, a checkpoint folder or a run folder
  std::string tokenizer;  // a tokenizer.model; empty: the one in the archive
  std::optional<std::string> prompt;
  std::vector<std::vector<int64_t>> tokens;  // one row each
  std::string logits;                        // a file to write; empty: none
  std::optional<torch::ScalarType> weights;  // packed, for a folder; nullopt: as they are
  int threads = 0;                           // 0: as torch decides
  bool help = false;
  glam::GenerateOptions generate{.max_new_tokens = 128, .stop_tokens = {1}, .on_step = {}};
};

// Throws std::invalid_argument naming the option.
Options parse_options(const std::vector<std::string>& arguments);

// What --help prints.
std::string usage();
