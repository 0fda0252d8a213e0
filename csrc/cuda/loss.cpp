// CUDA side of glam::linear_cross_entropy: products by the library, in blocks whose logits take at most kLogitBytes,
// and what happens in a row of logits by kernels/loss.cu.
//
// A block is some tokens by the whole vocabulary where that is enough tokens for a product, else some tokens by some
// columns. Products of 16-bit activations are summed and stored in float32; the gradient of the logits is rounded to
// the activations' dtype for the two products that follow. The gradient of the embedding is added up over the blocks of
// tokens in the accumulation dtype. Nothing waits for the device: a target outside the vocabulary gives the token the
// nll NaN instead of an error.

#include "cuda/kernels/loss.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cuda/common.h"
#include "ops/checks.h"

namespace glam::cuda {
namespace {

constexpr auto kOp = "glam::linear_cross_entropy";
constexpr int64_t kLogitBytes = 128 << 20;
constexpr int64_t kFewestTokens = 128;  // of a block over the whole vocabulary
constexpr int64_t kTokens = 4096;       // of a block over a part of it

// The size of parts of nearly one size, each at most `most`.
int64_t part_size(int64_t size, int64_t most) {
  const int64_t parts = std::max<int64_t>(1, (size + most - 1) / most);
  return std::max<int64_t>(1, (size + parts - 1) / parts);
}

// Calls f(first, count) for parts of [0, size).
template <class F>
void for_each_part(int64_t size, int64_t part, F&& f) {
  for (int64_t first = 0; first < size; first += part) f(first, std::min(part, size - first));
}

// out (+)= a b, summed and stored in out's dtype.
void multiply(const Tensor& a, const Tensor& b, Tensor out, bool add) {
  const auto dtype = out.scalar_type();
  if (a.scalar_type() == dtype) {
    if (add) {
      at::addmm_out(out, out, a, b);
    } else {
      at::mm_out(out, a, b);
    }
  } else if (a.is_cuda()) {
    if (add) {
      at::addmm_out(out, out, a, b, dtype);
    } else {
      at::mm_out(out, a, b, dtype);
    }
  } else {
    multiply(a.to(dtype), b.to(dtype), out, add);  // the CPU has no product of two dtypes
  }
}

const Tensor& plain(const Tensor& embedding) {
  refuse_packed(kOp, "embedding", "[V, D]", embedding, 2);
  return embedding;
}

// The logits of some tokens over the vocabulary rows held here, and the memory for a block of them.
class Logits {
 public:
  Logits(const Tensor& hidden, const Tensor& embedding, const Tensor& targets, double scale, double logit_cap,
         int64_t vocab_start, int64_t vocabulary)
      : hidden_(hidden.contiguous()),
        embedding_(plain(embedding).to(hidden.scalar_type())),
        targets_(targets.contiguous()),
        dtype_(accumulation_dtype(hidden.scalar_type())),
        scale_(scale),
        logit_cap_(logit_cap),
        vocab_start_(vocab_start),
        vocabulary_(vocabulary) {
    const int64_t size = static_cast<int64_t>(c10::elementSize(dtype_)), T = num_tokens(), V = columns();
    const int64_t most = kLogitBytes / (size * std::max<int64_t>(1, V));
    if (most >= kFewestTokens) {
      tokens_ = part_size(T, most);
      columns_ = std::max<int64_t>(1, V);
    } else {
      tokens_ = part_size(T, kTokens);
      columns_ = round_up(part_size(V, kLogitBytes / (size * tokens_)), kLogitPadding);
    }
    products_ = at::empty({std::min(tokens_, T), round_up(std::min(columns_, V), kLogitPadding)},
                          hidden.options().dtype(dtype_));
  }

  int64_t num_tokens() const { return hidden_.size(0); }
  int64_t columns() const { return embedding_.size(0); }
  bool blocks_are_whole_rows() const { return columns_ >= columns(); }
  const Tensor& hidden() const { return hidden_; }
  Tensor per_token() const { return at::empty({num_tokens()}, products_.options()); }

