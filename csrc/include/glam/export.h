// The TorchScript archive of a GLaM: one file that any program linked with libglam_core runs, without Python.
//
// Methods of the archive, on tensors as in glam/nn.h and glam/generate.h:
//   forward(tokens, segment_ids=None) -> logits [B, S, V]
//   init_cache(batch, max_len) -> List[Tensor]
//   step(tokens, cache, positions, lengths=None) -> (logits [B, V], cache)   (keep the returned list: a caller's is copied)
//   generate(tokens, lengths, max_new_tokens, temperature=1., top_k=0, top_p=1., seed=0, stop_tokens=[1])
//       -> (tokens [B, max_new_tokens], counts [B])
// Extra files: config.json, glam.json (format version and library version), and what the caller adds.
#pragma once

#include <glam/nn.h>
#include <torch/csrc/jit/api/module.h>

#include <filesystem>
#include <map>
#include <string>

namespace glam {

// Raised by readers that meet a larger number.
inline constexpr int64_t kArchiveFormat = 1;

// The archive in memory, sharing the model's parameters, in eval mode. Its methods are compiled from the same text as
// glam_ext/functional.py.
torch::jit::Module to_torchscript(const nn::GLaM& model);

// Writes the archive beside `file`, syncs it and renames it into place; the same model gives the same bytes. Throws
// CheckpointError (glam/checkpoint.h) naming the file and the remedy; nothing is left half-written.
void export_torchscript(const nn::GLaM& model, const std::filesystem::path& file,
                        const std::map<std::string, std::string>& extra_files = {});

// An archive with its configuration.
struct Archive {
  torch::jit::Module module;
  GLaMConfig config;
  std::map<std::string, std::string> extra_files;  // config.json, glam.json and those asked for
};

// Loads an archive after checking its format and the checksum of every record. Extra files it does not have are absent
// from the result. Throws CheckpointError that names the file and the remedy: not an archive, damaged, not from this
// library, or of a newer format.
Archive load_archive(const std::filesystem::path& file, const std::vector<std::string>& extra_file_names = {});

}  // namespace glam
