// CPU kernels of glam::relative_attention and its cached step: tasks are (sequence, head, run of query blocks); the runs
// exist only to keep the threads busy and change no bit.

#include "cpu/kernels/attention.h"
#include "ops/large_memory.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/scratch.h"
#include "ops/checks.h"
#include "ops/relative_buckets.h"

namespace glam::cpu {
namespace {

constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kBytesPerTask = 4096;

// The kernels take any stride but the last.
Tensor with_rows(const Tensor& x) { return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous(); }

// bias of each distance below `length`: [H][kLinePadding + length + kLinePadding], zeros in the padding.
template <class T>
struct BiasLines {
  BiasLines(const Tensor& bias_, int64_t length)
      : stride(length + 2 * kLinePadding), values(static_cast<size_t>(bias_.size(0) * stride)) {
    const Tensor bias = bias_.to(c10::CppTypeToScalarType<T>::value).contiguous();
    const T* const table = bias.const_data_ptr<T>();
    for (int64_t h = 0; h < bias.size(0); ++h) {
      for (int64_t d = 0; d < length; ++d) head(h)[d] = table[h * kNumBuckets + bucket_of_distance(d)];
    }
  }
  T* head(int64_t h) { return values.data() + h * stride + kLinePadding; }
  const T* head(int64_t h) const { return values.data() + h * stride + kLinePadding; }

  int64_t stride;
  std::vector<T> values;
};

// q, k, v as 4-D tensors whose rows of A have unit stride.
template <class T>
struct Heads {
  Tensor q, k, v;
  OptionalTensor segment_ids;
  const BiasLines<T>& lines;
  bool extra_logit;
  double logit_cap;

  AttentionHead<T> at(int64_t b, int64_t h, int64_t position) const {
    const auto start = [&](const Tensor& x) {
      return advance(x.const_data_ptr(), type_of(x), b * x.stride(0) + h * x.stride(2));
    };
    return {
        .q = start(q),
        .k = start(k),
        .v = start(v),
        .type = type_of(q),
        .q_stride = q.stride(1),
        .k_stride = k.stride(1),
        .v_stride = v.stride(1),
        .A = q.size(3),
        .query_position = position,
        .line = lines.head(h),
        .segments = segment_ids ? segment_ids->template const_data_ptr<int32_t>() + b * segment_ids->size(1) : nullptr,
        .extra_logit = extra_logit,
        .logit_cap = static_cast<T>(logit_cap)};
  }
};

// out [B, N, H, A] contiguous; positions[b] of each row's first query (null: 0), -1 for rows whose output is 0.
template <class T>
void attend(const Heads<T>& heads, const int32_t* positions, const Tensor& out, T* lse_BHN) {
  const int64_t B = out.size(0), N = out.size(1), H = out.size(2), A = out.size(3);
  if (out.numel() == 0) return;
  const Type type = type_of(out);
  const auto& functions = attention_functions<T>(type);
  const int64_t blocks = (N + functions.queries_per_block - 1) / functions.queries_per_block;
  const int64_t runs = std::clamp<int64_t>(kTasksPerThread * at::get_num_threads() / (B * H), 1, blocks);
  const int64_t run_length = (blocks + runs - 1) / runs * functions.queries_per_block;
  void* const out_data = out.mutable_data_ptr();
  // The longest runs come first in their thread's share; heads of one sequence are neighbours in memory.
  at::parallel_for(0, B * H * runs, 1, [&](int64_t task_begin, int64_t task_end) {
    static thread_local Scratch scratch;
    for (int64_t task = task_begin; task < task_end; ++task) {
      const int64_t run = runs - 1 - task % runs, h = task / runs % H, b = task / runs / H;
      const int64_t begin = run * run_length, end = std::min(begin + run_length, N);
      if (begin >= end) continue;
      void* const out_rows = advance(out_data, type, ((b * N + begin) * H + h) * A);
      if (positions && positions[b] < 0) {
        for (int64_t i = begin; i < end; ++i) {
          char* const row = static_cast<char*>(advance(out_rows, type, (i - begin) * H * A));
          std::fill_n(row, A * size_of(type), char{0});
        }
        continue;
      }
      const int64_t position = positions ? positions[b] : 0;
      functions.forward(heads.at(b, h, position), begin, end, out_rows, H * A,
                        lse_BHN ? lse_BHN + (b * H + h) * N + begin : nullptr,
                        scratch.get<char>(functions.forward_scratch(position + end, A)));
    }
  });
}

OptionalTensor contiguous(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : std::nullopt; }

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                                   const OptionalTensor& segment_ids, bool extra_logit, double logit_cap) {
  checks::relative_attention(q, k, v, bias, segment_ids, logit_cap);
  const int64_t B = q.size(0), S = q.size(1), H = q.size(2);
  const Tensor out = empty_large(q.sizes(), q.options());
  const Tensor lse = at::empty({B, H, S}, q.options().dtype(accumulation_dtype(q.scalar_type())));
  dispatch_accumulation(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const BiasLines<T> lines(bias, S);
    const Heads<T> heads{with_rows(q), with_rows(k), with_rows(v), contiguous(segment_ids),
                         lines,        extra_logit,  logit_cap};
    attend(heads, nullptr, out, lse.mutable_data_ptr<T>());
  });
  return {out, lse};
}

