// Kernels around the products of glam::relative_attention: everything of a score that is not <q, k>, its gradient, the
// sums of the bias's gradient, and the cache. The formulas are those of ops/attention.cpp.
//
// B sequences, N queries, L keys, H heads, A head dim. S is the accumulation type: float64 for Type::f64, else float32.
#pragma once

#include "cuda/kernels/types.h"

namespace glam::cuda {

// Query n of sequence b stands at position n, or positions[b] + n, and sees the keys at positions up to its own.
struct AttentionShape {
  int64_t B, N, L, H;
  const int32_t* segments;   // [B, L]: only keys of its own segment, 0 being of none; null: one segment
  const int32_t* positions;  // [B]: -1 is a row that sees nothing; a position without room for N gives NaN. Null: 0
  bool extra_logit;
};

// lines [H, L], S, from the table [H, 32], S: the bias of each distance.
void attention_lines(const void* table, Type type, int64_t H, int64_t L, void* lines, cudaStream_t stream);

// bias [B, H, N, stride], type: the line's value where the query sees the key, else -infinity, also for keys from L on.
void attention_bias(const AttentionShape& shape, Type type, const void* lines, int64_t stride, void* bias,
                    cudaStream_t stream);

// From the log of a softmax's sum without the extra logit, raw_lse [B, H, raw_stride]: lse and factor [B, H, N], what
// the softmax's average of v is multiplied by. All float32. lse may be null.
void attention_factors(const AttentionShape& shape, const float* raw_lse, int64_t raw_stride, float* lse, float* factor,
                       cudaStream_t stream);

// Heads [head, head + heads) of sequences [sequence, sequence + sequences) of a shape.
struct AttentionPart {
  int64_t sequence, sequences, head, heads;
};

// scores [sequences, heads, N, L], S: <q, k> becomes the numerator of its probability, rounded to `type`, 0 where
// masked. lse and factor (1 / the denominator, 0 where that is 0) [sequences, heads, N], S. logit_cap 0: none.
void attention_softmax(const AttentionShape& shape, const AttentionPart& part, Type type, const void* lines,
                       double logit_cap, void* scores, void* lse, void* factor, cudaStream_t stream);

// scores: <q, k> becomes the probability, grads: d loss / d probability becomes d loss / d score; both S and both
// rounded to `type`. lse as above.
void attention_score_gradient(const AttentionShape& shape, const AttentionPart& part, Type type, const void* lines,
                              double logit_cap, const void* lse, void* scores, void* grads, cudaStream_t stream);

// The gradient of the table [H, 32], S', from that of the scores, grads [rows of N, stride], type, one row of N per
// head of a sequence, N = L. In two steps with fixed orders: partial [rows, bias_gradient_chunks(N), 32] for any part
// of the rows, then the sum over all of partial [B, H, chunks, 32]. S' is the accumulation type of both calls' `type`.
int64_t bias_gradient_chunks(int64_t N);
void bias_gradient_partial(const void* grads, Type type, int64_t rows, int64_t N, int64_t stride, void* partial,
                           cudaStream_t stream);
void bias_gradient(const void* partial, Type type, int64_t B, int64_t H, int64_t N, void* grad, cudaStream_t stream);

// Rows of `columns` elements: x [B, N, columns] into cache [B, L, columns] at positions[b] .. positions[b] + N - 1.
// Nothing is written for a position of -1, or one without room.
void write_cache(const void* x, Type type, int64_t B, int64_t N, int64_t L, int64_t columns, const int32_t* positions,
                 void* cache, cudaStream_t stream);
// out [B, L, columns] <- the cache's rows below positions[b] + N, zeros above: there the cache may hold anything.
void read_cache(const void* cache, Type type, int64_t B, int64_t N, int64_t L, int64_t columns,
                const int32_t* positions, void* out, cudaStream_t stream);

}  // namespace glam::cuda
