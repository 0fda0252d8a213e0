// The module libdeploy_text.so: SentencePiece with the tokenizers of glam_ext. It must not link torch; see text.cpp.

#include <sentencepiece_processor.h>

#include <algorithm>
#include <stdexcept>

#include "text.h"

namespace {

void check(const sentencepiece::util::Status& status, const char* what) {
  if (!status.ok()) throw std::runtime_error(std::string(what) + ": " + status.ToString());
}

class SentencePieceText : public Text {
 public:
  explicit SentencePieceText(const std::string& model) {
    check(processor_.LoadFromSerializedProto(model), "damaged tokenizer model");
  }

  std::vector<int64_t> encode(const std::string& text) const override {
    // SentencePiece writes a space as U+2581, so a U+2581 of the text itself has to go in as its three bytes.
    static const std::string kSpaceSymbol = "\xE2\x96\x81";
    std::vector<int64_t> out;
    for (size_t begin = 0;;) {
      const size_t end = std::min(text.find(kSpaceSymbol, begin), text.size());
      std::vector<int> part;
      check(processor_.Encode(text.substr(begin, end - begin), &part), "the prompt cannot be encoded");
      out.insert(out.end(), part.begin(), part.end());
      if (end == text.size()) return out;
      for (const char* const piece : {"<0xE2>", "<0x96>", "<0x81>"}) out.push_back(processor_.PieceToId(piece));
      begin = end + kSpaceSymbol.size();
    }
  }

  std::string decode(const std::vector<int64_t>& tokens) const override {
    std::vector<int> ids;
    for (const int64_t token : tokens) {
      // A model may know more ids than its tokenizer; these say nothing.
      if (token < processor_.GetPieceSize()) ids.push_back(static_cast<int>(token));
    }
    std::string text;
    check(processor_.Decode(ids, &text), "the tokens cannot be decoded");
    return text;
  }

  std::string vocabulary() const override {
    std::string bytes;
    const auto append = [&](const auto& value) { bytes.append(reinterpret_cast<const char*>(&value), sizeof(value)); };
    const auto& p = processor_;
    for (int id = 0; id < p.GetPieceSize(); ++id) {
      const std::string& piece = p.IdToPiece(id);
      append(static_cast<uint32_t>(piece.size()));
      append(p.GetScore(id));
      append(static_cast<uint8_t>(p.IsControl(id) | p.IsUnknown(id) << 1 | p.IsByte(id) << 2 | p.IsUnused(id) << 3));
      bytes += piece;
    }
    return bytes;
  }

 private:
  sentencepiece::SentencePieceProcessor processor_;
};

}  // namespace

extern "C" Text* make_text(const std::string& model) { return new SentencePieceText(model); }
