// Attention of one head in one format (GLAM_FORMAT) in scratch of exactly the size that it asks for: against double, and
// the promise that a query's bits are the same alone, as in decoding, and among many. Prints the largest errors of outputs
// and gradients.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/kernels/attention_head.h"
#include "format.h"

using glam::cpu::AttentionGradients;
using glam::cpu::AttentionHead;
using glam::cpu::Type;

namespace {

using Stored = std::conditional_t<kIsBf16, uint16_t, Sum>;
constexpr Type kType = kIsBf16 ? Type::bf16 : sizeof(Sum) == 8 ? Type::f64 : Type::f32;

const auto functions = kernels::HeadKernels<Sum, Format>::functions();
std::mt19937 generator(1);

Stored stored(double value) {
  if constexpr (kIsBf16) {
    return kernels::float_to_bf16(static_cast<float>(value));
  } else {
    return static_cast<Sum>(value);
  }
}
double number(Stored value) {
  if constexpr (kIsBf16) {
    return kernels::bf16_to_float(value);
  } else {
    return value;
  }
}

std::vector<Stored> random_rows(int64_t count) {
  std::normal_distribution<double> normal;
  std::vector<Stored> rows(count);
  for (Stored& value : rows) value = stored(normal(generator));
  return rows;
}

struct Case {
  int64_t S, A;
  bool segmented, extra_logit;
  double cap;
  std::vector<Stored> q, k, v, grad_out;
  std::vector<Sum> line;  // with its padding
  std::vector<int32_t> segments;

  Case(int64_t S_, int64_t A_, bool segmented_, bool extra_logit_, double cap_)
      : S(S_),
        A(A_),
        segmented(segmented_),
        extra_logit(extra_logit_),
        cap(cap_),
        q(random_rows(S * A)),
        k(random_rows(S * A)),
        v(random_rows(S * A)),
        grad_out(random_rows(S * A)),
        line(S + 2 * glam::cpu::kLinePadding),
        segments(S) {
    std::normal_distribution<Sum> normal;
    for (int64_t d = 0; d < S; ++d) line[glam::cpu::kLinePadding + d] = normal(generator);
    for (Stored& value : q) value = stored(number(value) / std::sqrt(static_cast<double>(A)));
    // The last tenth is padding.
    for (int64_t i = 0; i < S; ++i) segments[i] = i * 10 >= S * 9 ? 0 : static_cast<int32_t>(1 + i * 3 / S);
  }

  AttentionHead<Sum> head() const {
    return {.q = q.data(),
            .k = k.data(),
            .v = v.data(),
            .type = kType,
            .q_stride = A,
            .k_stride = A,
            .v_stride = A,
            .A = A,
            .line = line.data() + glam::cpu::kLinePadding,
            .segments = segmented ? segments.data() : nullptr,
            .extra_logit = extra_logit,
            .logit_cap = static_cast<Sum>(cap)};
  }
};

// On a cache line, with nothing after it.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(static_cast<char*>(std::aligned_alloc(kernels::kLine, bytes)), &std::free) {}
  char* data() const { return data_.get(); }

 private:
  std::unique_ptr<char, decltype(&std::free)> data_;
};

std::vector<Stored> forward(const Case& c, int64_t begin, int64_t end, Sum* lse) {
  const Scratch scratch(functions.forward_scratch(end, c.A));
  std::vector<Stored> out((end - begin) * c.A);
  functions.forward(c.head(), begin, end, out.data(), c.A, lse, scratch.data());
  return out;
}

void compare(const std::vector<double>& expected, const std::vector<Stored>& actual, double& worst) {
  double square = 0, error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = number(actual[i]) - expected[i];
    square += expected[i] * expected[i];
    error += std::isnan(difference) ? INFINITY : difference * difference;
  }
  worst = std::fmax(worst, std::sqrt(error / std::fmax(square, 1e-30)));
}

// Errors relative to the root mean square, of outputs and of gradients.
void check(const Case& c, double& worst_out, double& worst_gradient) {
  const int64_t S = c.S, A = c.A;
  std::vector<Sum> lse(S);
  const std::vector<Stored> out = forward(c, 0, S, lse.data());
  for (const int64_t query : {int64_t{0}, S / 2, S - 1}) {
    const std::vector<Stored> alone = forward(c, query, query + 1, nullptr);
    if (std::memcmp(alone.data(), &out[query * A], A * sizeof(Stored)) != 0) {
      std::printf("query %ld of %ld differs when it is alone (A = %ld)\n", query, S, A);
      std::exit(1);
    }
  }

  AttentionGradients<Sum> gradients;
  std::vector<Stored> grad_q(S * A), grad_k(S * A), grad_v(S * A);
  std::vector<Sum> grad_line(c.line.size());
  gradients.grad_out = c.grad_out.data();
  gradients.lse = lse.data();
  gradients.grad_out_stride = gradients.out_stride = A;
  gradients.grad_q = grad_q.data();
  gradients.grad_k = grad_k.data();
  gradients.grad_v = grad_v.data();
  gradients.grad_line = grad_line.data() + glam::cpu::kLinePadding;
  const Scratch scratch(functions.backward_scratch(S, A));
  functions.backward(c.head(), S, gradients, scratch.data());

  std::vector<double> expected(S * A), expected_q(S * A), expected_k(S * A), expected_v(S * A);
  for (int64_t i = 0; i < S; ++i) {
    std::vector<double> p(S), slope(S), grad(S);
    double sum = c.extra_logit ? 1 : 0, delta = 0;
    for (int64_t j = 0; j <= i; ++j) {
      if (c.segmented && (c.segments[i] != c.segments[j] || c.segments[i] == 0)) continue;
      double score = c.line[glam::cpu::kLinePadding + i - j];
      for (int64_t a = 0; a < A; ++a) score += number(c.q[i * A + a]) * number(c.k[j * A + a]);
      slope[j] = 1;
      if (c.cap > 0) {
        const double share = std::tanh(score / c.cap);
        score = c.cap * share;
        slope[j] = 1 - share * share;
      }
      sum += p[j] = std::exp(score);
    }
    for (int64_t j = 0; j <= i; ++j) {
      p[j] = sum > 0 ? p[j] / sum : 0;
      for (int64_t a = 0; a < A; ++a) {
        expected[i * A + a] += p[j] * number(c.v[j * A + a]);
        grad[j] += number(c.v[j * A + a]) * number(c.grad_out[i * A + a]);
      }
      delta += p[j] * grad[j];
    }
    for (int64_t j = 0; j <= i; ++j) {
      const double grad_score = p[j] * (grad[j] - delta) * slope[j];
      for (int64_t a = 0; a < A; ++a) {
        expected_q[i * A + a] += grad_score * number(c.k[j * A + a]);
        expected_k[j * A + a] += grad_score * number(c.q[i * A + a]);
        expected_v[j * A + a] += p[j] * number(c.grad_out[i * A + a]);
      }
    }
  }
  compare(expected, out, worst_out);
  compare(expected_q, grad_q, worst_gradient);
  compare(expected_k, grad_k, worst_gradient);
  compare(expected_v, grad_v, worst_gradient);
}

}  // namespace

int main() {
  ask_for_tiles();
  double worst_out = 0, worst_gradient = 0;
  for (const int64_t S : {2, 5, 32, 33, 65, 131, 200}) {
    for (const int64_t A : {8, 33, 64}) {
      for (const bool segmented : {false, true}) {
        check(Case(S, A, segmented, S % 2 == 0, A == 33 ? 3. : 0.), worst_out, worst_gradient);
      }
    }
  }
  std::printf("%.3g %.3g\n", worst_out, worst_gradient);
}
