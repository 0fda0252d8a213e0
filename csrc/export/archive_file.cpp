#include "export/archive_file.h"

#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/export.h>

#include <array>
#include <bit>
#include <cstring>
#include <exception>
#include <fstream>
#include <string_view>

#include "glam/checkpoint.h"
#include "io/file.h"

namespace glam {
namespace {

static_assert(std::endian::native == std::endian::little, "zip fields are little endian and are read as they are");

[[noreturn]] void refuse(const std::filesystem::path& file, const std::string& what) {
  throw CheckpointError(file.string() + ": expected a TorchScript archive, " + what +
                        "; copy the file again or export it again with `glam export`");
}

// --- CRC-32 of zip (polynomial 0xEDB88320), eight bytes at a time. Source: the "slicing by 8" of Kounavis and Berry.

constexpr size_t kSlices = 8;

constexpr auto make_crc_tables() {
  std::array<std::array<uint32_t, 256>, kSlices> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0xEDB88320u : 0u);
    tables[0][byte] = crc;
  }
  for (size_t slice = 1; slice < kSlices; ++slice) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t crc = tables[slice - 1][byte];
      tables[slice][byte] = (crc >> 8) ^ tables[0][crc & 0xFF];
    }
  }
  return tables;
}

uint32_t crc32(std::string_view bytes) {
  static constexpr auto kTables = make_crc_tables();
  uint32_t crc = ~0u;
  const char* next = bytes.data();
  size_t left = bytes.size();
  for (; left >= kSlices; left -= kSlices, next += kSlices) {
    uint64_t word = 0;
    std::memcpy(&word, next, kSlices);
    word ^= crc;
    crc = 0;
    for (size_t i = 0; i < kSlices; ++i) crc ^= kTables[kSlices - 1 - i][(word >> (8 * i)) & 0xFF];
  }
  for (; left > 0; --left, ++next) crc = (crc >> 8) ^ kTables[0][(crc ^ static_cast<uint8_t>(*next)) & 0xFF];
  return ~crc;
}

// --- The zip directory. Source: PKWARE APPNOTE 6.3, sections 4.3.12, 4.3.14 to 4.3.16. Archives have no comment.

constexpr size_t kEndSize = 22, kLocatorSize = 20, kEnd64Size = 56, kEntrySize = 46;
constexpr uint32_t kEndMark = 0x06054b50, kLocatorMark = 0x07064b50, kEnd64Mark = 0x06064b50, kEntryMark = 0x02014b50;
constexpr uint32_t kIn64 = 0xFFFFFFFF;  // the field is in the 64-bit record

class Directory {
 public:
  explicit Directory(const std::filesystem::path& file) : file_(file), stream_(file, std::ios::binary | std::ios::ate) {
    if (!stream_) fail_io(file, "open", errno);
    size_ = static_cast<uint64_t>(stream_.tellg());
    const std::string end = size_ < kEndSize ? "" : read(size_ - kEndSize, kEndSize);
    if (end.empty() || field<uint32_t>(end, 0) != kEndMark) refuse(file_, "found another kind of file, or a cut one");
    uint64_t bytes = field<uint32_t>(end, 12), offset = field<uint32_t>(end, 16);
    if (bytes == kIn64 || offset == kIn64) std::tie(bytes, offset) = find_in_64();
    entries_ = read(offset, bytes);
  }

  // The CRC-32 of every record, by name without the archive's own.
  std::map<std::string, uint32_t> checksums() const {
    std::map<std::string, uint32_t> out;
    for (size_t at = 0; at < entries_.size();) {
      if (entries_.size() - at < kEntrySize || field<uint32_t>(entries_, at) != kEntryMark) damaged();
      const size_t name_size = field<uint16_t>(entries_, at + 28);
      const size_t whole =
          kEntrySize + name_size + field<uint16_t>(entries_, at + 30) + field<uint16_t>(entries_, at + 32);
      if (entries_.size() - at < whole) damaged();
      const std::string name = entries_.substr(at + kEntrySize, name_size);
      if (!out.emplace(name.substr(name.find('/') + 1), field<uint32_t>(entries_, at + 16)).second) damaged();
      at += whole;
    }
    return out;
  }

 private:
  template <class T>
  static T field(const std::string& bytes, size_t at) {
    T value;
    std::memcpy(&value, bytes.data() + at, sizeof(T));
    return value;
  }

  [[noreturn]] void damaged() const { refuse(file_, "got one whose directory is damaged"); }

  std::pair<uint64_t, uint64_t> find_in_64() {
    if (size_ < kEndSize + kLocatorSize) damaged();
    const std::string locator = read(size_ - kEndSize - kLocatorSize, kLocatorSize);
    if (field<uint32_t>(locator, 0) != kLocatorMark) damaged();
    const std::string end = read(field<uint64_t>(locator, 8), kEnd64Size);
    if (field<uint32_t>(end, 0) != kEnd64Mark) damaged();
    return {field<uint64_t>(end, 40), field<uint64_t>(end, 48)};
  }

  std::string read(uint64_t offset, uint64_t bytes) {
    if (offset > size_ || bytes > size_ - offset) damaged();
    std::string out(bytes, '\0');
    stream_.seekg(static_cast<std::streamoff>(offset));
    stream_.read(out.data(), static_cast<std::streamsize>(bytes));
    if (!stream_) fail_io(file_, "read", errno);
    return out;
  }

  std::filesystem::path file_;
  std::ifstream stream_;
  uint64_t size_ = 0;
  std::string entries_;
};

// What torch says about a file, without the stack behind it.
std::string reason(const std::exception& error) {
  const auto* const torch_error = dynamic_cast<const c10::Error*>(&error);
  return torch_error ? torch_error->what_without_backtrace() : error.what();
}

}  // namespace

void write_archive(const torch::jit::Module& module, const std::filesystem::path& file,
                   const std::map<std::string, std::string>& extra_files) {
  FileInTheMaking output(file);
  // torch's zip writer throws from a destructor, which ends the process, when it hears of a failed write. So it hears of
  // none: after the first the rest is dropped.
  std::exception_ptr failure;
  const auto write = [&](const void* bytes, size_t count) {
    try {
      if (!failure) output.write(static_cast<const char*>(bytes), count);
    } catch (...) {
      failure = std::current_exception();
    }
    return count;
  };
  torch::jit::ExportModule(module, write, torch::jit::ExtraFilesMap(extra_files.begin(), extra_files.end()));
  if (failure) std::rethrow_exception(failure);
  output.finish();
}

std::map<std::string, std::string> verify_archive(const std::filesystem::path& file,
                                                  const std::vector<std::string>& names) {
  const auto checksums = Directory(file).checksums();
  std::map<std::string, std::string> extra_files;
  try {
    caffe2::serialize::PyTorchStreamReader reader(file.string());
    for (const auto& [name, checksum] : checksums) {
      const auto [data, size] = reader.getRecord(name);
      const std::string_view bytes(static_cast<const char*>(data.get()), size);
      if (crc32(bytes) != checksum) refuse(file, "got a damaged one: " + name + " does not have its checksum");
      for (const auto& wanted : names) {
        if (name == "extra/" + wanted) extra_files[wanted] = bytes;
      }
    }
  } catch (const CheckpointError&) {
    throw;
  } catch (const std::exception& error) {
    refuse(file, "could not read it: " + reason(error));
  }
  return extra_files;
}

}  // namespace glam
