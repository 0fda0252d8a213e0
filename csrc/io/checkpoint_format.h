// The names in a checkpoint folder, for its reader and its writer.
#pragma once

#include <cstdint>
#include <string_view>

namespace glam::checkpoint_format {

constexpr const char* kFormat = "glam-checkpoint";
constexpr int64_t kVersion = 1;
constexpr const char* kMarker = "COMPLETE";
constexpr const char* kManifest = "manifest.json";
constexpr const char* kConfig = "config.json";
constexpr const char* kTrainer = "trainer.json";
constexpr std::string_view kTensorSuffix = ".safetensors";
// Everything under such a name is unfinished.
constexpr std::string_view kTemporaryPrefix = ".tmp-";

}  // namespace glam::checkpoint_format
