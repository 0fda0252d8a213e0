// Gradients summed over the ranks of a run, while the backward pass is still at work.
//
// Sums, never means: the loss of every rank is already divided by what the whole step has. Parameters that all ranks hold
// are summed over all of them, an expert's over the ranks that hold the same expert; which, the names of the process
// groups say. With stock DistributedDataParallel, which divides by the ranks, none of this is needed or used.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

namespace glam::distributed {

struct ReducedParameter {
  at::Tensor parameter;  // a leaf that requires grad
  std::string group;     // its gradient is summed over this process group; "": it stays as it is
};

class GradientReducer {
 public:
  static constexpr int64_t kBucketBytes = 8 << 20;

  // Parameters in the order of the forward pass, the same on every rank, in their final dtype and on their final device.
  // Gradients travel in buckets of at least bucket_bytes, last parameters first. A gradient that fills a bucket by itself
  // is summed where it is; smaller ones are copied together. Throws c10::Error for a parameter that is no such leaf.
  explicit GradientReducer(const std::vector<ReducedParameter>& parameters, int64_t bucket_bytes = kBucketBytes);
  ~GradientReducer();
  GradientReducer(const GradientReducer&) = delete;
  GradientReducer& operator=(const GradientReducer&) = delete;

  // The next backward pass is the last one of the step: a bucket leaves as soon as its gradients, those of earlier passes
  // included, are there. Backward passes without a start before them accumulate locally and send nothing.
  void start();
  // After that pass: sends what has no gradient as zeros, waits, and leaves the sums in .grad. On a GPU the device
  // waits, not the host. Throws c10::Error where a rank is gone or nothing was started.
  void finish();

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace glam::distributed
