// The checkpoint folder and the safetensors file: how weights, optimiser state and configuration are kept on disk.
//
// A checkpoint folder, also the form in which a model is exported, holds config.json, model*.safetensors,
// optimizer*.safetensors and trainer.json (both optional), manifest.json (size and SHA-256 of every file) and the
// empty marker COMPLETE, which is written last. Tensors carry global names and shapes. A run of several ranks writes a
// model-0000I-of-0000N.safetensors from each of them, whose tensors may be parts of whole ones: the file's metadata says
// of which shape and where they begin. Nothing is ever unpickled. glam_ext.checkpoint writes and reads the same folders
// from Python.
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
// last tensor) before any tensor is made. The file's own texts go into `metadata`, if given. Throws CheckpointError.
TensorMap read_safetensors(const std::filesystem::path& file, std::map<std::string, std::string>* metadata = nullptr);

// Writes CPU or device tensors, largest element first and by name within that, so that every tensor is aligned. The
// file appears (or replaces an older one) in one step once it is synced; a failure leaves what was there before. Throws
// CheckpointError.
void write_safetensors(const std::filesystem::path& file, const TensorMap& tensors,
                       const std::map<std::string, std::string>& metadata = {});

// A tensor as a file holds it: the box of the whole tensor of `shape` that begins at `offset` and has the tensor's sizes.
struct Piece {
  at::Tensor tensor;
  std::vector<int64_t> shape;
  std::vector<int64_t> offset;
};

// The key of a file's metadata that says which of its tensors are parts, as JSON text
// {"NAME": {"shape": [8, 16, 4], "offset": [2, 0, 0]}, ...}. A tensor that is not named there is whole.
inline constexpr const char* kPiecesKey = "glam.pieces";

// read_safetensors with each tensor's place. Throws CheckpointError, also for a place that cannot be.
std::map<std::string, Piece> read_pieces(const std::filesystem::path& file);

// What is said about one part of a tensor, and who has it: a file or a rank, for messages.
struct PieceFacts {
  std::string holder;
  std::string dtype;            // as the format calls it: "F32"
  std::vector<int64_t> shape;   // of the whole
  std::vector<int64_t> offset;  // of the part's first element
  std::vector<int64_t> sizes;   // of the part
};

// Why these parts do not make up a whole tensor (of one dtype and one shape, every element exactly once), naming what is
// lost or doubled and where; empty if they do. Looks at no data and allocates nothing of the tensor's size.
std::string problem_of_pieces(const std::string& name, const std::vector<PieceFacts>& pieces);

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

// The whole tensors of all files STEM*.safetensors in the manifest; stem is "model" or "optimizer". Empty when there is
// no optimizer file. A tensor that lies in one file maps it, one in parts is put together in memory. Throws
// CheckpointError when the parts of a tensor leave a gap, overlap or disagree.
TensorMap load_tensors(const CheckpointFolder& folder, const std::string& stem);

// The text of trainer.json ("{}" when the folder has none).
std::string load_trainer_json(const CheckpointFolder& folder);

}  // namespace glam
