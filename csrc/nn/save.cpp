// From a model to a checkpoint folder, in the order that loses nothing: every file is written and synced in a temporary
// folder, which gets its name in one step, and only then the marker.

#include <glam/save.h>

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <functional>
#include <iomanip>
#include <sstream>

#include "distributed/collectives.h"
#include "io/checkpoint_format.h"
#include "io/file.h"
#include "io/strict_json.h"

namespace glam {
namespace {

using namespace checkpoint_format;
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

// What the ranks of a save do together, and what they tell each other: numbers, never a tensor of the model.
class Ranks {
 public:
  Ranks(std::string group, at::Device device, fs::path folder)
      : group_(std::move(group)), device_(device), folder_(std::move(folder)) {}
  int64_t rank() const { return collectives::group_rank(group_); }
  int64_t size() const { return collectives::group_size(group_); }

  // Returns once every rank's work is done; throws on all of them where one failed.
  void together(const std::function<void()>& work) const {
    std::exception_ptr error;
    try {
      work();
    } catch (...) {
      error = std::current_exception();
    }
    const std::vector<int64_t> failed = gather(error ? 1 : 0);
    if (error) std::rethrow_exception(error);
    for (size_t rank = 0; rank < failed.size(); ++rank) {
      if (failed[rank] == 0) continue;
      throw CheckpointError(folder_.string() + ": nothing was saved, rank " + std::to_string(rank) +
                            " failed; its own message says why");
    }
  }
  void first_only(const std::function<void()>& work) const {
    together([&] {
      if (rank() == 0) work();
    });
  }

  std::vector<int64_t> gather(int64_t number) const {
    const Tensor all =
        collectives::all_gather(at::full({}, number, at::device(device_).dtype(at::kLong)), group_).cpu();
    return {all.const_data_ptr<int64_t>(), all.const_data_ptr<int64_t>() + all.numel()};
  }
  // Texts of one length.
  std::vector<std::string> gather(const std::string& text) const {
    Tensor own = at::zeros({static_cast<int64_t>(text.size())}, at::kByte);
    std::memcpy(own.mutable_data_ptr(), text.data(), text.size());
    const Tensor all = collectives::all_gather(own.to(device_), group_).cpu();
    std::vector<std::string> texts;
    for (int64_t rank = 0; rank < size(); ++rank) {
      texts.emplace_back(static_cast<const char*>(all[rank].const_data_ptr()), text.size());
    }
    return texts;
  }

