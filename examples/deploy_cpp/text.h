// Text to token ids and back, with SentencePiece where it was found when the program was configured.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

class Text {
 public:
  virtual ~Text() = default;
  virtual std::vector<int64_t> encode(const std::string& text) const = 0;  // without begin-of-text
  virtual std::string decode(const std::vector<int64_t>& tokens) const = 0;
  // All pieces with scores and kinds, as bytes whose SHA-256 is the tokenizer's hash.
  virtual std::string vocabulary() const = 0;
};

// Whether text is possible in this build, for --help.
std::string describe_text();

// model: the bytes of a tokenizer.model. facts: JSON that may hold the hash of the right tokenizer (tokenizer.json, or the
// trainer.json of a checkpoint). Throws std::runtime_error for a damaged model, and for another tokenizer.
std::unique_ptr<Text> load_text(const std::string& model, const std::string& facts);
