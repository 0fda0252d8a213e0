// How Adafactor's ops see a list of parameters: the shape of each, and where its parts lie in the tensors that hold those
// of the whole list one behind the other.
#pragma once

#include <utility>
#include <vector>

#include "ops/common.h"

namespace glam {

struct ParameterShape {
  bool factored;
  int64_t N, R, C;                  // factored: N matrices [R, C]; otherwise 1, 1 and the number of elements
  int64_t rows, columns, matrices;  // where its N R rows, N C columns (factored) and N matrices begin

  int64_t numel() const { return N * R * C; }
};

// Factored or not is for the op to say, or seen from the state, whose row_var has a dimension less than the parameter.
std::vector<ParameterShape> parameter_shapes(at::TensorList parameters, const std::vector<bool>& factored);
std::vector<ParameterShape> parameter_shapes(at::TensorList parameters, at::TensorList row_vars);

// The lengths of what holds the rows, and the columns, of all factored parameters.
std::pair<int64_t, int64_t> rows_and_columns(const std::vector<ParameterShape>& shapes);

// As the kernels take them.
std::vector<Tensor> contiguous(at::TensorList tensors);
// [length] float64 beside `like`, not written.
Tensor empty_doubles(const SymInt& length, const Tensor& like);

}  // namespace glam