// The gradient of the bias: each (sequence, head) sums by distance, then distances by bucket and sequences in order.
template <class T>
Tensor bias_gradient(const std::vector<T>& lines, int64_t stride, int64_t B, int64_t H, int64_t S, const Tensor& bias) {
  const Tensor grad = at::empty({H, kNumBuckets}, bias.options().dtype(at::kDouble));
  auto* const sum = grad.mutable_data_ptr<double>();
  std::fill_n(sum, H * kNumBuckets, 0.);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      const T* const line = lines.data() + (b * H + h) * stride + kLinePadding;
      for (int64_t d = 0; d < S; ++d) sum[h * kNumBuckets + bucket_of_distance(d)] += line[d];
    }
  }
  return grad.to(bias.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const Tensor& bias,
                                                    const OptionalTensor& segment_ids, const Tensor& lse_,
                                                    bool extra_logit, double logit_cap) {
  const int64_t B = q.size(0), S = q.size(1), H = q.size(2), A = q.size(3);
  const Tensor grad_q = empty_large(q.sizes(), q.options()), grad_k = empty_large(q.sizes(), q.options());
  const Tensor grad_v = empty_large(q.sizes(), q.options()), grad = with_rows(grad_), lse = lse_.contiguous();
  Tensor grad_bias;
  dispatch_accumulation(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Type type = type_of(q);
    const auto& functions = attention_functions<T>(type);
    const BiasLines<T> lines(bias, S);
    const Heads<T> heads{with_rows(q), with_rows(k), with_rows(v), contiguous(segment_ids),
                         lines,        extra_logit,  logit_cap};
    std::vector<T> grad_lines(static_cast<size_t>(B * H * lines.stride));
    at::parallel_for(0, S == 0 || A == 0 ? 0 : B * H, 1, [&](int64_t begin, int64_t end) {
      static thread_local Scratch scratch;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / H, h = task % H, start = (b * S * H + h) * A;
        const AttentionGradients<T> gradients{
            .grad_out = advance(grad.const_data_ptr(), type, b * grad.stride(0) + h * grad.stride(2)),
            .lse = lse.const_data_ptr<T>() + task * S,
            .grad_out_stride = grad.stride(1),
            .out_stride = H * A,
            .grad_q = advance(grad_q.mutable_data_ptr(), type, start),
            .grad_k = advance(grad_k.mutable_data_ptr(), type, start),
            .grad_v = advance(grad_v.mutable_data_ptr(), type, start),
            .grad_line = grad_lines.data() + task * lines.stride + kLinePadding};
        functions.backward(heads.at(b, h, 0), S, gradients, scratch.get<char>(functions.backward_scratch(S, A)));
      }
    });
    grad_bias = bias_gradient(grad_lines, lines.stride, B, H, S, bias);
  });
  return {grad_q, grad_k, grad_v, grad_bias};
}

