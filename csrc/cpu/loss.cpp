// CPU kernels of glam::linear_cross_entropy: the vocabulary is walked in blocks of kVocabularyBlock columns. Forward, a
// block of logits lives in the thread that multiplied it. Backward, the block's logit gradients [T, block] feed the two
// products that give the gradients of hidden and embedding.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>

#include "cpu/gemm.h"
#include "cpu/kernels/loss.h"
#include "ops/common.h"
#include "ops/large_memory.h"

namespace glam::cpu {
namespace {

constexpr auto kOp = "glam::linear_cross_entropy";
constexpr int64_t kVocabularyBlock = 4096;
constexpr int64_t kTokensPerTask = 64;

// Calls f(first column, columns) for each block of the vocabulary.
template <class F>
void for_each_block(int64_t vocabulary, F&& f) {
  for (int64_t column = 0; column < vocabulary; column += kVocabularyBlock) {
    f(column, std::min(kVocabularyBlock, vocabulary - column));
  }
}

// hidden [T, D] times a block of embedding rows; `finish` gets the finished rows of values.
template <class T, class F>
void multiply_block(const Tensor& hidden, const Tensor& embedding, int64_t column, int64_t columns, F&& finish) {
  const Operand b = outer_rows(embedding.narrow(0, column, columns));
  run_products<T>(
      {{.a = outer_rows(hidden), .b = b, .c = {}, .m = hidden.size(0), .n = columns, .k = hidden.size(1)}},
      precision_of(hidden.scalar_type()),
      [&](int64_t, int64_t row, int64_t rows, T* values, int64_t stride) { finish(row, rows, values, stride); });
}

void check_targets(const Tensor& targets, int64_t vocabulary) {
  const auto* values = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < targets.numel(); ++i) {
    TORCH_CHECK(values[i] >= 0 && values[i] < vocabulary, kOp, ": expected targets in [0, V) with V = ", vocabulary,
                " (give padding a valid id and weight 0), got ", values[i], " at ", i);
  }
}

std::tuple<Tensor, Tensor, Tensor> vocabulary_statistics(const Tensor& hidden_, const Tensor& embedding_,
                                                         const Tensor& targets_, double scale, double logit_cap,
                                                         int64_t vocab_start, int64_t vocabulary) {
  const Tensor hidden = hidden_.contiguous(), embedding = embedding_.contiguous(), targets = targets_.contiguous();
  check_targets(targets, vocabulary);
  const auto options = hidden.options().dtype(accumulation_dtype(hidden.scalar_type()));
  const int64_t num_tokens = hidden.size(0);
  const Tensor maximum = at::full({num_tokens}, -std::numeric_limits<double>::infinity(), options);
  const Tensor exp_sum = at::zeros({num_tokens}, options), logit_sum = at::zeros({num_tokens}, options);
  const Tensor target_logit = at::zeros({num_tokens}, options);
  dispatch_accumulation(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T *const max_T = maximum.mutable_data_ptr<T>(), *const exp_T = exp_sum.mutable_data_ptr<T>();
    T *const sum_T = logit_sum.mutable_data_ptr<T>(), *const target_T = target_logit.mutable_data_ptr<T>();
    for_each_block(embedding.size(0), [&](int64_t column, int64_t columns) {
      multiply_block<T>(hidden, embedding, column, columns, [&](int64_t row, int64_t rows, T* values, int64_t stride) {
        loss_functions<T>().accumulate({values, stride, row, rows, vocab_start + column, columns, static_cast<T>(scale),
                                        static_cast<T>(logit_cap), targets.const_data_ptr<int64_t>()},
                                       max_T, exp_T, sum_T, target_T);
      });
    });
    for (int64_t t = 0; t < num_tokens; ++t) max_T[t] += std::log(exp_T[t]);  // now the log of the sum of exp
  });
  return {maximum, target_logit, logit_sum};
}

std::tuple<Tensor, Tensor> cross_entropy_sum(const Tensor& lse, const Tensor& target_logit, const Tensor& logit_sum,
                                             const OptionalTensor& weights, double z_loss, double label_smoothing,
                                             int64_t vocabulary) {
  const Tensor loss_sum = at::empty({}, lse.options()), nll = at::empty_like(lse);
  const Tensor weights_T = weights ? weights->contiguous() : Tensor();
  dispatch_accumulation(lse.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *const lse_T = lse.const_data_ptr<T>(), *const target_T = target_logit.const_data_ptr<T>();
    const T* const sum_T = logit_sum.const_data_ptr<T>();
    const T* const weight_T = weights ? weights_T.const_data_ptr<T>() : nullptr;
    double total = 0;
    for (int64_t t = 0; t < lse.numel(); ++t) {
      nll.mutable_data_ptr<T>()[t] = lse_T[t] - target_T[t];
      if (weight_T && weight_T[t] == T(0)) continue;  // padding: not even a NaN enters the sum
      const double smooth = label_smoothing > 0 ? label_smoothing * (lse_T[t] - sum_T[t] / vocabulary) : 0;
      const double loss =
          (1 - label_smoothing) * (double(lse_T[t]) - target_T[t]) + smooth + z_loss * double(lse_T[t]) * lse_T[t];
      total += (weight_T ? weight_T[t] : T(1)) * loss;
    }
    *loss_sum.mutable_data_ptr<T>() = static_cast<T>(total);
  });
  return {loss_sum, nll};
}

