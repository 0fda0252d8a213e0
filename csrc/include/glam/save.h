// A model as a checkpoint folder, without Python.
#pragma once

#include <glam/checkpoint.h>
#include <glam/nn.h>

#include <filesystem>
#include <string>

namespace glam {

// Writes the weights of a model as the checkpoint folder `folder`, which must not exist yet, in a folder that does or can
// be made: what load_model, deploy_cpp and Python's GLaM.from_checkpoint take. trainer_json is the text of an object that
// is kept beside the weights; readers know "tokenizer_hash" (of TokenFolder) in it.
//
// `world` names the group of all ranks, "" is one process; every rank calls, and writes the experts that it alone or
// first holds to its own file on a file system that all share; rank 0 writes the rest. No tensor is gathered. The folder
// appears in one step once everything is on the disk. Throws CheckpointError on every rank where one rank fails; nothing
// half-written stays.
void save_model(const nn::GLaM& model, const std::filesystem::path& folder, const std::string& trainer_json = "{}",
                const std::string& world = "");

}  // namespace glam
