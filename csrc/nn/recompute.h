// Activation recomputation of one block: the forward keeps only the block's input, the backward runs the block again.
//
// The block's parameters are inputs of the autograd node, so their gradients arrive where they always do: hooks (DDP's
// among them) and the accumulation of tied weights work as without recomputation. Routing noise is counter-based, so the
// second run is the first one.
#pragma once

#include <glam/nn.h>

namespace glam::nn {

BlockOutput forward_with_recompute(BlockImpl& block, const Tensor& x_BSD, const std::optional<Tensor>& segment_ids,
                                   const std::optional<Tensor>& token_mask, const Randomness& random);

}  // namespace glam::nn
