// What ops do while an AccumulateInPlace lives (glam/ops.h): they add to gradients that autograd would add to anyway.
#pragma once

#include "ops/common.h"

namespace glam::accumulate {

// Whether one lives in this thread and the backward pass that runs is over the whole graph, without create_graph.
bool applies();

// Whether autograd would only add to the leaf's gradient, which then may be taken, added to and returned.
bool can_take(const Tensor& leaf);
// A tensor of its own, which autograd need not copy even if someone holds the old one. Autograd puts back what the
// backward pass returns without copying it, and all hooks run as ever.
Tensor take(const Tensor& leaf);

// An op that is about to return the leaf's gradient says so; another one that shares the leaf, later in the same backward
// pass, gets it to add to and returns nothing. Undefined if there is none, or somebody else holds it.
void announce(const Tensor& leaf, const Tensor& gradient);
Tensor announced(const Tensor& leaf);

}  // namespace glam::accumulate
