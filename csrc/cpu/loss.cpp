// CPU kernels of glam::linear_cross_entropy: tokens in blocks of which kKeptBytes hold what is kept, the vocabulary in
// blocks of columns.
//
// With gradients: a block's logits are multiplied once and the exponentials of their softmax kept, in hidden's dtype; once
// its rows' statistics are known they become the logits' gradients, which feed the two products that give the gradients
// of hidden and embedding: three products in all.
// Without gradients a block of columns lives in the thread that multiplied it. A separate backward multiplies the logits
// again, a block of columns at a time.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "cpu/gemm.h"
#include "cpu/kernels/loss.h"
#include "cpu/scratch.h"
#include "ops/checks.h"
#include "ops/large_memory.h"
#include "ops/packed_weight.h"

namespace glam::cpu {
namespace {

constexpr auto kOp = "glam::linear_cross_entropy";
constexpr int64_t kKeptBytes = 128 << 20;
constexpr int64_t kLogitColumns = 1024;  // multiplied at a time: narrow, so that many rows share a packed panel
constexpr int64_t kTokensPerTask = 64;
constexpr int64_t kGradientColumns = 4096;  // at a time: deep, so that the sums are seldom loaded and stored
static_assert(kGradientColumns % kLogitColumns == 0);

// Calls f(first, count) for parts of [0, size).
template <class F>
void for_each_part(int64_t size, int64_t most, F&& f) {
  for (int64_t first = 0; first < size; first += most) f(first, std::min(most, size - first));
}

// Logits of some tokens over the vocabulary rows held here. All tensors are contiguous.
struct Logits {
  Tensor hidden, embedding, targets;
  double scale, logit_cap;
  int64_t vocab_start;

  Logits(const Tensor& hidden_, const Tensor& embedding_, const Tensor& targets_, double scale_, double logit_cap_,
         int64_t vocab_start_)
      : hidden(hidden_.contiguous()),
        embedding(embedding_.contiguous()),
        targets(targets_.contiguous()),
        scale(scale_),
        logit_cap(logit_cap_),
        vocab_start(vocab_start_) {}
  int64_t num_tokens() const { return hidden.size(0); }
  int64_t columns() const { return packed::table_rows(embedding).expect_int(); }
  Precision precision() const { return precision_of(hidden.scalar_type()); }
  Logits tokens(int64_t first, int64_t count) const {
    return {hidden.narrow(0, first, count), embedding, targets.narrow(0, first, count), scale, logit_cap, vocab_start};
  }
  // Products that are not yet logits: scale and cap are the kernels' part.
  template <class T>
  LogitBlock<T> block(T* values, int64_t stride, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    return {values,
            stride,
            row,
            rows,
            vocab_start + column,
            columns,
            static_cast<T>(scale),
            static_cast<T>(logit_cap),
            targets.const_data_ptr<int64_t>()};
  }
  // Such values of columns [column, column + columns).
  Product product(int64_t column, int64_t columns) const {
    const bool is_packed = packed::is_packed(embedding, 2);
    const Operand b = is_packed ? outer_columns(embedding.narrow(0, column / kStripColumns, columns / kStripColumns))
                                : outer_rows(embedding.narrow(0, column, columns));
    return {.a = outer_rows(hidden), .b = b, .c = {}, .m = num_tokens(), .n = columns, .k = hidden.size(1)};
  }
};

void check_targets(const Tensor& targets, int64_t vocabulary) {
  const auto* values = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < targets.numel(); ++i) {
    TORCH_CHECK(values[i] >= 0 && values[i] < vocabulary, kOp, ": expected targets in [0, V) with V = ", vocabulary,
                " (give padding a valid id and weight 0), got ", values[i], " at ", i);
  }
}

// Of each token, over the vocabulary rows held here; [T] in the accumulation dtype.
struct Statistics {
  Tensor lse, target_logit, logit_sum;

