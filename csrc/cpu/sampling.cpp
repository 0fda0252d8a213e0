// CPU kernels of glam::sample_logits (a row per task; candidates are sorted only as far as the choice needs them) and
// glam::counter_uniform.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "ops/checks.h"
#include "ops/philox.h"

namespace glam::cpu {
namespace {

constexpr auto kOp = "glam::sample_logits";
constexpr int64_t kCountersPerTask = 4096;
constexpr int64_t kFirstSorted = 64;

// The candidates of one row, best first, put in order as they are asked for.
class Ranking {
 public:
  explicit Ranking(const double* logits, int64_t V) : logits_(logits), order_(V) {
    std::iota(order_.begin(), order_.end(), 0);
  }
  int64_t operator[](int64_t rank) {
    while (rank >= sorted_) {
      const int64_t end = std::min<int64_t>(std::max(kFirstSorted, 4 * sorted_), order_.size());
      const auto better = [this](int64_t a, int64_t b) {
        return logits_[a] != logits_[b] ? logits_[a] > logits_[b] : a < b;
      };
      const auto first = order_.begin() + sorted_, last = order_.begin() + end;
      if (sorted_ == 0) {
        std::partial_sort(first, last, order_.end(), better);  // few of many: usually enough
      } else {
        if (last != order_.end()) std::nth_element(first, last, order_.end(), better);
        std::sort(first, last, better);
      }
      sorted_ = end;
    }
    return order_[rank];
  }

 private:
  const double* logits_;
  std::vector<int64_t> order_;
  int64_t sorted_ = 0;
};

struct Options {
  double temperature;
  int64_t top_k;
  double top_p;
};

int64_t sample_row(const double* logits, int64_t V, double uniform, const Options& options) {
  const double* const best = std::max_element(logits, logits + V);  // the first among equals
  if (options.temperature == 0) return best - logits;
  Ranking ranking(logits, V);
  const auto weight = [&](int64_t i) {
    return logits[i] == *best ? 1. : std::exp((logits[i] - *best) / options.temperature);
  };
  int64_t kept = options.top_k > 0 ? std::min(options.top_k, V) : V;
  double total = 0;
  for (int64_t i = 0; i < kept; ++i) total += weight(kept < V ? ranking[i] : i);
  if (options.top_p < 1) {
    double prefix = 0;
    int64_t count = 0;
    while (count < kept && prefix < options.top_p * total) prefix += weight(ranking[count++]);
    kept = count;
    total = prefix;
  }
  double running = 0;
  int64_t chosen = ranking[0];
  for (int64_t rank = 0; rank < kept; ++rank) {
    const double w = weight(ranking[rank]);
    if (w == 0) break;  // only rounding leads here: the last candidate of positive weight stands
    chosen = ranking[rank];
    running += w;
    if (running > uniform * total) break;
  }
  return chosen;
}

Tensor sample_logits(const Tensor& logits_, const Tensor& uniform_, double temperature, int64_t top_k, double top_p) {
  checks::sample_logits(logits_, uniform_, temperature, top_k, top_p);
  const int64_t B = logits_.size(0), V = logits_.size(1);
  TORCH_CHECK(B == 0 || V > 0, kOp, ": expected logits to be [B, V] with V >= 1, got V = 0");
  const Tensor logits = logits_.contiguous(), uniform = uniform_.contiguous();
  const Tensor chosen = at::empty({B}, logits.options().dtype(at::kLong));
  auto* const out = chosen.mutable_data_ptr<int64_t>();
  const auto* const uniform_B = uniform.const_data_ptr<float>();
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> row(V);
    for (int64_t b = begin; b < end; ++b) {
      TORCH_CHECK(uniform_B[b] >= 0 && uniform_B[b] < 1, kOp, ": expected uniform in [0, 1), got ", uniform_B[b],
                  " in row ", b);
      if (logits.scalar_type() == at::kDouble) {
        std::copy_n(logits.const_data_ptr<double>() + b * V, V, row.data());
      } else {
        std::copy_n(logits.const_data_ptr<float>() + b * V, V, row.data());
      }
      double largest = -std::numeric_limits<double>::infinity();
      for (const double logit : row) {
        TORCH_CHECK(!std::isnan(logit), kOp, ": expected logits to be numbers, got NaN in row ", b);
        largest = std::max(largest, logit);
      }
      TORCH_CHECK(std::isfinite(largest), kOp, ": expected the largest logit of a row to be finite, got ", largest,
                  " in row ", b);
      out[b] = sample_row(row.data(), V, uniform_B[b], {temperature, top_k, top_p});
    }
  });
  return chosen;
}

Tensor counter_uniform(int64_t seed, int64_t stream, const Tensor& index_) {
  checks::counter_uniform(index_);
  const Tensor index = index_.contiguous();
  const Tensor uniform = at::empty(index.sizes(), index.options().dtype(at::kFloat));
  const auto* const in = index.const_data_ptr<int64_t>();
  auto* const out = uniform.mutable_data_ptr<float>();
  at::parallel_for(0, index.numel(), kCountersPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = uniform_from_word(philox4x32(seed, stream, in[i])[0]);
  });
  return uniform;
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("sample_logits", sample_logits);
  m.impl("counter_uniform", counter_uniform);
}

}  // namespace glam::cpu
