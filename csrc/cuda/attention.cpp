// CUDA side of glam::relative_attention and its cached step: products by the library, around the kernels of
// kernels/attention.cu. Two ways:
//
//   - torch's memory-efficient attention for 16-bit dtypes, where it takes the head dim: it gets the bias of each score
//     and the mask as one tensor. It knows no extra logit, but that only multiplies each row of its result by the share
//     of the other keys, and its backward pass works from the log of the denominator, which may as well hold the 1.
//   - else products of whole blocks of heads with our softmax between them, in the accumulation dtype: float32 would be
//     multiplied as three products of less precise numbers by the first way.
//
// Memory, beside what goes in and out: the bias takes H * S * S elements of q's dtype, B times that with segments, and
// its gradient B * H * S * S, both in groups of sequences of kScoreBytes; the second way two blocks of scores of
// kBlockBytes. The first way makes its output again in the backward pass, which is not given it. Nothing waits for the
// device: a position without room in the cache writes nothing and gives NaN instead of an error.

#include "cuda/kernels/attention.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/_efficient_attention_backward.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "cuda/common.h"
#include "ops/checks.h"
#include "ops/relative_buckets.h"

namespace glam::cuda {
namespace {

constexpr int64_t kScoreBytes = limit(int64_t{1} << 30, 1 << 10);
constexpr int64_t kBlockBytes = limit(128 << 20, 4 << 10);

// What torch's memory-efficient attention asks for, and its names for what we ask for.
namespace efficient {
constexpr int64_t kAlignment = 16;    // bytes of a row of q, k, v and of the bias
constexpr int64_t kBiasColumns = 16;  // rows of the bias are padded to a multiple
constexpr int64_t kLseColumns = 32;   // rows of the lse are padded to a multiple
constexpr int64_t kMostHeadDim = 256;
constexpr int64_t kMostSequences = 65535;
constexpr int64_t kNoMask = 0, kCausal = 1;

bool takes(const Tensor& q, double logit_cap) {
  const int64_t A = q.size(3);
  return q.element_size() == 2 && logit_cap == 0 && A <= kMostHeadDim && A * q.element_size() % kAlignment == 0;
}
}  // namespace efficient

// The arguments of one call. q, k, v are contiguous and on a boundary of 16 bytes: [B, N, H, A], [B, L, H, A].
struct Attention {
  Tensor q, k, v, lines, segments, positions;
  AttentionShape shape;
  double logit_cap;

  Attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& bias, const OptionalTensor& segment_ids,
            const Tensor& positions_, bool extra_logit, double logit_cap_, cudaStream_t stream)
      : q(aligned(q_)), k(aligned(k_)), v(aligned(v_)), positions(positions_), logit_cap(logit_cap_) {
    if (segment_ids) segments = segment_ids->contiguous();
    const int64_t H = q.size(2), L = k.size(1);
    shape = {.B = q.size(0),
             .N = q.size(1),
             .L = L,
             .H = H,
             .segments = segments.defined() ? indices(segments) : nullptr,
             .positions = positions.defined() ? indices(positions) : nullptr,
             .extra_logit = extra_logit};
    const Tensor table = bias.to(sum_dtype()).contiguous();
    lines = at::empty({H, L}, table.options());
    attention_lines(data(table), type(), H, L, mutable_data(lines), stream);
  }
  static Tensor aligned(const Tensor& x) {
    const Tensor result = x.contiguous();
    const auto address = reinterpret_cast<uintptr_t>(result.const_data_ptr());
    return address % efficient::kAlignment == 0 ? result : result.clone();
  }
  Type type() const { return type_of(q); }
  at::ScalarType sum_dtype() const { return accumulation_dtype(q.scalar_type()); }
  Tensor per_query() const { return at::empty({shape.B, shape.H, shape.N}, lines.options()); }

  // Sequences [first, first + count).
  Attention sequences(int64_t first, int64_t count) const {
    Attention part = *this;
    for (Tensor* x : {&part.q, &part.k, &part.v}) *x = x->narrow(0, first, count);
    part.shape.B = count;
    if (shape.segments) part.shape.segments += first * shape.L;
    if (shape.positions) part.shape.positions += first;
    return part;
  }
  bool masks_differ() const { return shape.segments || shape.positions; }