  static Statistics zeros(const Tensor& hidden) {
    const auto options = hidden.options().dtype(accumulation_dtype(hidden.scalar_type()));
    const auto tokens = [&] { return at::zeros({hidden.size(0)}, options); };
    return {tokens(), tokens(), tokens()};
  }
  Statistics tokens(int64_t first, int64_t count) const {
    const auto part = [&](const Tensor& x) { return x.narrow(0, first, count); };
    return {part(lse), part(target_logit), part(logit_sum)};
  }
};

// Of all columns, exp(logit - maximum) * d logit / d (scale * product), where the maximum is that of the token's block of
// columns.
template <class T>
struct Kept {
  Tensor values;           // [tokens, V]
  std::vector<T> maximum;  // [blocks, tokens]
};

// Fills the statistics and, if it is not null, `kept`, whose values have their size. Blocks of columns are reduced on
// their own, whichever thread multiplies them, and their results are put together in order.
template <class T>
void reduce(const Logits& logits, const Statistics& statistics, Kept<T>* kept) {
  const int64_t num_tokens = logits.num_tokens();
  T* const target = statistics.target_logit.mutable_data_ptr<T>();
  std::vector<Product> products;
  for_each_part(logits.columns(), kLogitColumns,
                [&](int64_t column, int64_t columns) { products.push_back(logits.product(column, columns)); });
  const auto num_blocks = static_cast<int64_t>(products.size());
  std::vector<T> maximum(num_blocks * num_tokens), exp_sum(maximum.size()), logit_sum(maximum.size());
  const auto store = gemm_functions<T>(logits.precision()).store;
  const Output kept_out = kept ? output_to_part(kept->values, kept->values) : Output{};
  run_products<T>(
      products, logits.precision(), [&](int64_t block, int64_t row, int64_t rows, T* values, int64_t stride) {
        const int64_t column = block * kLogitColumns, columns = products[block].n;
        const int64_t first = block * num_tokens;
        loss_functions<T>().reduce(logits.block(values, stride, row, rows, column, columns), kept != nullptr,
                                   maximum.data() + first, exp_sum.data() + first, logit_sum.data() + first, target);
        if (kept) store(values, stride, rows, columns, kept_out, row, column);
      });
  at::parallel_for(0, num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      T largest = maximum[t], sum = 0, exps = 0;
      for (int64_t i = t; i < num_blocks * num_tokens; i += num_tokens) largest = std::max(largest, maximum[i]);
      for (int64_t i = t; i < num_blocks * num_tokens; i += num_tokens) {
        exps += exp_sum[i] * std::exp(maximum[i] - largest);
        sum += logit_sum[i];
      }
      statistics.lse.mutable_data_ptr<T>()[t] = largest + std::log(exps);
      statistics.logit_sum.mutable_data_ptr<T>()[t] = sum;
    }
  });
  if (kept) kept->maximum = std::move(maximum);
}

// d loss_sum / d logit = softmax * p - uniform, less `target` where the target is; times d logit / d product.
struct LossOptions {
  double z_loss, label_smoothing;
  int64_t vocabulary;
};
template <class T>
struct RowFactors {
  std::vector<T> softmax, target, uniform;
  std::vector<int32_t> row_of_token;  // padding has none: zeros, whatever hidden holds there

  // weights may be null.
  RowFactors(int64_t num_tokens, const T* lse, const T* weights, T grad, const LossOptions& options)
      : softmax(num_tokens), target(num_tokens), uniform(num_tokens), row_of_token(num_tokens, -1) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      const T weight = grad * (weights ? weights[t] : T(1));
      if (weight == T(0)) continue;
      row_of_token[t] = static_cast<int32_t>(t);
      softmax[t] = weight * static_cast<T>(1 + 2 * options.z_loss * lse[t]);
      target[t] = weight * static_cast<T>(1 - options.label_smoothing);
      uniform[t] = weight * static_cast<T>(options.label_smoothing / options.vocabulary);
    }
  }
};

// values <- d loss_sum / d product of token t in columns [first, first + count); first is a block's. The target's comes
// from its own logit, which is not rounded.
template <class T>
void differentiate_kept(const Logits& logits, const Statistics& statistics, const RowFactors<T>& factors,
                        const Kept<T>& kept, int64_t t, int64_t first, int64_t count, T* values) {
  if (factors.row_of_token[t] < 0) {
    std::fill_n(values, count, T(0));  // padding: nothing of it passes, not even a NaN
    return;
  }
  const T scale = static_cast<T>(logits.scale), lse = statistics.lse.const_data_ptr<T>()[t];
  const T softmax = factors.softmax[t], uniform = factors.uniform[t];
  const Type type = type_of(kept.values);
  const void* const row = advance(kept.values.const_data_ptr(), type, t * logits.columns());
  for_each_part(count, kLogitColumns, [&](int64_t offset, int64_t columns) {
    const int64_t column = first + offset, block = column / kLogitColumns;
    const T factor = softmax * scale * std::exp(kept.maximum[block * logits.num_tokens() + t] - lse);
    loss_functions<T>().differentiate_kept(advance(row, type, column), type, columns, factor, uniform * scale,
                                           values + offset);
  });
  const int64_t target = logits.targets.const_data_ptr<int64_t>()[t] - logits.vocab_start - first;
  if (target < 0 || target >= count) return;
  const T logit = statistics.target_logit.const_data_ptr<T>()[t];
  const T share = logits.logit_cap > 0 ? logit / static_cast<T>(logits.logit_cap) : T(0);
  values[target] = (softmax * std::exp(logit - lse) - uniform - factors.target[t]) * (T(1) - share * share) * scale;
}

