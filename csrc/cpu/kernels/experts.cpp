#include "cpu/kernels/experts.h"

#include "cpu/kernels/activation.h"
#include "cpu/kernels/lanes.h"
#include "cpu/kernels/vector.h"

namespace glam::cpu::GLAM_ISA {
namespace {

constexpr int64_t kChunk = 256;  // a multiple of kLanes
// hidden = act(pre); pre and gate become the derivatives of hidden with respect to themselves.
template <class T>
void differentiate(Transform activation, int64_t count, T* pre, T* gate, T* hidden) {
  if (activation == Transform::relu) {
    for (int64_t i = 0; i < count; ++i) {
      hidden[i] = pre[i] < T(0) ? T(0) : pre[i];
      pre[i] = pre[i] > T(0) ? T(1) : T(0);
    }
  } else if (activation == Transform::gelu) {
    for (int64_t i = 0; i < count; ++i) {
      hidden[i] = gelu(pre[i]);
      pre[i] = gelu_derivative(pre[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const T activated = gelu(gate[i]);
      hidden[i] = activated * pre[i];
      gate[i] = gelu_derivative(gate[i]) * pre[i];
      pre[i] = activated;
    }
  }
}

template <class T>
void backward_rows(const ExpertBackwardRows<T>& block) {
  T pre[kChunk], gate[kChunk], hidden[kChunk];
  for (int64_t row = 0; row < block.rows; ++row) {
    LaneSums<T> gate_gradient;
    const T scale = block.gates ? block.gates[row] : T(1);
    const T* const grad_row = block.grad_hidden + row * block.grad_stride;
    for (int64_t column = 0; column < block.hidden_dim; column += kChunk) {
      const int64_t count = block.hidden_dim - column < kChunk ? block.hidden_dim - column : kChunk;
      const int64_t offset = row * block.hidden_dim + column;
      const T* const grad = grad_row + column;
      load_values(advance(block.pre, block.type, offset), block.type, count, pre);
      if (block.pre_gate) load_values(advance(block.pre_gate, block.type, offset), block.type, count, gate);
      differentiate(block.activation, count, pre, gate, hidden);
      if (block.grad_gates) gate_gradient.add(count, [&](int64_t i) { return hidden[i] * grad[i]; });
      for (int64_t i = 0; i < count; ++i) pre[i] *= scale * grad[i];
      store_values(pre, count, advance(block.grad_pre, block.type, offset), block.type);
      if (!block.pre_gate) continue;
      for (int64_t i = 0; i < count; ++i) gate[i] *= scale * grad[i];
      store_values(gate, count, advance(block.grad_pre_gate, block.type, offset), block.type);
    }
    if (block.grad_gates) block.grad_gates[row] = gate_gradient.total();
  }
}

}  // namespace

extern const ExpertTable expert_table = {{&backward_rows<float>}, {&backward_rows<double>}};

}  // namespace glam::cpu::GLAM_ISA
