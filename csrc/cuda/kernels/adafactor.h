// Adafactor's passes over a list of parameters, and sums of squares of a list of arrays. Formulas: csrc/ops/adafactor.cpp.
//
// A factored parameter is N matrices [R, C] with row_var [N, R] and col_var [N, C]; of one that is not, N and R are 1, C is
// the number of elements and row_var the variance. All arrays are contiguous; those of parameters are of `type`, float32
// or float64. row_sums, col_sums and the float64 sums over matrices hold the list's one parameter behind the other. `skip`
// may be null; it, `step`, `lr` and the other scalars are read where they live. Each pass reads and writes a matrix once
// and leaves sums of fixed blocks in `partial`, of the size that the function above a launcher tells, which another kernel
// adds in a fixed order. Launches hang on the shapes alone: one for as many items as a kernel's argument holds, about 50,
// and separate ones for rows that are not vectors. Parameters without elements keep their state.
#pragma once

#include <span>

#include "cuda/kernels/types.h"

namespace glam::cuda {

struct AdafactorParameter {
  bool factored;
  int64_t N, R, C;                                       // R and C of a factored one are below 2^31
  int64_t num_rows = 0, num_cols = 0, num_elements = 0;  // of the whole parameter
  int64_t rows = 0, columns = 0, matrices = 0;           // where its own begin in what holds those of the list
  const void* grad = nullptr;
  void *weight = nullptr, *row_var = nullptr, *col_var = nullptr;

  int64_t numel() const { return N * R * C; }
};
using AdafactorParameters = std::span<const AdafactorParameter>;

// sums [P] float64 of x^2 for arrays of any types, and nonfinite [P]: whether a square is infinite or NaN in float32
// (float64 for float64).
struct Array {
  const void* data;
  Type type;
  int64_t count;
};
int64_t squared_norm_partial_bytes(std::span<const Array> xs);
void squared_norm(std::span<const Array> xs, void* partial, double* sums, bool* nonfinite, cudaStream_t stream);

// row_sums and col_sums of grad^2; weight_squares [P] float64, the sums of weight^2.
int64_t adafactor_sums_partial_bytes(AdafactorParameters parameters, Type type);
void adafactor_sums(AdafactorParameters parameters, Type type, void* partial, void* row_sums, void* col_sums,
                    double* weight_squares, cudaStream_t stream);

// The state. Of each matrix: row_means, the sum of row_var / num_rows, and scaled_squares, that of grad^2 / (row_var
// col_var); if not factored 1 and the sum of grad^2 / variance; 1 and 0 where skip is set.
struct AdafactorDecay {
  const int64_t* step;
  const bool* skip;
  double decay, eps;
};
int64_t adafactor_stats_partial_bytes(AdafactorParameters parameters, Type type);
void adafactor_stats(AdafactorParameters parameters, Type type, const void* row_sums, const void* col_sums,
                     const AdafactorDecay& decay, void* partial, double* row_means, double* scaled_squares,
                     cudaStream_t stream);

// update_squares [P]: sums of row_means * scaled_squares over each parameter's matrices.
void adafactor_update_squares(const double* row_means, const double* scaled_squares,
                              std::span<const int64_t> num_matrices, double* update_squares, cudaStream_t stream);

// weight <- weight - lr max(RMS(weight), min_scale) u / max(1, RMS(u) / clipping), the squares being sums over
// num_elements.
struct AdafactorUpdate {
  const double *row_means, *weight_squares, *update_squares, *lr;
  const bool* skip;
  double clipping, min_scale;
};
void adafactor_apply(AdafactorParameters parameters, Type type, const AdafactorUpdate& update, cudaStream_t stream);

}  // namespace glam::cuda
