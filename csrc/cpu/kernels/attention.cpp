#include "cpu/kernels/attention.h"

#include "cpu/kernels/attention_block.h"

namespace glam::cpu::GLAM_ISA {
namespace {

// Up to this many queries, a block of kQueries columns would be mostly empty: see attend_one.
constexpr int64_t kFewQueries = 4;

template <class T>
int64_t forward_scratch(int64_t num_keys, int64_t A) {
  const int64_t keys = padded_rows<T>(num_keys);
  return rounded(keys * A) + rounded(padded_rows<T>(A) * num_keys) + rounded(keys * kQueries<T>) +
         rounded(A * kQueries<T>) + rounded(padded_rows<T>(A) * kQueries<T>) + 2 * rounded(A);
}

// One query: scores in [keys], vectorised across keys except for the sum, whose order is the block's. The same bits, by
// the same chains of multiply-adds; they are spelt out because the compiler may split a product from its sum.
template <class T>
void attend_one(const AttentionHead<T>& head, int64_t query, void* out, T* lse, T* scratch) {
  const int64_t position = head.query_position + query, num_keys = position + 1, A = head.A;
  Carver<T> carve{scratch};
  T* const panel = carve(A * kQueries<T>);
  T* const scores = carve(padded_columns<T>(num_keys));
  T* const q = carve(A * kTileRows);
  T *const value = carve(A), *const row = carve(A);
  pack_strips<FullPrecision<T>, kTileRows>(query_rows(head, query), 0, 1, A, q);
  const Operand keys = key_rows(head);
  for (int64_t key = 0; key < num_keys; key += kQueries<T>) {
    const int64_t valid = num_keys - key < kQueries<T> ? num_keys - key : kQueries<T>;
    pack_strips<FullPrecision<T>, kQueries<T>>(keys, key, key + valid, A, panel);
    multiply_tile<1>(A, q, panel, scores + key, 0, true);
  }
  T largest = head.extra_logit ? T(0) : -infinity<T>;
  for (int64_t key = 0; key < num_keys; ++key)
    scores[key] = finish_logit(head, scores[key] + head.line[position - key]);
  if (head.segments) {
    const int32_t own = head.segments[position];
    for (int64_t key = 0; key < num_keys; ++key) {
      scores[key] = head.segments[key] == own && own != 0 ? scores[key] : -infinity<T>;
    }
  }
  for (int64_t key = 0; key < num_keys; ++key) largest = scores[key] > largest ? scores[key] : largest;
  const T shift = largest == -infinity<T> ? T(0) : largest;
  for (int64_t key = 0; key < num_keys; ++key) scores[key] = exp(scores[key] - shift);
  T sum = head.extra_logit ? exp(-shift) : T(0);
  for (int64_t key = 0; key < num_keys; ++key) sum += scores[key];
  const T inverse = inverse_of_sum(sum);
  for (int64_t key = 0; key < num_keys; ++key) scores[key] = flush(scores[key] * inverse);
  if (head.type == Type::bf16) {
    for (int64_t key = 0; key < num_keys; ++key) scores[key] = round_to_bf16(scores[key]);
  }
  if (lse) *lse = log_of_sum(sum, shift);

  for (int64_t a = 0; a < A; ++a) row[a] = T(0);
  for (int64_t key = 0; key < num_keys; ++key) {
    load_values(advance(head.v, head.type, key * head.v_stride), head.type, A, value);
    for (int64_t a = 0; a < A; ++a) row[a] = multiply_add(scores[key], value[a], row[a]);
  }
  store_values(row, A, out, head.type);
}

template <class T>
void forward(const AttentionHead<T>& head, int64_t begin, int64_t end, void* out, int64_t out_stride, T* lse,
             T* scratch) {
  const int64_t A = head.A;
  if (end - begin <= kFewQueries) {
    for (int64_t query = begin; query < end; ++query) {
      const int64_t row = query - begin;
      attend_one(head, query, advance(out, head.type, row * out_stride), lse ? lse + row : nullptr, scratch);
    }
    return;
  }
  const int64_t num_keys = head.query_position + end;
  Carver<T> carve{scratch};
  T* const k_panels = carve(padded_rows<T>(num_keys) * A);
  T* const v_panels = carve(padded_rows<T>(A) * num_keys);
  T* const scores = carve(padded_rows<T>(num_keys) * kQueries<T>);
  T* const q_panel = carve(A * kQueries<T>);
  T* const block_out = carve(padded_rows<T>(A) * kQueries<T>);
  T* const row = carve(A);
  pack_strips<FullPrecision<T>, kTileRows>(key_rows(head), 0, num_keys, A, k_panels);
  pack_strips<FullPrecision<T>, kTileRows>(value_columns(head), 0, A, num_keys, v_panels);

  for (int64_t query = begin; query < end; query += kQueries<T>) {
    const Block<T> block = make_block(head, query, end);
    block_scores(head, block, k_panels, q_panel, scores);
    T shift[kQueries<T>], sum[kQueries<T>];
    softmax(head, block, scores, shift, sum);
    for (int64_t i = 0; lse && i < block.valid; ++i) lse[query - begin + i] = log_of_sum(sum[i], shift[i]);
    multiply_transposed(A, num_keys, block, v_panels, scores, block_out);
    store_transposed(block_out, block.valid, A, row, advance(out, head.type, (query - begin) * out_stride), head.type,
                     out_stride);
  }
}

template <class T>
int64_t backward_scratch(int64_t num_keys, int64_t A) {
  const int64_t keys = padded_rows<T>(num_keys), Q = kQueries<T>;
  return 2 * rounded(keys * A) + rounded(padded_rows<T>(A) * num_keys) + 2 * rounded(keys * padded_columns<T>(A)) +
         2 * rounded(keys * Q) + 2 * rounded(A * Q) + 2 * rounded(padded_columns<T>(A) * Q) +
         rounded(padded_rows<T>(A) * Q) + rounded(kTileRows * Q) + rounded(A);
}

// Query blocks in order, so that every sum over queries runs in their order.
template <class T>
void backward(const AttentionHead<T>& head, int64_t S, const AttentionGradients<T>& gradients, T* scratch) {
  const int64_t A = head.A, keys = padded_rows<T>(S), wide = padded_columns<T>(A), Q = kQueries<T>;
  Carver<T> carve{scratch};
  T *const k_panels = carve(keys * A), *const v_panels = carve(keys * A);
  T* const k_columns = carve(padded_rows<T>(A) * S);
  T *const grad_k = carve(keys * wide), *const grad_v = carve(keys * wide);
  T *const scores = carve(keys * Q), *const grad_scores = carve(keys * Q);
  T *const q_panel = carve(A * Q), *const grad_panel = carve(A * Q);
  T *const q_rows = carve(wide * Q), *const grad_rows = carve(wide * Q);
  T* const block_out = carve(padded_rows<T>(A) * Q);
  T* const strip = carve(kTileRows * Q);
  T* const row = carve(A);
  AttentionHead<T> values = head;
  values.k = head.v;
  values.k_stride = head.v_stride;
  AttentionHead<T> keys_as_values = head;
  keys_as_values.v = head.k;
  keys_as_values.v_stride = head.k_stride;
  pack_strips<FullPrecision<T>, kTileRows>(key_rows(head), 0, S, A, k_panels);
  pack_strips<FullPrecision<T>, kTileRows>(key_rows(values), 0, S, A, v_panels);
  pack_strips<FullPrecision<T>, kTileRows>(value_columns(keys_as_values), 0, A, S, k_columns);
  for (int64_t i = 0; i < keys * wide; ++i) grad_k[i] = grad_v[i] = T(0);

  for (int64_t query = 0; query < S; query += Q) {
    const Block<T> block = make_block(head, query, S);
    block_scores(head, block, k_panels, q_panel, scores);
    const Operand grad_operand{.data = advance(gradients.grad_out, head.type, query * gradients.grad_out_stride),
                               .type = head.type,
                               .row_stride = gradients.grad_out_stride};
    pack_strips<FullPrecision<T>, Q>(grad_operand, 0, block.valid, A, grad_panel);
    multiply_panels(block.num_keys, Q, A, v_panels + block.key_begin * A, grad_panel, grad_scores, Q);
    score_gradients(head, block, gradients.lse + query, scores, grad_scores, gradients.grad_line);

    multiply_transposed(A, S, block, k_columns, grad_scores, block_out);
    store_transposed(block_out, block.valid, A, row, advance(gradients.grad_q, head.type, query * gradients.out_stride),
                     head.type, gradients.out_stride);
    // The same rows of q and grad_out, now as the k of products with scores.
    Operand q_operand = query_rows(head, query), grad_by_row = grad_operand;
    q_operand.rows_are_k = grad_by_row.rows_are_k = true;
    pack_strips<FullPrecision<T>, Q>(q_operand, 0, A, block.valid, q_rows);
    pack_strips<FullPrecision<T>, Q>(grad_by_row, 0, A, block.valid, grad_rows);
    accumulate_over_queries(block, A, grad_scores, q_rows, strip, grad_k + block.key_begin * wide);
    accumulate_over_queries(block, A, scores, grad_rows, strip, grad_v + block.key_begin * wide);
  }
  for (int64_t key = 0; key < S; ++key) {
    store_values(grad_k + key * wide, A, advance(gradients.grad_k, head.type, key * gradients.out_stride), head.type);
    store_values(grad_v + key * wide, A, advance(gradients.grad_v, head.type, key * gradients.out_stride), head.type);
  }
}

}  // namespace

extern const AttentionTable attention_table = {
    {&forward<float>, &backward<float>, &forward_scratch<float>, &backward_scratch<float>, kQueries<float>},
    {&forward<double>, &backward<double>, &forward_scratch<double>, &backward_scratch<double>, kQueries<double>},
};

}  // namespace glam::cpu::GLAM_ISA
