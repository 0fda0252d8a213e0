// Files of the system: an open descriptor, errors that say what to do, and a file that appears whole or not at all.
#pragma once

#include <filesystem>

namespace glam {

// Throws CheckpointError for a failed call on `file`; `error` is its errno.
[[noreturn]] void fail_io(const std::filesystem::path& file, const char* action, int error);

class FileDescriptor {
 public:
  // `flags` of open(2). Throws CheckpointError.
  FileDescriptor(const std::filesystem::path& file, int flags);
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor();
  int get() const { return descriptor_; }

 private:
  int descriptor_;
};

// Private and writable: what is made of it may be changed, and the file stays as it is.
class MappedFile {
 public:
  // Throws CheckpointError.
  explicit MappedFile(const std::filesystem::path& file);
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();
  char* data() const { return data_; }  // null in an empty file
  size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// The folder that holds `path`: "." for a plain name.
std::filesystem::path parent_of(const std::filesystem::path& path);

// A new name survives a power cut only once its folder is on the disk. Throws CheckpointError.
void sync_folder(const std::filesystem::path& folder);

// Written beside its final name and renamed once it is on disk: a failure leaves what was there before.
class FileInTheMaking {
 public:
  explicit FileInTheMaking(const std::filesystem::path& file);
  FileInTheMaking(const FileInTheMaking&) = delete;
  FileInTheMaking& operator=(const FileInTheMaking&) = delete;
  ~FileInTheMaking();

  void write(const char* bytes, size_t count);
  void finish();

 private:
  std::filesystem::path file_;
  std::filesystem::path partial_;
  FileDescriptor descriptor_;
  bool finished_ = false;
};

}  // namespace glam
