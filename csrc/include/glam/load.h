// A checkpoint folder as a model, without Python.
#pragma once

#include <glam/checkpoint.h>
#include <glam/nn.h>

#include <filesystem>

namespace glam {

// The model of a checkpoint folder, in eval mode, its parameters copied from the files. `path` is what open_checkpoint
// takes: a checkpoint folder, or a run, of which the newest good one is used. Throws CheckpointError naming the tensor
// when one is missing, unknown to the configuration, or not Float with the configuration's shape.
nn::GLaM load_model(const std::filesystem::path& path, Verify verify = Verify::kHashes);

}  // namespace glam
