// The checkpoint folder and the safetensors file: how weights, optimiser state and configuration are kept on disk.
//
// A checkpoint folder, also the form in which a model is exported, holds config.json, model*.safetensors,
// optimizer*.safetensors and trainer.json (both optional), manifest.json (size and SHA-256 of every file) and the
// empty marker COMPLETE, which is written last. Tensors carry global names and shapes. Nothing is ever unpickled.
// glam_ext.checkpoint writes and reads the same folders from Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "glam/config.h"

namespace glam {

// A file or folder that cannot be used. The message names it and says what to do.
class CheckpointError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

using TensorMap = std::map<std::string, at::Tensor>;

// Reads every tensor of a safetensors file (F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL). The tensors map the file
// privately: pages are read when touched, writes to a tensor never reach the file, and the mapping lives as long as
// any of them. The header is checked whole (sizes against shapes, no gap, no overlap, no key twice, nothing behind the
// last tensor) before any tensor is made. Throws CheckpointError.
TensorMap read_safetensors(const std::filesystem::path& file);

// Writes CPU or device tensors, largest element first and by name within that, so that every tensor is aligned. The
// file appears (or replaces an older one) in one step once it is synced; a failure leaves what was there before. Throws
// CheckpointError.
void write_safetensors(const std::filesystem::path& file, const TensorMap& tensors,
                       const std::map<std::string, std::string>& metadata = {});

// Lower-case hexadecimal SHA-256 (FIPS 180-4).
std::string sha256(std::string_view bytes);
std::string sha256_of_file(const std::filesystem::path& file);

struct ManifestEntry {
  std::string file;  // a plain name inside the folder
  int64_t size = 0;
  std::string sha256;
};

// What is compared with the manifest: file sizes only, or the content as well (reads every byte).
enum class Verify { kSizes, kHashes };

struct CheckpointFolder {
  std::filesystem::path path;
  GLaMConfig config;
  std::vector<ManifestEntry> files;
};

// Checks the marker, the manifest, every listed file and the configuration of one folder. Throws CheckpointError.
CheckpointFolder verify_checkpoint(const std::filesystem::path& folder, Verify verify = Verify::kHashes);

// Opens `path`: a checkpoint folder, the checkpoints/ folder of a run, or the run folder itself. In the last two cases
// the newest good step-NNNNNN is taken and each damaged or half-written newer one is reported to `warn` (by default to
// standard error). A damaged folder that is named itself is refused. Throws CheckpointError.
CheckpointFolder open_checkpoint(const std::filesystem::path& path, Verify verify = Verify::kHashes,
                                 const std::function<void(const std::string&)>& warn = {});

// The tensors of every file STEM*.safetensors in the manifest; stem is "model" or "optimizer". Empty when there is no
// optimizer file. Throws CheckpointError when a name occurs in two files.
TensorMap load_tensors(const CheckpointFolder& folder, const std::string& stem);

// The text of trainer.json ("{}" when the folder has none).
std::string load_trainer_json(const CheckpointFolder& folder);

}  // namespace glam