  // Calls f(block, rows, columns), the last two as Part, for every block, tokens in the outer loop.
  struct Part {
    int64_t first, count;
    Tensor of(const Tensor& x, int64_t dim = 0) const { return x.narrow(dim, first, count); }
  };
  template <class F>
  void for_each_block(F&& f) const {
    for_each_part(num_tokens(), tokens_, [&](int64_t first, int64_t count) {
      const Part tokens{first, count};
      for_each_part(columns(), columns_, [&](int64_t first_column, int64_t column_count) {
        const Part of_columns{first_column, column_count};
        multiply(tokens.of(hidden_), of_columns.of(embedding_).t(),
                 products_.narrow(0, 0, count).narrow(1, 0, column_count), false);
        f(LogitBlock{.products = data(products_),
                     .type = type_of(hidden_),
                     .rows = count,
                     .columns = column_count,
                     .stride = products_.stride(0),
                     .first_column = vocab_start_ + first_column,
                     .vocabulary = vocabulary_,
                     .targets = targets_.const_data_ptr<int64_t>() + first,
                     .scale = scale_,
                     .logit_cap = logit_cap_},
          tokens, of_columns);
      });
    });
  }

  // Memory for the gradient of a block's logits: the products' own where the dtype is theirs.
  Tensor gradient_buffer() const {
    if (hidden_.scalar_type() == dtype_) return products_;
    return at::empty(products_.sizes(), hidden_.options());
  }
  Tensor embedding(const Part& of_columns) const { return of_columns.of(embedding_); }

 private:
  Tensor hidden_, embedding_, targets_, products_;
  at::ScalarType dtype_;
  double scale_, logit_cap_;
  int64_t vocab_start_, vocabulary_;
  int64_t tokens_, columns_;  // of a block
};

// Of each token, over the vocabulary rows held here; [T] in the accumulation dtype.
struct Statistics {
  Tensor lse, target_logit, logit_sum;

  explicit Statistics(const Logits& logits)
      : lse(logits.per_token()), target_logit(logits.per_token()), logit_sum(logits.per_token()) {}
  void add(const LogitBlock& block, const Logits::Part& tokens, bool first, cudaStream_t stream) const {
    const auto part = [&](const Tensor& x) { return mutable_data(tokens.of(x)); };
    loss_statistics(block, first, part(lse), part(target_logit), part(logit_sum), stream);
  }
};

// Turns blocks of products into gradients: hidden [T, D] and embedding [V, D], both in the accumulation dtype and
// undefined where they are not wanted.
class Gradients {
 public:
  // weights_T scales the tokens' losses; undefined: ones.
  Gradients(const Logits& logits, const Tensor& weights_T, double z_loss, double label_smoothing, bool needs_hidden,
            bool needs_embedding)
      : logits_(logits),
        weights_(weights_T),
        // 0 * NaN must not enter a sum over tokens.
        rows_(weights_T.defined() ? logits.hidden().masked_fill(weights_T.eq(0).unsqueeze(1), 0) : logits.hidden()),
        buffer_(logits.gradient_buffer()),
        z_loss_(z_loss),
        label_smoothing_(label_smoothing) {
    const auto options = logits.per_token().options();
    const int64_t T = logits.num_tokens(), V = logits.columns(), D = logits.hidden().size(1);
    // Blocks write all of it, unless there is none.
    const auto make = [&](at::IntArrayRef sizes) {
      return T == 0 || V == 0 ? at::zeros(sizes, options) : at::empty(sizes, options);
    };
    if (needs_hidden) hidden = make({T, D});
    if (needs_embedding) embedding = make({V, D});
  }

  void add(const LogitBlock& block, const Logits::Part& tokens, const Logits::Part& columns, const Tensor& lse,
           cudaStream_t stream) {
    loss_gradient(block, data(tokens.of(lse)), weights_.defined() ? data(tokens.of(weights_)) : nullptr, z_loss_,
                  label_smoothing_, mutable_data(buffer_), stream);
    const Tensor grad = buffer_.narrow(0, 0, tokens.count).narrow(1, 0, columns.count);
    if (hidden.defined()) multiply(grad, logits_.embedding(columns), tokens.of(hidden), columns.first > 0);
    if (embedding.defined()) multiply(grad.t(), tokens.of(rows_), columns.of(embedding), tokens.first > 0);
  }

  Tensor hidden, embedding;

