// What a name in TorchScript source means when there is no Python to ask: torch.*, torch.ops.glam.*, dtypes, the type
// Options, and the functions of glam_ext/functional.py as functional.*.
#pragma once

#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/frontend/resolver.h>

#include <memory>

namespace glam::jit {

// functions: where functional.* lives, under the prefix; null while the functions themselves are being defined.
torch::jit::ResolverPtr make_resolver(c10::TypePtr options_type,
                                      std::shared_ptr<torch::jit::CompilationUnit> functions);

// The qualified prefix of the functions of glam_ext/functional.py in an archive.
inline constexpr auto kFunctionalPrefix = "__torch__.glam.functional";

}  // namespace glam::jit