// Gradients to add to: hidden [tokens, D] in the accumulation dtype, embedding [V, D]; undefined if not wanted.
struct Gradients {
  Tensor hidden, embedding;
  bool embedding_is_empty = true;  // overwritten then
};

// kept: of all columns; null: they are multiplied again.
template <class T>
void add_gradients(const Logits& logits, const Statistics& statistics, const RowFactors<T>& factors,
                   const Kept<T>* kept, const Gradients& gradients) {
  const int64_t num_tokens = logits.num_tokens(), D = logits.hidden.size(1);
  const Precision precision = logits.precision();
  const Tensor buffer =
      empty_large({num_tokens, std::min(kGradientColumns, logits.columns())}, logits.hidden.options());
  const Output buffer_out = output_to(buffer);
  const T* const lse = statistics.lse.const_data_ptr<T>();
  const auto store = [&](T* values, int64_t stride, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    gemm_functions<T>(precision).store(values, stride, rows, columns, buffer_out, row, column);
  };
  for_each_part(logits.columns(), kGradientColumns, [&](int64_t first, int64_t count) {
    if (kept) {
      at::parallel_for(0, num_tokens, 1, [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        T* const values = scratch.get<T>(count);
        for (int64_t t = begin; t < end; ++t) {
          differentiate_kept(logits, statistics, factors, *kept, t, first, count, values);
          store(values, count, t, 1, 0, count);
        }
      });
    } else {
      std::vector<Product> again;
      for_each_part(count, kLogitColumns,
                    [&](int64_t offset, int64_t columns) { again.push_back(logits.product(first + offset, columns)); });
      run_products<T>(again, precision, [&](int64_t block, int64_t row, int64_t rows, T* values, int64_t stride) {
        const int64_t offset = block * kLogitColumns, columns = again[block].n;
        loss_functions<T>().differentiate(logits.block(values, stride, row, rows, first + offset, columns), lse,
                                          factors.softmax.data(), factors.target.data(), factors.uniform.data());
        store(values, stride, row, rows, offset, columns);
      });
    }
    const Tensor grad_logits = buffer.narrow(1, 0, count);
    std::vector<Product> products;
    if (gradients.hidden.defined()) {
      products.push_back({.a = outer_rows(grad_logits),
                          .b = outer_columns(logits.embedding.narrow(0, first, count)),
                          .c = output_to(gradients.hidden, true),
                          .m = num_tokens,
                          .n = D,
                          .k = count});
    }
    if (gradients.embedding.defined()) {
      const Tensor rows = gradients.embedding.narrow(0, first, count);
      Operand hidden = outer_rows(logits.hidden);
      hidden.rows_are_k = true;
      hidden.row_index = factors.row_of_token.data();
      products.push_back(
          {.a = outer_rows(grad_logits.t()),
           .b = hidden,
           .c = gradients.embedding_is_empty ? output_to_part(rows, gradients.embedding) : output_to(rows, true),
           .m = count,
           .n = D,
           .k = num_tokens});
    }
    run_products<T>(products, precision);
  });
}