// x [B, N, H, A] into cache at positions[b]; returns the cache as the kernels read it.
void write_cache(const Tensor& x, const Tensor& cache, const int32_t* positions) {
  at::assert_no_internal_overlap(cache);
  for (int64_t b = 0; b < x.size(0); ++b) {
    if (positions[b] >= 0) cache.select(0, b).narrow(0, positions[b], x.size(1)).copy_(x.select(0, b));
  }
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& k_cache, Tensor& v_cache,
            const Tensor& positions_, const Tensor& bias, bool extra_logit, double logit_cap) {
  checks::relative_attention_step(q, k, v, k_cache, v_cache, positions_, bias, logit_cap);
  const auto overlap = at::get_overlap_status(k_cache, v_cache);
  TORCH_CHECK(overlap != at::MemOverlapStatus::Full && overlap != at::MemOverlapStatus::Partial,
              "glam::relative_attention_step: expected k_cache and v_cache to be apart, got overlapping memory");
  const int64_t B = q.size(0), N = q.size(1), L = k_cache.size(1);
  const Tensor positions = positions_.contiguous();
  const auto* const position_B = positions.const_data_ptr<int32_t>();
  int64_t length = 0;
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK(position_B[b] >= -1 && position_B[b] + N <= L,
                "glam::relative_attention_step: expected positions in [-1, L - N] (-1: finished) with room for N = ", N,
                " new tokens in a cache of L = ", L, ", got ", position_B[b], " in row ", b);
    if (position_B[b] >= 0) length = std::max(length, position_B[b] + N);
  }
  write_cache(k, k_cache, position_B);
  write_cache(v, v_cache, position_B);
  const Tensor out = empty_large(q.sizes(), q.options());
  dispatch_accumulation(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const BiasLines<T> lines(bias, length);
    const Heads<T> heads{with_rows(q), with_rows(k_cache), with_rows(v_cache), std::nullopt,
                         lines,        extra_logit,        logit_cap};
    attend<T>(heads, position_B, out, nullptr);
  });
  return out;
}

// Columns of bytes in parallel: each is gathered into scratch for all rows, then written back.
void reorder_cache_(Tensor& cache_, const Tensor& beams_) {
  checks::reorder_cache(cache_, beams_);
  at::assert_no_internal_overlap(cache_);
  const Tensor beams = beams_.contiguous();
  const auto* const beam = beams.const_data_ptr<int64_t>();
  const int64_t B = cache_.size(0);
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK(beam[b] >= 0 && beam[b] < B, "glam::reorder_cache_: expected beams in [0, B) with B = ", B, ", got ",
                beam[b], " at ", b);
  }
  if (cache_.numel() == 0) return;
  const Tensor cache = cache_.contiguous();
  auto* const data = static_cast<char*>(cache.mutable_data_ptr());
  const int64_t row_bytes = cache.numel() / B * cache.element_size();
  const int64_t num_tasks = (row_bytes + kBytesPerTask - 1) / kBytesPerTask;
  at::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    char* const old = scratch.get<char>(B * kBytesPerTask);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kBytesPerTask, count = std::min(kBytesPerTask, row_bytes - first);
      for (int64_t b = 0; b < B; ++b) std::copy_n(data + b * row_bytes + first, count, old + b * kBytesPerTask);
      for (int64_t b = 0; b < B; ++b) {
        if (beam[b] != b) std::copy_n(old + beam[b] * kBytesPerTask, count, data + b * row_bytes + first);
      }
    }
  });
  if (!cache.is_same(cache_)) cache_.copy_(cache);
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("_relative_attention_forward", forward);
  m.impl("_relative_attention_backward", backward);
  m.impl("relative_attention_step", step);
  m.impl("reorder_cache_", reorder_cache_);
}

}  // namespace glam::cpu
