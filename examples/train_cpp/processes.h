// The processes of a run, as a grid of data x expert: rank r is (r / P, r mod P), where the P ranks of a row share one
// copy of all experts. Everything else knows groups by their names, as torch.distributed's and glam's ops do.
#pragma once

#include <cstdint>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

class Processes {
 public:
  // Joins the others. Who is who, the variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say, which torchrun or a
  // shell sets; without them this process is alone. Throws std::invalid_argument where `expert` (P) does not divide the
  // number of processes, c10::Error where the others cannot be reached.
  explicit Processes(int64_t expert);
  // After all processes came here.
  ~Processes();
  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;

  int64_t rank() const { return rank_; }
  int64_t world_size() const { return world_size_; }
  // Names of groups; "" for a group of one.
  const std::string& world() const { return world_; }    // all ranks
  const std::string& expert() const { return expert_; }  // the ranks whose experts together are all experts
  const std::string& data() const { return data_; }      // the ranks that hold the same experts

 private:
  // The group of this rank among `size` ranks, registered as `name`; all of them make the call.
  std::string join(const std::string& name, int64_t rank, int64_t size);

  int64_t rank_ = 0, world_size_ = 1;
  std::string world_, expert_, data_;
  c10::intrusive_ptr<c10d::Store> store_;
  std::vector<c10::intrusive_ptr<c10d::ProcessGroup>> groups_;  // a registered name does not keep its group alive
};
