// Which rows travel between the ranks of a group: the splits of exchange and exchange_mlp, checked.
#pragma once

#include "ops/common.h"

namespace glam {

using Splits = std::vector<SymInt>;

SymInt sum(c10::SymIntArrayRef splits);

// Rows sent and received, one count for each chunk and rank, in order (chunk, rank).
struct Route {
  Splits sent, received;

  Route reversed() const { return {.sent = received, .received = sent}; }
};

// The route of an op's out_splits and in_splits, or of equal parts of num_rows where both are empty. Defined in
// ops/exchange.cpp.
Route checked_route(const char* op, const SymInt& num_rows, c10::SymIntArrayRef out_splits,
                    c10::SymIntArrayRef in_splits, c10::string_view group, int64_t chunks = 1);

}  // namespace glam
