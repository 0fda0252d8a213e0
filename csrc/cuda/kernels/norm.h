// RMSNorm of rows [T, D]: y = x * root * scale with root = 1 / sqrt(mean(x^2) + eps), and its gradients.
//
// x, y, grad, grad_x [T, D] contiguous, of `type`; scale and grad_scale [D] float32 (float64 for float64), as
// everything between reading and writing is; the backward's two sums over a row are float64. Each array is read and
// written once.
// Source: Zhang and Sennrich (arXiv 1910.07467).
#pragma once

#include "cuda/kernels/types.h"

namespace glam::cuda {

void rms_norm(const void* x, Type type, const void* scale, double eps, int64_t T, int64_t D, void* y,
              cudaStream_t stream);

// Blocks of rows whose parts of grad_scale are added in the blocks' order; a function of T alone.
int64_t rms_norm_blocks(int64_t T);

// With r = root and s = grad * scale:  grad_x = r s - r^3 x mean(s x),  grad_scale = sum over T of grad * r x.
// `partial` is a workspace [rms_norm_blocks(T), D] of scale's dtype. T and D are at least 1.
void rms_norm_backward(const void* grad, const void* x, Type type, const void* scale, double eps, int64_t T, int64_t D,
                       void* grad_x, void* partial, void* grad_scale, cudaStream_t stream);

}  // namespace glam::cuda
