// A model's parameters as inference wants them.
#pragma once

#include <glam/nn.h>

#include <string>

namespace glam::nn {

// Throws c10::ValueError for a configuration whose weights cannot be packed, or a dtype other than BFloat16 and Char.
void check_can_be_prepared(const GLaMConfig& config, torch::ScalarType dtype);

// What takes the place of the plain parameter `name`; itself where it is no product's weight.
Tensor prepared(const std::string& name, const Tensor& plain, torch::ScalarType dtype);

// `parameter` holds `values` from now on, whatever it held, and wants no gradient.
void replace(Tensor parameter, const Tensor& values);

}  // namespace glam::nn
