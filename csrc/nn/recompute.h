// Activation recomputation of one block: the forward keeps only the block's input, the backward runs the block again.
//
// The block's parameters are inputs of the autograd node, so their gradients arrive where they always do: hooks (DDP's
// among them) and the accumulation of tied weights work as without recomputation. The second run is the first one:
// routing noise is counter-based, the mode and autocast's state are those of the forward, a parameter changed in between
// is an error, and it works on leaves of its own, so that no hook of a parameter runs twice.
#pragma once

#include <glam/nn.h>

namespace glam::nn {

BlockOutput forward_with_recompute(BlockImpl& block, const Tensor& x_BSD, const std::optional<Tensor>& segment_ids,
                                   const std::optional<Tensor>& token_mask, bool training, const Randomness& random);

}  // namespace glam::nn
