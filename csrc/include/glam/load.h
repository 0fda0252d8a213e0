// A checkpoint folder as a model, without Python.
#pragma once

#include <glam/checkpoint.h>
#include <glam/nn.h>

#include <filesystem>
#include <optional>

namespace glam {

// The model of a checkpoint folder, in eval mode, its parameters copied from the files. `path` is what open_checkpoint
// takes: a checkpoint folder, or a run, of which the newest good one is used. With `inference`, BFloat16 or Char, each
// tensor is packed as GLaM.prepare_for_inference does, straight from the mapped file: the float32 model is never in
// memory. Throws CheckpointError naming the tensor when one is missing, unknown to the configuration, or not Float with
// the configuration's shape; c10::Error for a model that cannot be packed.
nn::GLaM load_model(const std::filesystem::path& path, Verify verify = Verify::kHashes,
                    std::optional<torch::ScalarType> inference = std::nullopt);

}  // namespace glam
