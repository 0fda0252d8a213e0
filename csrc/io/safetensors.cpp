// The safetensors file, read by memory mapping and written with a final sync.
//
// Layout: 8 bytes, little endian: the length N of the header; N bytes of JSON, {"name": {"dtype", "shape",
// "data_offsets": [begin, end]}, ..., "__metadata__": {text: text}}; then the tensors' bytes, without gaps, in
// row-major order and little endian. Source: the format description in the safetensors repository
// (huggingface/safetensors).

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>

#include "glam/checkpoint.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "io/strict_json.h"

namespace glam {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data is little endian and is mapped as it is");

using Json = nlohmann::ordered_json;

constexpr uint64_t kLargestHeader = 100'000'000;  // the bound of the reference implementation
constexpr size_t kLengthBytes = sizeof(uint64_t);
constexpr size_t kHeaderAlignment = 8;
constexpr const char* kMetadataKey = "__metadata__";

struct DtypeName {
  const char* name;
  at::ScalarType dtype;
};

constexpr std::array<DtypeName, 10> kDtypes = {{{"F64", at::kDouble},
                                                {"I64", at::kLong},
                                                {"F32", at::kFloat},
                                                {"I32", at::kInt},
                                                {"F16", at::kHalf},
                                                {"BF16", at::kBFloat16},
                                                {"I16", at::kShort},
                                                {"I8", at::kChar},
                                                {"U8", at::kByte},
                                                {"BOOL", at::kBool}}};

[[noreturn]] void refuse(const std::filesystem::path& file, const std::string& what) {
  throw CheckpointError(file.string() + ": not a whole safetensors file: " + what +
                        "; copy the file again from its source or use another checkpoint");
}

struct Entry {
  std::string name;
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape;
  uint64_t begin = 0;
  uint64_t end = 0;
};

Json parse_header(const std::filesystem::path& file, std::string_view text) {
  if (text.empty() || text.front() != '{') refuse(file, "its header does not begin with {");
  try {
    return parse_strict_json<Json>(text);
  } catch (const std::invalid_argument& error) {
    refuse(file, std::string("its header is damaged, ") + error.what());
  }
}

uint64_t read_size(const std::filesystem::path& file, const std::string& name, const Json& value) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() > std::numeric_limits<int64_t>::max()) {
    refuse(file, "tensor " + name + " has the size or offset " + value.dump());
  }
  return value.get<uint64_t>();
}

Entry read_entry(const std::filesystem::path& file, const std::string& name, const Json& value) {
  const bool shaped = value.is_object() && value.size() == 3 && value.contains("dtype") && value["dtype"].is_string() &&
                      value.contains("shape") && value["shape"].is_array() && value.contains("data_offsets") &&
                      value["data_offsets"].is_array() && value["data_offsets"].size() == 2;
  if (!shaped) refuse(file, "tensor " + name + " has no dtype, shape and pair of data_offsets");

  Entry entry;
  entry.name = name;
  const auto dtype_name = value["dtype"].get<std::string>();
  const auto dtype = std::find_if(kDtypes.begin(), kDtypes.end(), [&](const auto& d) { return dtype_name == d.name; });
  if (dtype == kDtypes.end()) refuse(file, "tensor " + name + " has the dtype " + value["dtype"].dump());
  entry.dtype = dtype->dtype;

  uint64_t bytes = c10::elementSize(entry.dtype);
  for (const Json& extent : value["shape"]) {
    entry.shape.push_back(static_cast<int64_t>(read_size(file, name, extent)));
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(entry.shape.back()), &bytes)) {
      refuse(file, "tensor " + name + " has the shape " + value["shape"].dump());
    }
  }
  entry.begin = read_size(file, name, value["data_offsets"][0]);
  entry.end = read_size(file, name, value["data_offsets"][1]);
  if (entry.end < entry.begin || entry.end - entry.begin != bytes) {
    refuse(file, "tensor " + name + " of " + dtype_name + " " + value["shape"].dump() + " needs " +
                     std::to_string(bytes) + " bytes, its data_offsets are " + value["data_offsets"].dump());
  }
  return entry;
}

std::map<std::string, std::string> read_metadata(const std::filesystem::path& file, const Json& header) {
  const auto found = header.find(kMetadataKey);
  if (found == header.end()) return {};
  const bool texts = found->is_object() &&
                     std::all_of(found->begin(), found->end(), [](const Json& text) { return text.is_string(); });
  if (!texts) refuse(file, "its __metadata__ is not a map from text to text");
  return found->get<std::map<std::string, std::string>>();
}

