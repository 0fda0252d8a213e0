// Forward and backward passes of one head, made of the parts in attention_block.h. Format: what products are made in.
#pragma once

#include "cpu/kernels/attention_block.h"
#include "cpu/kernels/gemm_few_tiles.h"

namespace glam::cpu::GLAM_ISA {

// Up to this many queries, a block of kQueries columns would be mostly empty: see attend_one.
inline constexpr int64_t kFewQueries = 4;

// Rows of gradients are added by distance, each to a line one element further: a line of its own for the next few, for what
// has just been stored is not loaded at once.
inline constexpr int64_t kLines = 4;

template <class T, class Format>
struct HeadKernels {
  using Element = typename Format::Element;
  using Vector = typename VectorOf<T>::type;
  static constexpr int64_t Q = kQueries<T>;
  static constexpr int kVectors = kRowVectors<T>;

  // What a forward pass works in. `keys` and `values` hold all keys.
  struct Forward {
    Element *keys, *values, *q_panel, *probabilities;
    T *scores, *out;

    Forward(Carver& carve, int64_t num_keys, int64_t A) {
      keys = carve.take<Element>(round_up_to_tiles(num_keys) * Format::steps(A));
      values = carve.take<Element>(columns_elements<Format>(A, num_keys));
      q_panel = carve.take<Element>(Format::steps(A) * Q);
      probabilities = carve.take<Element>(steps_of<Format>(kKeys) * Q);
      scores = carve.take<T>(round_up_to_tiles(num_keys) * Q);
      out = carve.take<T>(round_up_to_tiles(A) * Q);
    }
  };

  static int64_t forward_scratch(int64_t num_keys, int64_t A) {
    Carver carve(nullptr);
    Forward(carve, num_keys, A);
    return carve.bytes();
  }

  // One query: scores in [keys], keys and values read where they lie (kernels/gemm_few.h). The same bits, by the same
  // chains of multiply-adds.
  static void attend_one(const AttentionHead<T>& head, int64_t query, void* out, T* lse, char* scratch) {
    const int64_t position = head.query_position + query, num_keys = position + 1, A = head.A;
    Carver carve(scratch);
    auto* const q = carve.take<Element>(Format::steps(A));
    auto* const probabilities = carve.take<Element>(Format::steps(num_keys));
    const int64_t padded_keys = padded_columns<T>(num_keys);
    T *const scores = carve.take<T>(padded_keys), *const row = carve.take<T>(padded_columns<T>(A));
    load_few<Format>(rows_at(head.q, head.type, head.q_stride, query), 1, A, q);
    multiply_few<Format>(1, q, rows_at(head.k, head.type, head.k_stride, 0), 0, num_keys, A, scores, padded_keys);
    T largest = head.extra_logit ? T(0) : -infinity<T>;
    for (int64_t key = 0; key < num_keys; ++key) {
      scores[key] = finish_logit(head, scores[key] + head.line[position - key]);
    }
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
    for (int64_t key = 0; key < num_keys; ++key) scores[key] = flush(scores[key]);
    if (lse) *lse = log_of_sum(sum, shift);

    constexpr Type kType = sizeof(T) == sizeof(double) ? Type::f64 : Type::f32;
    load_few<Format>(rows_at(scores, kType, num_keys, 0), 1, num_keys, probabilities);
    multiply_few<Format>(1, probabilities, rows_at(head.v, head.type, head.v_stride, 0, true), 0, A, num_keys, row,
                         padded_columns<T>(A));
    const T inverse = inverse_of_sum(sum);
    for (int64_t a = 0; a < A; ++a) row[a] *= inverse;
    store_values(row, A, out, head.type);
  }