std::tuple<Tensor, Tensor, Tensor> vocabulary_statistics(const Tensor& hidden, const Tensor& embedding,
                                                         const Tensor& targets, double scale, double logit_cap,
                                                         int64_t vocab_start, int64_t vocabulary) {
  const Logits logits(hidden, embedding, targets, scale, logit_cap, vocab_start);
  check_targets(logits.targets, vocabulary);
  const Statistics statistics = Statistics::zeros(hidden);
  dispatch_accumulation(hidden.scalar_type(), [&](auto zero) { reduce<decltype(zero)>(logits, statistics, nullptr); });
  return {statistics.lse, statistics.target_logit, statistics.logit_sum};
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> with_gradients(const Tensor& hidden, const Tensor& embedding,
                                                                  const Tensor& targets, const OptionalTensor& weights_,
                                                                  double scale, double z_loss, double label_smoothing,
                                                                  double logit_cap, bool needs_hidden,
                                                                  bool needs_embedding) {
  const Logits logits(hidden, embedding, targets, scale, logit_cap, 0);
  const int64_t num_tokens = hidden.size(0), vocabulary = embedding.size(0);
  check_targets(logits.targets, vocabulary);
  const OptionalTensor weights = weights_ ? OptionalTensor(weights_->contiguous()) : std::nullopt;
  const Statistics statistics = Statistics::zeros(hidden);
  const auto options = statistics.lse.options();
  const Tensor grad_hidden = at::zeros(needs_hidden ? hidden.sizes() : at::IntArrayRef({0}), options);
  const Tensor grad_embedding = dispatch_accumulation(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t most = std::max<int64_t>(1, kKeptBytes / (hidden.element_size() * vocabulary));
    const int64_t blocks = (num_tokens + most - 1) / most;
    const int64_t tokens_per_block = blocks == 0 ? 1 : (num_tokens + blocks - 1) / blocks;
    // More than one block is added up in the accumulation dtype.
    const Tensor sum = !needs_embedding ? at::empty({0}, embedding.options())
                                        : empty_large(embedding.sizes(), blocks > 1 ? options : embedding.options());
    if (num_tokens == 0) sum.zero_();
    // A smoothed label's part of a capped logit's gradient needs the slope alone.
    const bool keeps = logit_cap == 0 || label_smoothing == 0;
    Kept<T> of_all_columns;
    Kept<T>* const kept = keeps ? &of_all_columns : nullptr;
    const Tensor values =
        empty_large({keeps ? std::min(tokens_per_block, num_tokens) : 0, vocabulary}, hidden.options());
    for_each_part(num_tokens, tokens_per_block, [&](int64_t first, int64_t count) {
      const Logits block = logits.tokens(first, count);
      const Statistics of_block = statistics.tokens(first, count);
      if (kept) kept->values = values.narrow(0, 0, count);
      reduce<T>(block, of_block, kept);
      const RowFactors<T> factors(count, of_block.lse.const_data_ptr<T>(),
                                  weights ? weights->const_data_ptr<T>() + first : nullptr, T(1),
                                  {z_loss, label_smoothing, vocabulary});
      add_gradients<T>(block, of_block, factors, kept,
                       {.hidden = needs_hidden ? grad_hidden.narrow(0, first, count) : Tensor(),
                        .embedding = needs_embedding ? sum : Tensor(),
                        .embedding_is_empty = first == 0});
    });
    return sum.to(embedding.scalar_type());
  });
  const auto [loss_sum, nll] = cross_entropy_sum(statistics.lse, statistics.target_logit, statistics.logit_sum, weights,
                                                 z_loss, label_smoothing, vocabulary);
  return {loss_sum, nll, statistics.lse, grad_hidden, grad_embedding};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_loss, const OptionalTensor& grad_nll,
                                    const OptionalTensor& grad_lse, const Tensor& hidden, const Tensor& embedding,
                                    const Tensor& targets, const OptionalTensor& weights_, const Tensor& lse,
                                    double scale, double z_loss, double label_smoothing, double logit_cap,
                                    int64_t vocab_start, int64_t vocabulary) {
  checks::linear_cross_entropy_backward(grad_nll, grad_lse);
  const Logits logits(hidden, embedding, targets, scale, logit_cap, vocab_start);
  const Tensor weights = weights_ ? weights_->contiguous() : Tensor();
  const Tensor grad_hidden = at::zeros(hidden.sizes(), lse.options());
  const Tensor grad_embedding = empty_large(embedding.sizes(), embedding.options());
  dispatch_accumulation(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RowFactors<T> factors(hidden.size(0), lse.const_data_ptr<T>(),
                                weights_ ? weights.const_data_ptr<T>() : nullptr, *grad_loss.const_data_ptr<T>(),
                                {z_loss, label_smoothing, vocabulary});
    add_gradients<T>(logits, {.lse = lse}, factors, nullptr, {grad_hidden, grad_embedding});
  });
  return {grad_hidden.to(hidden.scalar_type()), grad_embedding};
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("_vocabulary_statistics", vocabulary_statistics);
  m.impl("_cross_entropy_sum", cross_entropy_sum);
  m.impl("_linear_cross_entropy_with_gradients", with_gradients);
  m.impl("_linear_cross_entropy_backward", backward);
}

}  // namespace glam::cpu