 private:
  std::string group_;
  at::Device device_;
  fs::path folder_;
};

std::string tensor_file_name(int64_t rank, int64_t num_ranks) {
  std::ostringstream name;
  name << "model" << std::setfill('0');
  if (num_ranks > 1) name << '-' << std::setw(5) << rank + 1 << "-of-" << std::setw(5) << num_ranks;
  name << kTensorSuffix;
  return name.str();
}

void write_text(const fs::path& file, const std::string& text) {
  FileInTheMaking output(file);
  output.write(text.data(), text.size());
  output.finish();
}

// From the file, so that what a reader will see is what is vouched for.
ManifestEntry entry_of(const fs::path& file) {
  return {file.filename().string(), static_cast<int64_t>(fs::file_size(file)), sha256_of_file(file)};
}

std::string checked_trainer_text(const std::string& text) {
  try {
    const auto object = parse_strict_json<Json>(text);
    if (object.is_object()) return object.dump(1) + "\n";
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("glam::save_model: expected trainer_json to be JSON, got ") + error.what());
  }
  throw std::invalid_argument("glam::save_model: expected trainer_json to be an object, got " + text);
}

void start(const fs::path& folder, const fs::path& temporary, const std::string& config_text) {
  if (fs::exists(folder)) {
    throw CheckpointError(folder.string() + ": exists and is not replaced; move it away or give another name");
  }
  std::error_code error;
  fs::remove_all(temporary, error);
  if (!error) fs::create_directories(temporary, error);
  if (error) fail_io(temporary, "making the folder", error.value());
  write_text(temporary / kConfig, config_text);
}

// This rank's file: its experts, if it is the one to write them, and on rank 0 everything that all ranks hold.
void write_share(const nn::GLaM& model, bool holds_experts, const Ranks& ranks, const fs::path& temporary) {
  if (!fs::exists(temporary / kConfig)) {
    throw CheckpointError(temporary.string() +
                          ": rank 0 made this folder and it is not visible here; save to a file system that all ranks "
                          "share");
  }
  const auto experts = model->expert_parameters();
  const bool is_part = model->num_local_experts() < model->config().num_experts;
  TensorMap tensors;
  Json places = Json::object();
  for (const auto& item : model->named_parameters()) {
    const std::string& name = item.key();
    const bool is_expert = is_part && experts.contains(name);
    if (is_expert ? !holds_experts : ranks.rank() != 0) continue;
    tensors[name] = item.value();
    if (!is_expert) continue;
    auto shape = item.value().sizes().vec();
    shape[0] = model->config().num_experts;
    places[name] = {{"shape", shape}, {"offset", {model->first_local_expert(), 0, 0}}};
  }
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
  if (!places.empty()) metadata[kPiecesKey] = places.dump();
  write_safetensors(temporary / tensor_file_name(ranks.rank(), ranks.size()), tensors, metadata);
}

void publish(const fs::path& temporary, const fs::path& folder, std::vector<ManifestEntry> entries,
             const std::string& trainer_text) {
  for (const ManifestEntry& entry : entries) {
    const fs::path file = temporary / entry.file;
    std::error_code error;
    if (static_cast<int64_t>(fs::file_size(file, error)) == entry.size && !error) continue;
    throw CheckpointError(file.string() + ": was written with " + std::to_string(entry.size) +
                          " bytes by its rank and is not here; save to a file system that all ranks share");
  }
  write_text(temporary / kTrainer, trainer_text);
  entries.push_back(entry_of(temporary / kConfig));
  entries.push_back(entry_of(temporary / kTrainer));
  Json files = Json::array();
  for (const ManifestEntry& entry : entries) {
    files.push_back({{"file", entry.file}, {"size", entry.size}, {"sha256", entry.sha256}});
  }
  const Json manifest = {{"format", kFormat}, {"version", kVersion}, {"files", files}};
  write_text(temporary / kManifest, manifest.dump(1) + "\n");

  std::error_code error;
  fs::rename(temporary, folder, error);
  if (error) fail_io(folder, "rename", error.value());
  try {
    sync_folder(parent_of(folder));
    write_text(folder / kMarker, "");
  } catch (...) {  // what may not be on the disk does not count, marker or not
    fs::remove(folder / kMarker, error);
    fs::remove_all(folder, error);
    throw;
  }
}

}  // namespace

void save_model(const nn::GLaM& model, const fs::path& folder, const std::string& trainer_json,
                const std::string& world) {
  const std::string trainer_text = checked_trainer_text(trainer_json);
  const fs::path target = folder.has_filename() ? folder : folder.parent_path();  // "name/" is "name"
  const fs::path temporary = parent_of(target) / (std::string(kTemporaryPrefix) + target.filename().string());
  const Ranks ranks(world, model->parameters().front().device(), target);
  const std::vector<int64_t> firsts = ranks.gather(model->first_local_expert());
  const bool is_first_holder = std::ranges::find(firsts, firsts[ranks.rank()]) - firsts.begin() == ranks.rank();
  try {
    ranks.first_only([&] { start(target, temporary, model->config().to_json(1) + "\n"); });
    ManifestEntry own;
    ranks.together([&] {
      write_share(model, is_first_holder, ranks, temporary);
      own = entry_of(temporary / tensor_file_name(ranks.rank(), ranks.size()));
    });
    const std::vector<int64_t> sizes = ranks.gather(own.size);
    const std::vector<std::string> hashes = ranks.gather(own.sha256);
    std::vector<ManifestEntry> entries;
    for (int64_t rank = 0; rank < ranks.size(); ++rank) {
      entries.push_back({tensor_file_name(rank, ranks.size()), sizes[rank], hashes[rank]});
    }
    ranks.first_only([&] { publish(temporary, target, std::move(entries), trainer_text); });
  } catch (...) {
    std::error_code ignored;
    if (ranks.rank() == 0) fs::remove_all(temporary, ignored);
    throw;
  }
}

}  // namespace glam