  static void forward(const AttentionHead<T>& head, int64_t begin, int64_t end, void* out, int64_t out_stride, T* lse,
                      char* scratch) {
    const int64_t A = head.A;
    if (end - begin <= kFewQueries) {
      for (int64_t query = begin; query < end; ++query) {
        const int64_t row = query - begin;
        attend_one(head, query, advance(out, head.type, row * out_stride), lse ? lse + row : nullptr, scratch);
      }
      return;
    }
    const int64_t num_keys = head.query_position + end, steps = steps_of<Format>(A), depth = Format::steps(A);
    Carver carve(scratch);
    const Forward work(carve, num_keys, A);
    begin_products();
    pack_left_strips<Format>(rows_at(head.k, head.type, head.k_stride, 0), 0, num_keys, A, work.keys);
    load_columns<Format>(rows_at(head.v, head.type, head.v_stride, 0, true), A, num_keys, work.values);

    for (int64_t query = begin; query < end; query += Q) {
      const Block<T> block = make_block(head, query, end);
      pack_strips<Format, Q>(rows_at(head.q, head.type, head.q_stride, query), 0, block.valid, A, work.q_panel);
      const T none = head.extra_logit ? T(0) : -infinity<T>;
      Vector largest[kVectors];
      for (Vector& part : largest) part = all_of(none);
      for_keys(block, [&](int64_t first, int64_t count) {
        T* const scores = work.scores + (first - block.key_begin) * Q;
        multiply_strips(count, steps, work.keys + first * depth, kTileRows * depth, work.q_panel, scores, Q, true);
        for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            Vector& score = part_of(scores + i * Q, v);
            const Vector finished = finish_scores(head, block, first + i, v, score);
            largest[v] = finished > largest[v] ? finished : largest[v];
            score = finished;
          }
        }
      });
      T shift[Q], sum[Q];
      Vector shifts[kVectors], sums[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        shifts[v] = largest[v] == -infinity<T> ? Vector{} : largest[v];
        // The extra logit 0 comes first.
        sums[v] = head.extra_logit ? exp(-shifts[v]) : Vector{};
      }
      for (int64_t i = 0; i < round_up_to_tiles(A) * Q; ++i) work.out[i] = T(0);
      for_keys(block, [&](int64_t first, int64_t count) {
        T* const scores = work.scores + (first - block.key_begin) * Q;
        make_rows<Format>(count, scores, nullptr, work.probabilities, [&](int64_t i, T* row) {
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            const Vector probability = exp(part_of(scores + i * Q, v) - shifts[v]);
            sums[v] += probability;
            part_of(row, v) = flush<T>(probability);
          }
        });
        const Element* const panel = side_of<Format>(scores, work.probabilities);
        add_over_keys<Format>(A, num_keys, work.values, first, count, panel, work.out);
      });
      for (int v = 0; v < kVectors; ++v) part_of(shift, v) = shifts[v], part_of(sum, v) = sums[v];
      for (int64_t i = 0; lse && i < block.valid; ++i) lse[query - begin + i] = log_of_sum(sum[i], shift[i]);
      for (int64_t q = 0; q < Q; ++q) sum[q] = inverse_of_sum(sum[q]);
      store_transposed(work.out, block.valid, A, sum, advance(out, head.type, (query - begin) * out_stride), head.type,
                       out_stride);
    }
    end_products();
  }

  struct Backward {
    Element *keys, *values, *key_columns, *q_panel, *grad_panel, *q_rows, *grad_rows, *left, *right;
    T *grad_k, *grad_v, *scores, *grad_scores, *slopes, *grad_q, *lines;
    int64_t wide;         // A in whole panels
    int64_t line_stride;  // of kLines sums by distance, each padded as the bias line

    Backward(Carver& carve, int64_t num_keys, int64_t A) : wide(padded_columns<T>(A)) {
      keys = carve.take<Element>(round_up_to_tiles(num_keys) * Format::steps(A));
      values = carve.take<Element>(round_up_to_tiles(num_keys) * Format::steps(A));
      key_columns = carve.take<Element>(columns_elements<Format>(A, num_keys));
      q_panel = carve.take<Element>(Format::steps(A) * Q);
      grad_panel = carve.take<Element>(Format::steps(A) * Q);
      q_rows = carve.take<Element>(Format::steps(Q) * wide);
      grad_rows = carve.take<Element>(Format::steps(Q) * wide);
      left = carve.take<Element>(kKeys * Q);
      right = carve.take<Element>(steps_of<Format>(kKeys) * Q);
      const int64_t rows = round_up_to_tiles(num_keys);
      grad_k = carve.take<T>(rows * wide);
      grad_v = carve.take<T>(rows * wide);
      scores = carve.take<T>(rows * Q);
      grad_scores = carve.take<T>(rows * Q);
      slopes = carve.take<T>(num_keys * Q);
      grad_q = carve.take<T>(round_up_to_tiles(A) * Q);
      line_stride = num_keys + 2 * kLinePadding;
      lines = carve.take<T>(kLines * line_stride);
    }
  };

  static int64_t backward_scratch(int64_t num_keys, int64_t A) {
    Carver carve(nullptr);
    Backward(carve, num_keys, A);
    return carve.bytes();
  }

  // Query blocks in order, so that every sum over queries runs in their order.
  static void backward(const AttentionHead<T>& head, int64_t S, const AttentionGradients<T>& gradients, char* scratch) {
    const int64_t A = head.A, steps = steps_of<Format>(A), depth = Format::steps(A);
    const Type type = head.type;
    Carver carve(scratch);
    const Backward work(carve, S, A);
    begin_products();
    pack_left_strips<Format>(rows_at(head.k, type, head.k_stride, 0), 0, S, A, work.keys);
    pack_left_strips<Format>(rows_at(head.v, type, head.v_stride, 0), 0, S, A, work.values);
    load_columns<Format>(rows_at(head.k, type, head.k_stride, 0, true), A, S, work.key_columns);
    for (int64_t i = 0; i < round_up_to_tiles(S) * work.wide; ++i) work.grad_k[i] = work.grad_v[i] = T(0);
    for (int64_t i = 0; i < kLines * work.line_stride; ++i) work.lines[i] = T(0);
    T ones[Q];
    for (T& one : ones) one = T(1);

    for (int64_t query = 0; query < S; query += Q) {
      const Block<T> block = make_block(head, query, S);
      const auto q_at = [&](bool rows_are_k) { return rows_at(head.q, type, head.q_stride, query, rows_are_k); };
      const auto grad_at = [&](bool rows_are_k) {
        return rows_at(gradients.grad_out, type, gradients.grad_out_stride, query, rows_are_k);
      };
      pack_strips<Format, Q>(q_at(false), 0, block.valid, A, work.q_panel);
      pack_strips<Format, Q>(grad_at(false), 0, block.valid, A, work.grad_panel);
      // The same rows as the k of products with scores.
      pack_strips<Format, Q>(q_at(true), 0, A, block.valid, work.q_rows);
      pack_strips<Format, Q>(grad_at(true), 0, A, block.valid, work.grad_rows);
      T shift[Q];
      for (int64_t q = 0; q < Q; ++q) shift[q] = q < block.valid ? gradients.lse[query + q] : infinity<T>;
      Vector shifts[kVectors], delta[kVectors] = {};  // not <out, grad_out>: out is rounded
      for (int v = 0; v < kVectors; ++v) shifts[v] = part_of(shift, v);
      for_keys(block, [&](int64_t first, int64_t count) {
        T* const scores = work.scores + first * Q;
        T* const grad_scores = work.grad_scores + first * Q;
        const int64_t strip = kTileRows * depth;
        multiply_strips(count, steps, work.keys + first * depth, strip, work.q_panel, scores, Q, true);
        multiply_strips(count, steps, work.values + first * depth, strip, work.grad_panel, grad_scores, Q, true);
        make_rows<Format>(count, scores, work.left, nullptr, [&](int64_t i, T* row) {
          T* const probabilities = scores + i * Q;
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            const Vector score = finish_scores(head, block, first + i, v, part_of(probabilities, v));
            if (head.logit_cap > T(0)) put_slopes(head, score, work.slopes + (first + i) * Q, v);
            const Vector probability = flush<T>(exp(score - shifts[v]));
            delta[v] += probability * part_of(grad_scores + i * Q, v);
            part_of(probabilities, v) = probability;
            if (row != probabilities) part_of(row, v) = probability;
          }
        });
        add_over_queries<Format>(count, block.valid, A, side_of<Format>(scores, work.left), work.grad_rows,
                                 work.grad_v + first * work.wide, work.wide);
      });
      for (int64_t i = 0; i < round_up_to_tiles(A) * Q; ++i) work.grad_q[i] = T(0);
      for_keys(block, [&](int64_t first, int64_t count) {
        const T* const scores = work.scores + first * Q;
        T* const grad_scores = work.grad_scores + first * Q;
        make_rows<Format>(count, grad_scores, work.left, work.right, [&](int64_t i, T* row) {
          const int64_t distance = block.position - first - i;
          T* const line = work.lines + i % kLines * work.line_stride + kLinePadding + distance;
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            // What is masked has no probability and no slope.
            const Vector probability = part_of(scores + i * Q, v);
            Vector grad = probability * (part_of(grad_scores + i * Q, v) - delta[v]);
            if (head.logit_cap > T(0)) grad *= part_of(work.slopes + (first + i) * Q, v);
            grad = probability == T(0) ? Vector{} : grad;
            part_of(row, v) = grad;
            part_of(line, v) += grad;
          }
        });
        add_over_keys<Format>(A, S, work.key_columns, first, count, side_of<Format>(grad_scores, work.right),
                              work.grad_q);
        add_over_queries<Format>(count, block.valid, A, side_of<Format>(grad_scores, work.left), work.q_rows,
                                 work.grad_k + first * work.wide, work.wide);
      });
      store_transposed(work.grad_q, block.valid, A, ones, advance(gradients.grad_q, type, query * gradients.out_stride),
                       type, gradients.out_stride);
    }
    end_products();
    for (int64_t i = 0; i < work.line_stride; ++i) {
      for (int64_t line = 0; line < kLines; ++line) {
        gradients.grad_line[i - kLinePadding] += work.lines[line * work.line_stride + i];
      }
    }
    for (int64_t key = 0; key < S; ++key) {
      const int64_t to = key * gradients.out_stride;
      store_values(work.grad_k + key * work.wide, A, advance(gradients.grad_k, type, to), type);
      store_values(work.grad_v + key * work.wide, A, advance(gradients.grad_v, type, to), type);
    }
  }

  static constexpr AttentionFunctions<T> functions() {
    return {&forward, &backward, &forward_scratch, &backward_scratch, Q};
  }
};

}  // namespace glam::cpu::GLAM_ISA
