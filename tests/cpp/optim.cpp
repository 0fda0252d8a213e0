// Trains two parameters with glam::optim for a few steps and prints every bit, for tests/cpp/test_optim.py to compare.
// One "name: words" line per tensor: its float32 (step: int64) contents as hexadecimal.

#include <ATen/ATen.h>
#include <glam/optim.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

void print(const std::string& name, const at::Tensor& tensor) {
  const at::Tensor values = tensor.detach().to(at::kFloat).contiguous();
  std::printf("%s:", name.c_str());
  for (int64_t i = 0; i < values.numel(); ++i) {
    uint32_t word = 0;
    std::memcpy(&word, values.const_data_ptr<float>() + i, sizeof(word));
    std::printf(" %08x", word);
  }
  std::printf("\n");
}

// Exact in float32, so that both languages start from the same numbers.
at::Tensor pattern(at::IntArrayRef sizes, int64_t seed) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return ((at::arange(count) * 37 + seed * 11) % 64 - 31).to(at::kFloat).div(16).reshape(sizes);
}

}  // namespace

int main() {
  at::Tensor matrix = pattern({6, 9}, 1).requires_grad_(), vector = pattern({5}, 2).requires_grad_();
  const glam::optim::NamedTensors parameters = {{"matrix", matrix}, {"vector", vector}, {"tied", matrix}};
  glam::optim::Adafactor optimizer(parameters, {.min_factored = 4});
  for (int64_t step = 0; step < 4; ++step) {
    optimizer.zero_grad();
    matrix.mutable_grad() = pattern({6, 9}, 3 + step);
    vector.mutable_grad() = pattern({5}, 4 + step);
    if (step == 2) matrix.mutable_grad()[1][2] = INFINITY;
    const auto statistics = glam::optim::gradient_statistics({{"matrix", matrix}, {"vector", vector}});
    print("norm", statistics.norm);
    glam::optim::clip_gradients_({matrix, vector}, statistics.norm, 2.);
    optimizer.step(std::nullopt, statistics.nonfinite);
  }
  print("matrix", matrix);
  print("vector", vector);
  for (const auto& [name, tensor] : optimizer.named_state()) print(name, tensor);
  return 0;
}
