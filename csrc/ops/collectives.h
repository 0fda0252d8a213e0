// The functional collectives of torch.distributed by group name, reachable without Python. An empty name is the group
// of this one process: nothing is sent.
#pragma once

#include <string>

#include "ops/common.h"

namespace glam::collectives {

// The number of ranks of a registered process group; 1 for "".
int64_t group_size(const std::string& group);
// A new tensor with the elementwise "sum" or "max" over the group.
Tensor all_reduce(const Tensor& tensor, const std::string& operation, const std::string& group);
// Rows of dim 0 to and from every rank; splits count rows per rank and are in rank order.
Tensor all_to_all(const Tensor& rows, c10::SymIntArrayRef out_splits, c10::SymIntArrayRef in_splits,
                  const std::string& group);

}  // namespace glam::collectives
