// Gathers of rows by a routing plan, as the torch side calls them (cpu/routing.cpp); indices were checked there.
//
// Letters: T tokens, K choices, R rows, D model dim. Scalar is the storage type of the rows (float, double, or Bf16: the
// bits of a bfloat16), Sum the type sums and gates are kept in.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/kernels/per_isa.h"

namespace glam::cpu {

using Bf16 = uint16_t;

template <class Scalar>
using SumOf = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

// Tokens [begin, end): y[t] = sum over k, ascending, of gates[t, k] * rows[row_of_choice[t, k]]; no gates: of 1.
template <class Row, class Scalar>
using Combine = void(const Row* rows_RD, const SumOf<Row>* gates_TK, const int32_t* row_of_choice_TK, int64_t begin,
                     int64_t end, int64_t K, int64_t D, Scalar* y_TD);

template <class Scalar>
struct RowFunctions {
  using Sum = SumOf<Scalar>;
  Combine<Scalar, Scalar>* combine;
  Combine<Sum, Scalar>* combine_sums;  // rows that were kept in the type of sums
  // Rows [begin, end) of choice c = t*K + k: grad_rows[r] = gates[c] * grad_y[t], grad_gates[c] = <rows[r], grad_y[t]>.
  // An empty row gets zeros; the gates of choices without a row are not touched.
  void (*combine_backward)(const Scalar* grad_y_TD, const Scalar* rows_RD, const Sum* gates_TK,
                           const int32_t* choice_of_row_R, int64_t begin, int64_t end, int64_t K, int64_t D,
                           Scalar* grad_rows_RD, Sum* grad_gates_TK);
};

struct RowTable {
  RowFunctions<float> f32;
  RowFunctions<double> f64;
  RowFunctions<Bf16> bf16;
};

GLAM_PER_ISA_TABLE(RowTable, row_table)

}  // namespace glam::cpu
