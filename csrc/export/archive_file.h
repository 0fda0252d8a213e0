// The archive as a file: written whole or not at all, and its checksums compared before anything in it is used.
//
// An archive is a zip file. torch's reader takes its records as they are, so a flipped bit would be a silently different
// model; here every record is compared with its CRC-32 in the zip directory.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace glam {

// The same module and files give the same bytes. Throws CheckpointError; what was there before stays.
void write_archive(const torch::jit::Module& module, const std::filesystem::path& file,
                   const std::map<std::string, std::string>& extra_files);

// Checks every record of `file`, and returns those extra files of `names` that it has. Throws CheckpointError.
std::map<std::string, std::string> verify_archive(const std::filesystem::path& file,
                                                  const std::vector<std::string>& names);

}  // namespace glam
