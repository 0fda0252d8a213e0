#include "io/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "glam/checkpoint.h"

namespace glam {

void fail_io(const std::filesystem::path& file, const char* action, int error) {
  const char* remedy = error == ENOSPC || error == EDQUOT ? "free some space or choose another folder"
                                                          : "check that the path exists and its permissions";
  throw CheckpointError(file.string() + ": " + action + " failed: " + std::strerror(error) + "; " + remedy);
}

FileDescriptor::FileDescriptor(const std::filesystem::path& file, int flags)
    : descriptor_(::open(file.c_str(), flags, 0666)) {
  if (descriptor_ < 0) fail_io(file, "open", errno);
}

FileDescriptor::~FileDescriptor() { ::close(descriptor_); }

MappedFile::MappedFile(const std::filesystem::path& file) {
  const FileDescriptor descriptor(file, O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (::fstat(descriptor.get(), &status) != 0) fail_io(file, "stat", errno);
  if (!S_ISREG(status.st_mode)) {
    throw CheckpointError(file.string() + ": expected a regular file; check the path");
  }
  size_ = static_cast<size_t>(status.st_size);
  if (size_ == 0) return;
  // A rank maps whole files to read its part: without MAP_NORESERVE a file larger than the memory could be refused.
  constexpr int kFlags = MAP_PRIVATE | MAP_NORESERVE;
  void* mapped = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, kFlags, descriptor.get(), 0);
  if (mapped == MAP_FAILED) fail_io(file, "mmap", errno);
  data_ = static_cast<char*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

std::filesystem::path parent_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : ".";
}

void sync_folder(const std::filesystem::path& folder) {
  const FileDescriptor descriptor(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (::fsync(descriptor.get()) != 0) fail_io(folder, "fsync", errno);
}

FileInTheMaking::FileInTheMaking(const std::filesystem::path& file)
    : file_(file),
      partial_(file.string() + ".partial"),
      descriptor_(partial_, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC) {}

FileInTheMaking::~FileInTheMaking() {
  if (!finished_) ::unlink(partial_.c_str());
}

void FileInTheMaking::write(const char* bytes, size_t count) {
  while (count > 0) {
    const ssize_t written = ::write(descriptor_.get(), bytes, count);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail_io(file_, "write", errno);
    bytes += written;
    count -= static_cast<size_t>(written);
  }
}

void FileInTheMaking::finish() {
  if (::fsync(descriptor_.get()) != 0) fail_io(file_, "fsync", errno);
  if (::rename(partial_.c_str(), file_.c_str()) != 0) fail_io(file_, "rename", errno);
  finished_ = true;
  sync_folder(parent_of(file_));
}

}  // namespace glam
