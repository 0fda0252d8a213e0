// Training in C++: Adafactor as GLaM runs it, its learning rate, and the gradient's norm and health. Everything stays on
// the parameters' device; nothing is copied to the host.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace glam::optim {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

struct AdafactorOptions {
  double decay = -0.8;         // the second moment keeps 1 - (t + 1)^decay
  double clipping = 1.;        // of the root mean square of a parameter's update
  double min_scale = 1e-3;     // the step is relative to max(RMS(weight), min_scale)
  double eps = 1e-30;          // added to squared gradients
  int64_t min_factored = 128;  // the last two dimensions are factored if both are at least this
};

// multiplier / sqrt(max(step, constant_steps)) of the 0-based step: float64, on the step's device.
at::Tensor glam_schedule(const at::Tensor& step, double multiplier = 1., int64_t constant_steps = 10000);

// A parameter holds a part of the whole along dimension `dim` (counted from the end: -1 is the last), whose size in the
// whole is `size`; the ranks of the process group hold the others.
struct Shard {
  int64_t dim;
  int64_t size;
  std::string group;
};
using Shards = std::map<std::string, std::vector<Shard>>;  // by the parameter's name

// Shazeer and Stern (arXiv 1804.04235) without momentum; the formulas are in csrc/ops/adafactor.cpp. Parameters are
// float32 or float64; one that is listed twice (tied weights) is updated once, under its first name. Of a parameter with
// shards, means and root mean squares are those of the whole; the ranks of the groups must all step.
class Adafactor {
 public:
  explicit Adafactor(const NamedTensors& parameters, AdafactorOptions options = {}, const Shards& shards = {});

  // One update from the parameters' gradients, with the learning rate of glam_schedule or a scalar tensor of one's own.
  // A parameter without a gradient stays. Where skip [] bool is true nothing changes and the step is not counted.
  void step(const std::optional<at::Tensor>& learning_rate = std::nullopt,
            const std::optional<at::Tensor>& skip = std::nullopt);
  void zero_grad();

  // Updates applied so far, int64 [], on the parameters' device.
  const at::Tensor& step_count() const { return step_count_; }
  // NAME.row_var and NAME.col_var, or NAME.variance, and step: the tensors themselves, as checkpoints keep them.
  NamedTensors named_state() const;

 private:
  using Groups = std::vector<std::string>;
  struct Parameter {
    std::string name;
    at::Tensor weight;
    bool factored = false;
    at::Tensor row_var, col_var;                             // the full variance and [0] if not factored
    std::vector<int64_t> sizes;                              // of the whole
    Groups groups, by_row, by_column, by_either, by_matrix;  // whose ranks hold its parts, and how they split matrices
  };

  void update(const std::vector<Parameter*>& parameters, const at::Tensor& learning_rate,
              const std::optional<at::Tensor>& skip);

  AdafactorOptions options_;
  std::vector<Parameter> parameters_;
  at::Tensor step_count_;
};

struct GradientStatistics {
  at::Tensor norm;       // float64 []: root of the sum of all squares, in a fixed order
  at::Tensor nonfinite;  // bool []: a square is infinite or NaN in its dtype (float32 for bfloat16)
};

// Of the parameters' gradients; those without one are left out. With shards they are those of the whole parameters, each
// counted once, and the same bits on every rank.
GradientStatistics gradient_statistics(const NamedTensors& parameters, const Shards& shards = {});

// Multiplies the gradients by min(1, max_norm / norm).
void clip_gradients_(at::TensorList parameters, const at::Tensor& norm, double max_norm);

}  // namespace glam::optim