void check_no_gradient(const char* name, const OptionalTensor& grad) {
  TORCH_CHECK(!grad || !grad->any().item<bool>(), kOp, ": expected gradients only at loss_sum, got one at ", name,
              " (detach it before it enters a loss)");
}

std::tuple<Tensor, Tensor> linear_cross_entropy_backward(const Tensor& grad_loss, const OptionalTensor& grad_nll,
                                                         const OptionalTensor& grad_lse, const Tensor& hidden_,
                                                         const Tensor& embedding_, const Tensor& targets_,
                                                         const OptionalTensor& weights, const Tensor& lse, double scale,
                                                         double z_loss, double label_smoothing, double logit_cap,
                                                         int64_t vocab_start, int64_t vocabulary) {
  check_no_gradient("nll", grad_nll);
  check_no_gradient("lse", grad_lse);
  const Tensor hidden = hidden_.contiguous(), embedding = embedding_.contiguous(), targets = targets_.contiguous();
  const Tensor weights_T = weights ? weights->contiguous() : Tensor();
  const int64_t num_tokens = hidden.size(0), D = hidden.size(1);
  const Tensor grad_hidden = at::zeros({num_tokens, D}, lse.options()),
               grad_embedding = empty_large(embedding.sizes(), embedding.options());
  const Precision precision = precision_of(hidden.scalar_type());
  dispatch_accumulation(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T grad = *grad_loss.const_data_ptr<T>();
    const T* const lse_T = lse.const_data_ptr<T>();
    std::vector<T> softmax_T(num_tokens), target_T(num_tokens), uniform_T(num_tokens);
    std::vector<int32_t> row_of_token(num_tokens, -1);  // padding has none: zeros, whatever hidden holds there
    for (int64_t t = 0; t < num_tokens; ++t) {
      const T weight = grad * (weights ? weights_T.const_data_ptr<T>()[t] : T(1));
      if (weight == T(0)) continue;
      row_of_token[t] = static_cast<int32_t>(t);
      softmax_T[t] = weight * static_cast<T>(1 + 2 * z_loss * lse_T[t]);
      target_T[t] = weight * static_cast<T>(1 - label_smoothing);
      uniform_T[t] = weight * static_cast<T>(label_smoothing / vocabulary);
    }
    const Tensor grad_logits =
        empty_large({num_tokens, std::min(kVocabularyBlock, embedding.size(0))}, hidden.options());
    for_each_block(embedding.size(0), [&](int64_t column, int64_t columns) {
      const Tensor block = grad_logits.narrow(1, 0, columns);
      const Output block_out = output_to(block);
      multiply_block<T>(hidden, embedding, column, columns, [&](int64_t row, int64_t rows, T* values, int64_t stride) {
        loss_functions<T>().differentiate(
            {values, stride, row, rows, vocab_start + column, columns, static_cast<T>(scale), static_cast<T>(logit_cap),
             targets.const_data_ptr<int64_t>()},
            lse_T, softmax_T.data(), target_T.data(), uniform_T.data());
        gemm_functions<T>(precision).store(values, stride, rows, columns, block_out, row, 0);
      });
      const Tensor rows = embedding.narrow(0, column, columns);
      run_products<T>({{.a = outer_rows(block),
                        .b = outer_columns(rows),
                        .c = output_to(grad_hidden, true),
                        .m = num_tokens,
                        .n = D,
                        .k = columns}},
                      precision);
      Operand hidden_k = outer_rows(hidden);
      hidden_k.rows_are_k = true;
      hidden_k.row_index = row_of_token.data();
      run_products<T>({{.a = outer_rows(block.t()),
                        .b = hidden_k,
                        .c = output_to_part(grad_embedding.narrow(0, column, columns), grad_embedding),
                        .m = columns,
                        .n = D,
                        .k = num_tokens}},
                      precision);
    });
  });
  return {grad_hidden.to(hidden.scalar_type()), grad_embedding};
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("_vocabulary_statistics", vocabulary_statistics);
  m.impl("_cross_entropy_sum", cross_entropy_sum);
  m.impl("_linear_cross_entropy_backward", linear_cross_entropy_backward);
}

}  // namespace glam::cpu
