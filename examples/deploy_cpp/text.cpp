#include "text.h"

#include <stdexcept>

#ifdef HAVE_SENTENCEPIECE

#include <dlfcn.h>
#include <glam/checkpoint.h>

namespace {

// SentencePiece and torch both export a variable FLAGS_minloglevel, of 32 bytes in one and 4 in the other. Linked into one
// program they would share it, and the larger one overwrites what lies behind the smaller. So SentencePiece comes in a
// module of its own, in which its names mean its own things first.
using MakeText = Text*(const std::string& model);

MakeText* load_module() {
  void* const module = ::dlopen("$ORIGIN/libdeploy_text.so", RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
  void* const function = module ? ::dlsym(module, "make_text") : nullptr;
  if (!function) throw std::runtime_error(std::string("the SentencePiece module beside the program: ") + ::dlerror());
  return reinterpret_cast<MakeText*>(function);
}

}  // namespace

std::string describe_text() { return "text by SentencePiece " SENTENCEPIECE_VERSION; }

std::unique_ptr<Text> load_text(const std::string& model, const std::string& facts) {
  static MakeText* const make_text = load_module();
  std::unique_ptr<Text> text(make_text(model));
  const bool known = facts.find("hash\"") != std::string::npos;
  if (known && facts.find(glam::sha256(text->vocabulary())) == std::string::npos) {
    throw std::runtime_error(
        "this is not the tokenizer that the model was trained with; use the one of its training data");
  }
  return text;
}

#else

std::string describe_text() { return "token ids only: SentencePiece was not found when this was configured"; }

std::unique_ptr<Text> load_text(const std::string&, const std::string&) {
  throw std::runtime_error(
      "text needs SentencePiece, which was not found when this program was configured; install its C++ library "
      "(Debian: "
      "libsentencepiece-dev) and configure again, or give --tokens");
}

#endif
