// Adafactor's passes over one parameter, and sums of squares. Formulas: csrc/ops/adafactor.cpp.
//
// A factored parameter is N matrices [R, C]. weight, grad, row_var [N, R], col_var [N, C], row_sums and col_sums are
// contiguous, of `type`, float32 or float64; an unfactored parameter is `count` elements with a variance [count]. Sums
// over a whole matrix or tensor are float64. `skip` may be null; it, `step`, `lr` and the other scalars are read where
// they live. Each pass reads and writes a matrix once and leaves sums of fixed blocks, which a second kernel adds in a
// fixed order; `partial` is that workspace, of the size that the function above a launcher tells. All sizes are at
// least 1.
#pragma once

#include "cuda/kernels/types.h"

namespace glam::cuda {

struct MatrixShape {
  int64_t N, R, C;
};

// sum [] float64 of x^2 for x [count] of any type, and nonfinite []: whether a square is infinite or NaN in float32
// (float64 for float64). nonfinite may be null. count may be 0.
int64_t squared_norm_partial_bytes(int64_t count);
void squared_norm(const void* x, Type type, int64_t count, void* partial, double* sum, bool* nonfinite,
                  cudaStream_t stream);

// row_sums[n, r] and col_sums[n, c] of grad^2; weight_squares [] float64, the sum of weight^2.
int64_t adafactor_sums_partial_bytes(const MatrixShape& shape, Type type);
void adafactor_sums(const void* grad, const void* weight, Type type, const MatrixShape& shape, void* partial,
                    void* row_sums, void* col_sums, double* weight_squares, cudaStream_t stream);

// The state of a factored parameter; num_rows and num_cols are R and C of the whole one. row_totals [N] is the sum of
// row_var, scaled_squares [N] that of grad^2 / (row_var col_var); 1 and 0 where skip is set.
struct AdafactorDecay {
  const int64_t* step;
  const bool* skip;
  double decay, eps;
};
int64_t adafactor_stats_partial_bytes(const MatrixShape& shape);
void adafactor_stats(const void* grad, Type type, const MatrixShape& shape, const void* row_sums, const void* col_sums,
                     int64_t num_rows, int64_t num_cols, const AdafactorDecay& decay, void* row_var, void* col_var,
                     void* partial, double* row_totals, double* scaled_squares, cudaStream_t stream);

// The variance of an unfactored one; scaled_squares [1] is the sum of grad^2 / variance and row_totals [1] is 1.
int64_t adafactor_variance_partial_bytes(int64_t count);
void adafactor_variance(const void* grad, Type type, int64_t count, const AdafactorDecay& decay, void* variance,
                        void* partial, double* row_totals, double* scaled_squares, cudaStream_t stream);

// weight <- weight - lr max(RMS(weight), min_scale) u / max(1, RMS(u) / clipping), the squares being sums over
// num_elements.
struct AdafactorUpdate {
  const double *row_means, *weight_squares, *update_squares, *lr;
  const bool* skip;
  int64_t num_elements;
  double clipping, min_scale;
};
void adafactor_apply_matrix(void* weight, const void* grad, Type type, const MatrixShape& shape, const void* row_var,
                            const void* col_var, const AdafactorUpdate& update, cudaStream_t stream);
void adafactor_apply_elements(void* weight, const void* grad, const void* variance, Type type, int64_t count,
                              const AdafactorUpdate& update, cudaStream_t stream);

}  // namespace glam::cuda
