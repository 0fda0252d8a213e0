// The checkpoint folder: marker, manifest, configuration, and the search for the newest good one.
//
// A folder is good when COMPLETE exists, manifest.json is sound, every file it lists is there with its size (and its
// SHA-256 when asked), and config.json is a valid configuration. The files it does not list are never read.

#include "glam/checkpoint.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <optional>
#include <set>

#include "io/checkpoint_format.h"
#include "io/safetensors.h"
#include "io/strict_json.h"

namespace glam {
namespace {

using namespace checkpoint_format;
namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr std::string_view kStepPrefix = "step-";

[[noreturn]] void refuse(const fs::path& path, const std::string& what) {
  throw CheckpointError(path.string() + ": " + what);
}

constexpr const char* kUseAnother = "; use another checkpoint or copy this one again from its source";

std::string read_text(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (!stream.is_open() || stream.bad()) {
    refuse(file, std::string("cannot be read (") + std::strerror(errno) + ")" + kUseAnother);
  }
  return text;
}

bool is_plain_name(const std::string& name) {
  return !name.empty() && name.front() != '.' && name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
}

bool is_tensor_file(const std::string& name, const std::string& stem) {
  return name.size() >= stem.size() + kTensorSuffix.size() && name.starts_with(stem) && name.ends_with(kTensorSuffix);
}

bool is_sha256(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

Json parse_manifest(const fs::path& file) {
  try {
    return parse_strict_json<Json>(read_text(file));
  } catch (const std::invalid_argument& error) {
    refuse(file, std::string("damaged: ") + error.what() + kUseAnother);
  }
}

std::vector<ManifestEntry> read_manifest(const fs::path& file) {
  const Json manifest = parse_manifest(file);
  const auto damaged = [&](const std::string& what) { refuse(file, "damaged: " + what + kUseAnother); };
  if (!manifest.is_object() || manifest.value("format", Json()) != kFormat) {
    damaged(std::string("expected a manifest of the format \"") + kFormat + "\"");
  }
  const Json version = manifest.value("version", Json());
  if (!version.is_number_integer() || version.get<int64_t>() < 1) damaged("expected a version of at least 1");
  if (version.get<int64_t>() > kVersion) {
    refuse(file, "written in checkpoint format " + version.dump() + ", this program reads up to format " +
                     std::to_string(kVersion) + "; use a newer glam_ext");
  }
  const Json listed = manifest.value("files", Json());
  if (manifest.size() != 3 || !listed.is_array()) damaged("expected the keys format, version and files");

  std::vector<ManifestEntry> entries;
  std::set<std::string> names;
  for (const Json& item : listed) {
    const bool shaped = item.is_object() && item.size() == 3 && item.contains("file") && item["file"].is_string() &&
                        item.contains("size") && item["size"].is_number_unsigned() &&
                        item["size"].get<uint64_t>() <= std::numeric_limits<int64_t>::max() &&
                        item.contains("sha256") && item["sha256"].is_string();
    if (!shaped) damaged("an entry has no file, size and sha256: " + item.dump());
    const ManifestEntry entry{item["file"].get<std::string>(), item["size"].get<int64_t>(),
                              item["sha256"].get<std::string>()};
    if (!is_plain_name(entry.file) || !is_sha256(entry.sha256)) damaged("an entry is impossible: " + item.dump());
    if (!names.insert(entry.file).second) damaged(entry.file + " is listed twice");
    entries.push_back(entry);
  }
  const auto is_model = [](const std::string& name) { return is_tensor_file(name, "model"); };
  if (!names.count(kConfig) || std::none_of(names.begin(), names.end(), is_model)) {
    damaged("expected config.json and a model*.safetensors among its files");
  }
  return entries;
}

void verify_file(const fs::path& file, const ManifestEntry& entry, Verify verify) {
  std::error_code error;
  const bool present = fs::is_regular_file(file, error);
  const auto size = present ? fs::file_size(file, error) : 0;
  if (!present || error) refuse(file, std::string("missing") + kUseAnother);
  if (static_cast<int64_t>(size) != entry.size) {
    refuse(file, "damaged: it has " + std::to_string(size) + " bytes, the manifest says " + std::to_string(entry.size) +
                     kUseAnother);
  }
  if (verify == Verify::kHashes && sha256_of_file(file) != entry.sha256) {
    refuse(file, std::string("damaged: its SHA-256 is not the one in the manifest") + kUseAnother);
  }
}

// The whole tensor of pieces that are known to make it up. One that lies in a single file is not copied.
at::Tensor put_together(const std::vector<Piece>& pieces) {
  if (pieces.size() == 1) return pieces.front().tensor;
  const at::Tensor whole = at::empty(pieces.front().shape, pieces.front().tensor.options());
  for (const Piece& piece : pieces) {
    at::Tensor box = whole;
    for (int64_t dim = 0; dim < whole.dim(); ++dim) box = box.narrow(dim, piece.offset[dim], piece.tensor.size(dim));
    box.copy_(piece.tensor);
  }
  return whole;
}

// The number of a "step-000123" folder name.
std::optional<int64_t> step_of(const fs::path& folder) {
  const std::string name = (folder.has_filename() ? folder : folder.parent_path()).filename().string();
  if (!name.starts_with(kStepPrefix)) return std::nullopt;
  const std::string digits = name.substr(kStepPrefix.size());
  constexpr size_t kMostDigits = 18;
  if (digits.empty() || digits.size() > kMostDigits || digits.find_first_not_of("0123456789") != std::string::npos) {
    return std::nullopt;
  }
  return std::stoll(digits);
}

// A path that cannot be looked at counts as absent, so that a search goes on and a named folder is refused by name.
bool is_folder(const fs::path& path) {
  std::error_code error;
  return fs::is_directory(path, error);
}
bool is_file(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path, error);
}

bool looks_like_checkpoint(const fs::path& path) {
  return step_of(path) || is_file(path / kManifest) || is_file(path / kMarker);
}

// The step folders of `root`, newest first.
std::vector<fs::path> step_folders(const fs::path& root) {
  std::vector<std::pair<int64_t, fs::path>> found;
  std::error_code error;
  for (const auto& item : fs::directory_iterator(root, error)) {
    if (const auto step = step_of(item.path()); step && is_folder(item.path())) found.emplace_back(*step, item.path());
  }
  if (error) refuse(root, "cannot be listed (" + error.message() + "); check its permissions");
  std::sort(found.begin(), found.end(), std::greater<>());
  std::vector<fs::path> folders;
  for (auto& [step, path] : found) folders.push_back(std::move(path));
  return folders;
}

}  // namespace

CheckpointFolder verify_checkpoint(const fs::path& folder, Verify verify) {
  if (!is_folder(folder)) refuse(folder, "not a folder; give the path of a checkpoint folder");
  if (!is_file(folder / kMarker)) {
    refuse(folder, std::string("half-written: it has no COMPLETE marker") + kUseAnother);
  }
  CheckpointFolder checkpoint{.path = folder, .config = {}, .files = read_manifest(folder / kManifest)};
  for (const ManifestEntry& entry : checkpoint.files) verify_file(folder / entry.file, entry, verify);
  try {
    checkpoint.config = GLaMConfig::from_json(read_text(folder / kConfig));
  } catch (const std::invalid_argument& error) {
    refuse(folder / kConfig, std::string(error.what()) + "; if a newer glam_ext wrote it, use that version");
  }
  return checkpoint;
}

CheckpointFolder open_checkpoint(const fs::path& path, Verify verify,
                                 const std::function<void(const std::string&)>& warn) {
  if (!is_folder(path)) {
    refuse(path, "not a folder; give the path of a checkpoint folder or of a run folder");
  }
  if (looks_like_checkpoint(path)) return verify_checkpoint(path, verify);
  const fs::path root = is_folder(path / "checkpoints") ? path / "checkpoints" : path;
  std::string refused;
  for (const fs::path& folder : step_folders(root)) {
    try {
      return verify_checkpoint(folder, verify);
    } catch (const CheckpointError& error) {
      refused += std::string("\n  ") + error.what();
      const std::string message = std::string("skipping a checkpoint: ") + error.what();
      if (warn) {
        warn(message);
      } else {
        std::cerr << "glam: " << message << '\n';
      }
    }
  }
  if (refused.empty()) refuse(root, "has no checkpoint (no folder called step-000123); check the path");
  refuse(root, "has no usable checkpoint; each was refused:" + refused);
}

TensorMap load_tensors(const CheckpointFolder& folder, const std::string& stem) {
  struct Whole {
    std::vector<Piece> pieces;
    std::vector<PieceFacts> facts;
  };
  std::map<std::string, Whole> wholes;
  for (const ManifestEntry& entry : folder.files) {
    if (!is_tensor_file(entry.file, stem)) continue;
    for (auto& [name, piece] : read_pieces(folder.path / entry.file)) {
      Whole& whole = wholes[name];
      whole.facts.push_back({entry.file, safetensors_name(piece.tensor.scalar_type()), piece.shape, piece.offset,
                             piece.tensor.sizes().vec()});
      whole.pieces.push_back(std::move(piece));
    }
  }
  TensorMap tensors;
  for (const auto& [name, whole] : wholes) {
    if (const auto problem = problem_of_pieces(name, whole.facts); !problem.empty()) {
      refuse(folder.path, problem + kUseAnother);
    }
    tensors.emplace(name, put_together(whole.pieces));
  }
  return tensors;
}

std::string load_trainer_json(const CheckpointFolder& folder) {
  const bool listed = std::any_of(folder.files.begin(), folder.files.end(),
                                  [](const ManifestEntry& entry) { return entry.file == kTrainer; });
  return listed ? read_text(folder.path / kTrainer) : "{}";
}

}  // namespace glam
