// A token folder as glam_ext/data/token_files.py writes it.

#include <ATen/ops/empty.h>

#include <cstring>

#include "glam/data.h"
#include "io/file.h"
#include "io/strict_json.h"

namespace glam::data {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;  // sorts its keys, as the manifest's hash wants them

constexpr const char* kFormat = "glam-tokens";
constexpr int64_t kVersion = 1;
constexpr const char* kRemedy = "; make it again with glam_ext.recipes.prepare_text, or copy it again";

[[noreturn]] void refuse(const fs::path& path, const std::string& what) {
  throw DataError(path.string() + ": " + what + kRemedy);
}

Json read_manifest(const fs::path& file) {
  if (!fs::exists(file)) {
    throw DataError(file.string() + ": no such file; expected a token folder, made by glam_ext.recipes.prepare_text");
  }
  const MappedFile mapped(file);
  Json manifest;
  try {
    manifest = parse_strict_json<Json>({mapped.data(), mapped.size()});
  } catch (const std::invalid_argument& error) {
    refuse(file, std::string("damaged (") + error.what() + ")");
  }
  if (!manifest.is_object() || manifest.value("format", Json()) != kFormat) {
    refuse(file, std::string("expected \"format\": \"") + kFormat + "\"");
  }
  if (const Json version = manifest.value("format_version", Json()); version != kVersion) {
    throw DataError(file.string() + ": expected format version " + std::to_string(kVersion) + ", got " +
                    version.dump() + "; use the glam_ext that wrote it, or prepare the text again");
  }
  const Json found = manifest.value("manifest_sha256", Json());
  manifest.erase("manifest_sha256");
  if (found != sha256(manifest.dump(-1, ' ', /*ensure_ascii=*/true))) {
    refuse(file, "damaged or edited, it does not match its own hash");
  }
  return manifest;
}

}  // namespace

// One file: num_rows rows of num_columns unsigned integers of item_size bytes.
class TokenFolder::Array {
 public:
  Array(const fs::path& folder, const std::string& name, const Json& manifest, Verify verify)
      : path_(folder / (name + ".bin")), file_(checked(path_)) {
    const Json& entry = manifest.at("files").at(name);
    const auto rows = manifest.at("num_rows").get<uint64_t>(), columns = manifest.at("sequence_length").get<uint64_t>();
    const auto dtype = entry.at("dtype").get<std::string>();
    if (dtype != "uint16" && dtype != "uint32") refuse(path_, "expected uint16 or uint32, got " + dtype);
    item_size_ = dtype == "uint16" ? sizeof(uint16_t) : sizeof(uint32_t);
    num_columns_ = static_cast<size_t>(columns);
    const auto bytes = entry.at("bytes").get<uint64_t>();
    if (file_.size() != bytes) {
      refuse(path_, "expected " + std::to_string(bytes) + " bytes, got " + std::to_string(file_.size()));
    }
    if (entry.at("shape") != Json({rows, columns}) || columns == 0 || bytes / columns / item_size_ != rows ||
        bytes != rows * columns * item_size_) {
      refuse(path_, "its size and its shape do not agree");
    }
    if (verify == Verify::kHashes && sha256({file_.data(), file_.size()}) != entry.at("sha256").get<std::string>()) {
      refuse(path_, "damaged, its content does not match the hash in manifest.json");
    }
  }

  // Calls use(column, value) for every position of a row.
  template <class Use>
  void row(int64_t index, Use&& use) const {
    item_size_ == sizeof(uint16_t) ? row_of<uint16_t>(index, use) : row_of<uint32_t>(index, use);
  }

 private:
  static MappedFile checked(const fs::path& path) {
    if (!fs::exists(path)) refuse(path, "missing");
    return MappedFile(path);
  }

  template <class Item, class Use>
  void row_of(int64_t index, Use&& use) const {
    const char* const begin = file_.data() + static_cast<size_t>(index) * num_columns_ * sizeof(Item);
    for (size_t column = 0; column < num_columns_; ++column) {
      Item item;
      std::memcpy(&item, begin + column * sizeof(Item), sizeof(Item));
      use(column, item);
    }
  }

  fs::path path_;
  MappedFile file_;
  size_t num_columns_ = 0, item_size_ = 0;
};

TokenFolder::TokenFolder(const fs::path& folder, Verify verify) {
  const fs::path file = folder / "manifest.json";
  try {
    const Json manifest = read_manifest(file);
    num_rows_ = manifest.at("num_rows").get<int64_t>();
    sequence_length_ = manifest.at("sequence_length").get<int64_t>();
    vocab_size_ = manifest.at("vocab_size").get<int64_t>();
    num_targets_ = manifest.at("num_targets").get<int64_t>();
    utf8_bytes_ = manifest.at("utf8_bytes").get<int64_t>();
    tokenizer_hash_ = manifest.at("tokenizer_hash").get<std::string>();
    tokens_ = std::make_unique<Array>(folder, "tokens", manifest, verify);
    targets_ = std::make_unique<Array>(folder, "targets", manifest, verify);
    segment_ids_ = std::make_unique<Array>(folder, "segment_ids", manifest, verify);
  } catch (const Json::exception& error) {
    refuse(file, std::string("not a manifest of this format (") + error.what() + ")");
  } catch (const CheckpointError& error) {  // a file that cannot be read
    throw DataError(error.what());
  }
}

TokenFolder::~TokenFolder() = default;
TokenFolder::TokenFolder(TokenFolder&&) noexcept = default;

Batch TokenFolder::rows(std::span<const int64_t> indices) const {
  check_indices(indices);
  const std::vector<int64_t> shape = {static_cast<int64_t>(indices.size()), sequence_length_};
  Batch batch{.tokens = at::empty(shape, at::kLong),
              .targets = at::empty(shape, at::kLong),
              .weights = at::empty(shape, at::kFloat),
              .segment_ids = at::empty(shape, at::kInt)};
  auto* tokens = batch.tokens.mutable_data_ptr<int64_t>();
  auto* targets = batch.targets.mutable_data_ptr<int64_t>();
  auto* weights = batch.weights.mutable_data_ptr<float>();
  auto* segments = batch.segment_ids.mutable_data_ptr<int32_t>();
  for (const int64_t index : indices) {
    tokens_->row(index, [&](size_t column, auto token) { tokens[column] = token; });
    targets_->row(index, [&](size_t column, auto target) { targets[column] = target; });
    segment_ids_->row(index, [&](size_t column, auto segment) {
      segments[column] = static_cast<int32_t>(segment);
      weights[column] = segment != 0 ? 1.f : 0.f;
    });
    tokens += sequence_length_;
    targets += sequence_length_;
    weights += sequence_length_;
    segments += sequence_length_;
  }
  return batch;
}

int64_t TokenFolder::count_real(std::span<const int64_t> indices) const {
  check_indices(indices);
  int64_t count = 0;
  for (const int64_t index : indices) {
    segment_ids_->row(index, [&](size_t, auto segment) { count += segment != 0; });
  }
  return count;
}

void TokenFolder::check_indices(std::span<const int64_t> indices) const {
  for (const int64_t index : indices) {
    if (index >= 0 && index < num_rows_) continue;
    throw std::out_of_range("TokenFolder: expected rows in [0, " + std::to_string(num_rows_) + "), got " +
                            std::to_string(index));
  }
}

}  // namespace glam::data