 private:
  const Logits& logits_;
  Tensor weights_, rows_, buffer_;
  double z_loss_, label_smoothing_;
};

std::tuple<Tensor, Tensor, Tensor> vocabulary_statistics(const Tensor& hidden, const Tensor& embedding,
                                                         const Tensor& targets, double scale, double logit_cap,
                                                         int64_t vocab_start, int64_t vocabulary) {
  const OnDevice device(hidden);
  const Logits logits(hidden, embedding, targets, scale, logit_cap, vocab_start, vocabulary);
  const Statistics statistics(logits);
  logits.for_each_block([&](const LogitBlock& block, const Logits::Part& tokens, const Logits::Part& columns) {
    statistics.add(block, tokens, columns.first == 0, device.stream());
  });
  return {statistics.lse, statistics.target_logit, statistics.logit_sum};
}

std::tuple<Tensor, Tensor> cross_entropy_sum(const Tensor& lse_, const Tensor& target_logit_, const Tensor& logit_sum_,
                                             const OptionalTensor& weights_, double z_loss, double label_smoothing,
                                             int64_t vocabulary) {
  const OnDevice device(lse_);
  const Tensor lse = lse_.contiguous(), target_logit = target_logit_.contiguous(), logit_sum = logit_sum_.contiguous();
  const Tensor weights = weights_ ? weights_->contiguous() : Tensor();
  const int64_t T = lse.numel();
  const Tensor total = at::empty({}, lse.options()), nll = at::empty_like(lse);
  const Tensor partial = at::empty({loss_sum_blocks(T)}, lse.options().dtype(at::kDouble));
  loss_sum(data(lse), data(target_logit), data(logit_sum), data(weights), type_of(lse), z_loss, label_smoothing,
           vocabulary, T, mutable_data(nll), partial.mutable_data_ptr<double>(), mutable_data(total), device.stream());
  return {total, nll};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> with_gradients(const Tensor& hidden, const Tensor& embedding,
                                                                  const Tensor& targets, const OptionalTensor& weights_,
                                                                  double scale, double z_loss, double label_smoothing,
                                                                  double logit_cap, bool needs_hidden,
                                                                  bool needs_embedding) {
  const OnDevice device(hidden);
  const Tensor weights = weights_ ? weights_->contiguous() : Tensor();
  const int64_t vocabulary = embedding.size(0);
  const Logits logits(hidden, embedding, targets, scale, logit_cap, 0, vocabulary);
  TORCH_CHECK(logits.blocks_are_whole_rows(), kOp, ": expected a vocabulary whose logits can be kept, got ",
              vocabulary);
  const Statistics statistics(logits);
  Gradients gradients(logits, weights, z_loss, label_smoothing, needs_hidden, needs_embedding);
  logits.for_each_block([&](const LogitBlock& block, const Logits::Part& tokens, const Logits::Part& columns) {
    statistics.add(block, tokens, true, device.stream());
    gradients.add(block, tokens, columns, statistics.lse, device.stream());
  });
  const auto [total, nll] = cross_entropy_sum(statistics.lse, statistics.target_logit, statistics.logit_sum, weights_,
                                              z_loss, label_smoothing, vocabulary);
  const auto or_empty = [&](const Tensor& x, at::ScalarType dtype) {
    return x.defined() ? x.to(dtype) : at::empty({0}, hidden.options().dtype(dtype));
  };
  return {total, nll, statistics.lse, or_empty(gradients.hidden, statistics.lse.scalar_type()),
          or_empty(gradients.embedding, embedding.scalar_type())};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_loss, const OptionalTensor& grad_nll,
                                    const OptionalTensor& grad_lse, const Tensor& hidden, const Tensor& embedding,
                                    const Tensor& targets, const OptionalTensor& weights, const Tensor& lse_,
                                    double scale, double z_loss, double label_smoothing, double logit_cap,
                                    int64_t vocab_start, int64_t vocabulary) {
  checks::linear_cross_entropy_backward(grad_nll, grad_lse);
  const OnDevice device(hidden);
  const Tensor lse = lse_.contiguous();
  const Tensor scaled_weights = (weights ? weights->mul(grad_loss) : grad_loss.expand({hidden.size(0)})).contiguous();
  const Logits logits(hidden, embedding, targets, scale, logit_cap, vocab_start, vocabulary);
  Gradients gradients(logits, scaled_weights, z_loss, label_smoothing, true, true);
  logits.for_each_block([&](const LogitBlock& block, const Logits::Part& tokens, const Logits::Part& columns) {
    gradients.add(block, tokens, columns, lse, device.stream());
  });
  return {gradients.hidden.to(hidden.scalar_type()), gradients.embedding.to(embedding.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("_vocabulary_statistics", vocabulary_statistics);
  m.impl("_cross_entropy_sum", cross_entropy_sum);
  m.impl("_linear_cross_entropy_with_gradients", with_gradients);
  m.impl("_linear_cross_entropy_backward", backward);
}

}  // namespace glam::cuda