  // Calls f(first, count) for groups of sequences whose scores, in q's dtype, take at most kScoreBytes.
  template <class F>
  void for_each_group(F&& f) const {
    const int64_t bytes = shape.H * shape.N * round_up(shape.L, efficient::kBiasColumns) * q.element_size();
    const int64_t most = std::clamp<int64_t>(kScoreBytes / bytes, 1, efficient::kMostSequences);
    for (int64_t first = 0; first < shape.B; first += most) f(first, std::min(most, shape.B - first));
  }
};

// Bias and mask of every score, [B, H, N, L] in q's dtype, one for all sequences where they do not differ.
Tensor efficient_bias(const Attention& part, cudaStream_t stream) {
  AttentionShape shape = part.shape;
  if (!part.masks_differ()) shape.B = 1;
  const int64_t stride = round_up(shape.L, efficient::kBiasColumns);
  const Tensor bias = at::empty({shape.B, shape.H, shape.N, stride}, part.q.options());
  attention_bias(shape, part.type(), data(part.lines), stride, mutable_data(bias), stream);
  return bias.narrow(3, 0, shape.L).expand({part.shape.B, shape.H, shape.N, shape.L});
}

// A group's out [B, N, H, A] with the extra logit, and its lse [B, H, N] if that is defined.
void efficient_forward(const Attention& part, const Tensor& bias, int64_t mask, Tensor out, const Tensor& lse,
                       cudaStream_t stream) {
  const auto result = at::_efficient_attention_forward(part.q, part.k, part.v, bias, std::nullopt, std::nullopt,
                                                       part.shape.N, part.shape.L, 0., mask, true, 1.);
  const Tensor raw_lse = std::get<1>(result).contiguous(), factor = part.per_query();
  attention_factors(part.shape, raw_lse.const_data_ptr<float>(), raw_lse.size(2),
                    lse.defined() ? lse.mutable_data_ptr<float>() : nullptr, factor.mutable_data_ptr<float>(), stream);
  at::mul_out(out, std::get<0>(result), factor.transpose(1, 2).unsqueeze(3));
}

// Calls f(part) for blocks of heads whose scores, in the accumulation dtype, take at most kBlockBytes.
template <class F>
void for_each_block(const Attention& attention, F&& f) {
  const auto& shape = attention.shape;
  const int64_t bytes = shape.N * shape.L * static_cast<int64_t>(c10::elementSize(attention.sum_dtype()));
  const int64_t most = std::max<int64_t>(1, kBlockBytes / bytes);
  const int64_t heads = std::min(most, shape.H), sequences = std::max<int64_t>(1, most / shape.H);
  for (int64_t b = 0; b < shape.B; b += sequences) {
    for (int64_t h = 0; h < shape.H; h += heads) {
      f(AttentionPart{.sequence = b,
                      .sequences = std::min(sequences, shape.B - b),
                      .head = h,
                      .heads = std::min(heads, shape.H - h)});
    }
  }
}

// The part's view of x [B, rows, H, ...] as [sequences, heads, rows, ...].
Tensor view_of(const AttentionPart& part, const Tensor& x) {
  return x.narrow(0, part.sequence, part.sequences).narrow(2, part.head, part.heads).transpose(1, 2);
}
// The part's copy of x [B, rows, H, A] as [sequences * heads, rows, A] in the accumulation dtype.
Tensor heads_of(const Attention& attention, const AttentionPart& part, const Tensor& x) {
  return view_of(part, x).to(attention.sum_dtype()).reshape({part.sequences * part.heads, x.size(1), x.size(3)});
}
// [sequences * heads, rows, A] to that view.
void put_heads(const AttentionPart& part, const Tensor& heads, const Tensor& x) {
  view_of(part, x).copy_(heads.view({part.sequences, part.heads, x.size(1), x.size(3)}));
}

void composed_forward(const Attention& attention, const Tensor& out, const Tensor& lse_BHN, cudaStream_t stream) {
  for_each_block(attention, [&](const AttentionPart& part) {
    const Tensor scores =
        at::bmm(heads_of(attention, part, attention.q), heads_of(attention, part, attention.k).transpose(1, 2));
    const Tensor lse = at::empty({part.sequences, part.heads, attention.shape.N}, scores.options());
    const Tensor factor = at::empty_like(lse);
    attention_softmax(attention.shape, part, attention.type(), data(attention.lines), attention.logit_cap,
                      mutable_data(scores), mutable_data(lse), mutable_data(factor), stream);
    if (lse_BHN.defined()) {
      lse_BHN.narrow(0, part.sequence, part.sequences).narrow(1, part.head, part.heads).copy_(lse);
    }
    put_heads(part, at::bmm(scores, heads_of(attention, part, attention.v)).mul_(factor.view({-1, factor.size(2), 1})),
              out);
  });
}

struct Gradients {
  Tensor q, k, v;
  Tensor bias_partial;  // see bias_gradient_partial
};

void efficient_backward(const Attention& attention, const Tensor& grad, const Tensor& lse, const Gradients& gradients,
                        cudaStream_t stream) {
  const auto& shape = attention.shape;
  const Tensor padded_lse = at::constant_pad_nd(lse, {0, round_up(shape.N, efficient::kLseColumns) - shape.N},
                                                std::numeric_limits<double>::infinity());
  const Tensor no_dropout = at::zeros({}, attention.q.options().dtype(at::kLong));
  attention.for_each_group([&](int64_t first, int64_t count) {
    const Attention part = attention.sequences(first, count);
    const auto of_part = [&](const Tensor& x) { return x.narrow(0, first, count); };
    const Tensor bias = efficient_bias(part, stream), out = at::empty_like(part.q);
    efficient_forward(part, bias, efficient::kCausal, out, Tensor(), stream);
    // Keys in one split: more would be added up in an order that changes from run to run.
    const auto [grad_q, grad_k, grad_v, grad_bias] = at::_efficient_attention_backward(
        of_part(grad), part.q, part.k, part.v, bias, out, std::nullopt, std::nullopt, shape.N, shape.L,
        of_part(padded_lse), 0., no_dropout, no_dropout, efficient::kCausal, true, 1., 1);
    of_part(gradients.q).copy_(grad_q);
    of_part(gradients.k).copy_(grad_k);
    of_part(gradients.v).copy_(grad_v);
    TORCH_CHECK(grad_bias.stride(3) == 1 && grad_bias.stride(1) == shape.N * grad_bias.stride(2) &&
                    (count == 1 || grad_bias.stride(0) == shape.H * grad_bias.stride(1)),
                "glam::relative_attention: expected torch's gradient of the bias in rows, got strides ",
                grad_bias.strides());
    // Above the diagonal it holds anything.
    bias_gradient_partial(data(grad_bias), part.type(), count * shape.H, shape.N, grad_bias.stride(2),
                          mutable_data(of_part(gradients.bias_partial)), stream);
  });
}

void composed_backward(const Attention& attention, const Tensor& grad, const Tensor& lse_BHN,
                       const Gradients& gradients, cudaStream_t stream) {
  const auto& shape = attention.shape;
  for_each_block(attention, [&](const AttentionPart& part) {
    const auto heads = [&](const Tensor& x) { return heads_of(attention, part, x); };
    const auto of_part = [&](const Tensor& x) {
      return x.narrow(0, part.sequence, part.sequences).narrow(1, part.head, part.heads);
    };
    const Tensor q = heads(attention.q), k = heads(attention.k), grad_out = heads(grad);
    const Tensor scores = at::bmm(q, k.transpose(1, 2));
    const Tensor grads = at::bmm(grad_out, heads(attention.v).transpose(1, 2));
    const Tensor lse = of_part(lse_BHN).contiguous();
    attention_score_gradient(shape, part, attention.type(), data(attention.lines), attention.logit_cap, data(lse),
                             mutable_data(scores), mutable_data(grads), stream);
    put_heads(part, at::bmm(grads, k), gradients.q);
    put_heads(part, at::bmm(grads.transpose(1, 2), q), gradients.k);
    put_heads(part, at::bmm(scores.transpose(1, 2), grad_out), gradients.v);
    const Tensor partial = at::empty(of_part(gradients.bias_partial).sizes(), gradients.bias_partial.options());
    bias_gradient_partial(data(grads), type_of(grads), part.sequences * part.heads, shape.N, shape.L,
                          mutable_data(partial), stream);
    of_part(gradients.bias_partial).copy_(partial);
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                                   const OptionalTensor& segment_ids, bool extra_logit, double logit_cap) {
  checks::relative_attention(q, k, v, bias, segment_ids, logit_cap);
  const OnDevice device(q);
  const Attention attention(q, k, v, bias, segment_ids, Tensor(), extra_logit, logit_cap, device.stream());
  const Tensor out = at::empty(q.sizes(), q.options()), lse = attention.per_query();
  if (lse.numel() == 0 || out.numel() == 0) return {out, lse.zero_()};
  if (!efficient::takes(q, logit_cap)) {
    composed_forward(attention, out, lse, device.stream());
    return {out, lse};
  }
  const auto run = [&](int64_t first, int64_t count) {
    const Attention part = attention.sequences(first, count);
    efficient_forward(part, efficient_bias(part, device.stream()), efficient::kCausal, out.narrow(0, first, count),
                      lse.narrow(0, first, count), device.stream());
  };
  if (attention.masks_differ() || q.size(0) > efficient::kMostSequences) {
    attention.for_each_group(run);
  } else {
    run(0, q.size(0));
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const Tensor& bias,
                                                    const OptionalTensor& segment_ids, const Tensor& lse,
                                                    bool extra_logit, double logit_cap) {
  const OnDevice device(q);
  const Attention attention(q, k, v, bias, segment_ids, Tensor(), extra_logit, logit_cap, device.stream());
  const auto& shape = attention.shape;
  const auto like_q = [&] { return at::empty(q.sizes(), q.options()); };
  Gradients gradients{like_q(), like_q(), like_q(), Tensor()};
  if (q.numel() == 0) {
    const Tensor none = at::zeros(bias.sizes(), bias.options());
    return {gradients.q, gradients.k, gradients.v, none};
  }
  gradients.bias_partial =
      at::empty({shape.B, shape.H, bias_gradient_chunks(shape.N), kNumBuckets}, attention.lines.options());
  const Tensor grad = Attention::aligned(grad_);
  if (efficient::takes(q, logit_cap)) {
    efficient_backward(attention, grad, lse.contiguous(), gradients, device.stream());
  } else {
    composed_backward(attention, grad, lse, gradients, device.stream());
  }
  const Tensor grad_bias = at::empty({shape.H, kNumBuckets}, attention.lines.options());
  bias_gradient(data(gradients.bias_partial), attention.type(), shape.B, shape.H, shape.N, mutable_data(grad_bias),
                device.stream());
  return {gradients.q, gradients.k, gradients.v, grad_bias.to(bias.scalar_type())};
}

// x [B, N, H, A] into cache [B, L, H, A]; returns a copy of what the new queries may see, zeros in the rest: what lies
// there would be multiplied by probabilities of 0, and need not be a number.
Tensor update_cache(const Tensor& x_, Tensor& cache_, const Tensor& positions, cudaStream_t stream) {
  at::assert_no_internal_overlap(cache_);
  const InPlace cache(cache_);
  const Tensor x = x_.contiguous(), visible = at::empty_like(cache.tensor());
  const int64_t B = x.size(0), N = x.size(1), L = cache_.size(1), columns = x.size(2) * x.size(3);
  write_cache(data(x), type_of(x), B, N, L, columns, indices(positions), cache.data(), stream);
  cache.finish();
  read_cache(cache.data(), type_of(x), B, N, L, columns, indices(positions), mutable_data(visible), stream);
  return visible;
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache,
            const Tensor& positions_, const Tensor& bias, bool extra_logit, double logit_cap) {
  checks::relative_attention_step(q, k, v, k_cache, v_cache, positions_, bias, logit_cap);
  const auto overlap = at::get_overlap_status(k_cache, v_cache);
  TORCH_CHECK(overlap != at::MemOverlapStatus::Full && overlap != at::MemOverlapStatus::Partial,
              "glam::relative_attention_step: expected k_cache and v_cache to be apart, got overlapping memory");
  const OnDevice device(q);
  const Tensor out = at::empty(q.sizes(), q.options()), positions = positions_.contiguous();
  if (out.numel() == 0 || k_cache.numel() == 0) return out.zero_();
  const Tensor keys = update_cache(k, k_cache, positions, device.stream());
  const Tensor values = update_cache(v, v_cache, positions, device.stream());
  const Attention attention(q, keys, values, bias, std::nullopt, positions, extra_logit, logit_cap, device.stream());
  if (efficient::takes(q, logit_cap)) {
    attention.for_each_group([&](int64_t first, int64_t count) {
      const Attention part = attention.sequences(first, count);
      efficient_forward(part, efficient_bias(part, device.stream()), efficient::kNoMask, out.narrow(0, first, count),
                        Tensor(), device.stream());
    });
  } else {
    composed_forward(attention, out, Tensor(), device.stream());
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("_relative_attention_forward", forward);
  m.impl("_relative_attention_backward", backward);
  m.impl("relative_attention_step", step);
}

}  // namespace glam::cuda