std::vector<Entry> read_entries(const std::filesystem::path& file, const Json& header, uint64_t data_bytes) {
  std::vector<Entry> entries;
  for (const auto& [name, value] : header.items()) {
    if (name != kMetadataKey) entries.push_back(read_entry(file, name, value));
  }
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
  uint64_t end = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != end) refuse(file, "tensor " + entry.name + " overlaps another or leaves a gap before it");
    end = entry.end;
  }
  if (end != data_bytes) {
    refuse(file, "its tensors end at byte " + std::to_string(end) + " of the data, which has " +
                     std::to_string(data_bytes) + " bytes");
  }
  return entries;
}

at::Tensor make_tensor(const std::filesystem::path& file, const Entry& entry, char* data,
                       const std::shared_ptr<MappedFile>& mapping) {
  const size_t bytes = entry.end - entry.begin;
  if (entry.dtype == at::kBool && !std::all_of(data, data + bytes, [](char b) { return b == 0 || b == 1; })) {
    refuse(file, "tensor " + entry.name + " is BOOL and has bytes other than 0 and 1");
  }
  const auto options = at::TensorOptions().dtype(entry.dtype);
  const size_t alignment = c10::elementSize(entry.dtype);
  if (bytes == 0 || reinterpret_cast<uintptr_t>(data) % alignment != 0) {
    const at::Tensor copy = at::empty(entry.shape, options);
    if (bytes > 0) std::memcpy(copy.data_ptr(), data, bytes);
    return copy;
  }
  return at::from_blob(data, entry.shape, [mapping](void*) {}, options);
}

}  // namespace

const char* safetensors_name(at::ScalarType dtype) {
  const auto found = std::find_if(kDtypes.begin(), kDtypes.end(), [&](const DtypeName& d) { return d.dtype == dtype; });
  return found == kDtypes.end() ? nullptr : found->name;
}

TensorMap read_safetensors(const std::filesystem::path& file, std::map<std::string, std::string>* metadata) {
  const auto mapping = std::make_shared<MappedFile>(file);
  if (mapping->size() < kLengthBytes) refuse(file, "it has " + std::to_string(mapping->size()) + " bytes");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, mapping->data(), kLengthBytes);
  if (header_bytes > kLargestHeader || header_bytes > mapping->size() - kLengthBytes) {
    refuse(file, "its header claims " + std::to_string(header_bytes) + " bytes, the file has " +
                     std::to_string(mapping->size()));
  }
  const Json header = parse_header(file, {mapping->data() + kLengthBytes, header_bytes});
  auto texts = read_metadata(file, header);
  if (metadata != nullptr) *metadata = std::move(texts);
  const uint64_t data_bytes = mapping->size() - kLengthBytes - header_bytes;
  char* const data = mapping->data() + kLengthBytes + header_bytes;

  TensorMap tensors;
  for (const Entry& entry : read_entries(file, header, data_bytes)) {
    tensors.emplace(entry.name, make_tensor(file, entry, data + entry.begin, mapping));
  }
  return tensors;
}

void write_safetensors(const std::filesystem::path& file, const TensorMap& tensors,
                       const std::map<std::string, std::string>& metadata) {
  struct Pending {
    std::string name;
    const at::Tensor* tensor;
    size_t order;  // index in kDtypes, which runs from wide to narrow
  };
  std::vector<Pending> pending;
  for (const auto& [name, tensor] : tensors) {
    const auto dtype = std::find_if(kDtypes.begin(), kDtypes.end(),
                                    [&](const DtypeName& d) { return d.dtype == tensor.scalar_type(); });
    if (dtype == kDtypes.end()) {
      throw CheckpointError(file.string() + ": tensor " + name + " has the dtype " +
                            c10::toString(tensor.scalar_type()) +
                            ", which safetensors does not know; convert it first");
    }
    if (name == kMetadataKey) throw CheckpointError(file.string() + ": a tensor cannot be called " + name);
    pending.push_back({name, &tensor, static_cast<size_t>(dtype - kDtypes.begin())});
  }
  std::stable_sort(pending.begin(), pending.end(), [](const auto& a, const auto& b) { return a.order < b.order; });

  Json header = Json::object();
  if (!metadata.empty()) header[kMetadataKey] = metadata;
  uint64_t offset = 0;
  for (const Pending& item : pending) {
    const uint64_t end =
        offset + static_cast<uint64_t>(item.tensor->numel()) * c10::elementSize(item.tensor->scalar_type());
    header[item.name] = {
        {"dtype", kDtypes[item.order].name}, {"shape", item.tensor->sizes().vec()}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.append((kHeaderAlignment - text.size() % kHeaderAlignment) % kHeaderAlignment, ' ');
  const uint64_t length = text.size();

  FileInTheMaking output(file);
  output.write(reinterpret_cast<const char*>(&length), kLengthBytes);
  output.write(text.data(), text.size());
  for (const Pending& item : pending) {
    // One tensor at a time: no second copy of the model is ever held.
    const at::Tensor plain = item.tensor->detach().cpu().contiguous();
    output.write(static_cast<const char*>(plain.data_ptr()), plain.nbytes());
  }
  output.finish();
}

}  // namespace glam
