// Matrix products over threads, on the product core of kernels/gemm.h.
//
// A list of independent products runs as one queue of (product, block) tasks, so that a product with many rows and many
// products with few use all threads alike. Packed B panels are made a few megabytes at a time, which stay in a shared
// cache until they are used, and the next ones while the last are multiplied. Every element's bits are independent of the
// list, the blocks and the threads.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <vector>

#include "cpu/kernels/gemm_table.h"

namespace glam::cpu {

// C[m, n] = sum over k of A[m, k] B[k, n]. Products of one list must not write the same element.
struct Product {
  Operand a;
  Operand b;
  Output c;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
};

// Receives finished rows instead of storing them: rows [row, row + rows) of product `index`, all n columns, in
// values[rows][stride], which it may overwrite.
template <class T>
using RowEpilogue = c10::function_ref<void(int64_t index, int64_t row, int64_t rows, T* values, int64_t stride)>;

template <class T>
void run_products(const std::vector<Product>& products, Precision precision);
template <class T>
void run_products(const std::vector<Product>& products, Precision precision, RowEpilogue<T> epilogue);

// The precision in which operands of this dtype, or rounded to it, are multiplied.
inline Precision precision_of(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? Precision::bf16 : Precision::full;
}

Type type_of(const at::Tensor& tensor);

// A 2-D tensor as an operand whose outer index is its rows (the A side) or its columns (the B side). A transposed view
// costs nothing; the tensor must have unit stride in one dimension (see with_unit_stride). The B side may also be a weight
// packed for inference (ops/packed_weight.h), which has three.
Operand outer_rows(const at::Tensor& matrix);
Operand outer_columns(const at::Tensor& matrix);
Output output_to(const at::Tensor& matrix, bool accumulate = false);
// Part of a tensor that is written once and as a whole: past the caches if they could not hold it.
Output output_to_part(const at::Tensor& matrix, const at::Tensor& whole);
at::Tensor with_unit_stride(const at::Tensor& matrix);

// f(T{}) with T the accumulation type of `dtype`: double for float64, otherwise float.
template <class F>
auto dispatch_accumulation(at::ScalarType dtype, F&& f) {
  return dtype == at::kDouble ? f(double{}) : f(float{});
}

}  // namespace glam::cpu
