// The command line of the program.
#pragma once

#include <glam/config.h>

#include <cstdint>
#include <string>
#include <vector>

struct Options {
  std::string data;  // a token folder
  glam::GLaMConfig config;
  std::string out;  // a folder to write the trained weights to; empty: none
  int64_t steps = 200;
  int64_t batch_size = 16;       // rows of all processes
  int64_t micro_batch_size = 0;  // rows of one forward pass; 0: all of the process
  int64_t seed = 0;
  int64_t expert = 1;  // processes over which the experts are spread
  int64_t exchange_chunks = 1;
  double multiplier = 1.;  // of GLaM's learning rate
  int64_t constant_steps = 10000;
  int64_t min_factored = 128;  // Adafactor factors a matrix if both sides are at least this
  double clip_norm = 0.;       // of the whole gradient; 0: none
  int64_t log_interval = 20;
  int threads = 0;  // 0: as torch decides
  bool help = false;
};

// Throws std::invalid_argument naming the option.
Options parse_options(const std::vector<std::string>& arguments);

// What --help prints.
std::string usage();
