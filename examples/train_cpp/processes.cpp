#include "processes.h"

#include <cstdlib>
#include <stdexcept>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "numbers.h"

namespace {

std::string variable(const char* name, const std::string& otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

int64_t number(const char* name, int64_t otherwise) {
  const std::string text = variable(name, std::to_string(otherwise));
  if (const auto value = to_number<int64_t>(text); value && *value >= 0) return *value;
  throw std::invalid_argument("expected the environment's " + std::string(name) + " to be a number, got \"" + text +
                              "\"");
}

c10::intrusive_ptr<c10d::Store> open_store(int64_t rank, int64_t world_size) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(number("MASTER_PORT", 29500));
  options.isServer = rank == 0 && variable("TORCHELASTIC_USE_AGENT_STORE", "") != "True";
  options.numWorkers = static_cast<size_t>(world_size);
  options.waitWorkers = false;
  auto store = c10::make_intrusive<c10d::TCPStore>(variable("MASTER_ADDR", "127.0.0.1"), options);
  // torchrun may keep one store over restarts: a new process must not find the address of one that is gone.
  return c10::make_intrusive<c10d::PrefixStore>("train/attempt/" + variable("TORCHELASTIC_RESTART_COUNT", "0"), store);
}

}  // namespace

Processes::Processes(int64_t expert) : rank_(number("RANK", 0)), world_size_(number("WORLD_SIZE", 1)) {
  if (rank_ >= world_size_) {
    throw std::invalid_argument("expected RANK below WORLD_SIZE, got " + std::to_string(rank_) + " and " +
                                std::to_string(world_size_));
  }
  if (expert < 1 || world_size_ % expert != 0) {
    throw std::invalid_argument("expected --expert to divide the " + std::to_string(world_size_) + " processes, got " +
                                std::to_string(expert));
  }
  if (world_size_ == 1) return;
  store_ = open_store(rank_, world_size_);
  const int64_t row = rank_ / expert, column = rank_ % expert;
  world_ = join("world", rank_, world_size_);
  expert_ = join("expert of row " + std::to_string(row), column, expert);
  data_ = join("data of column " + std::to_string(column), row, world_size_ / expert);
}

Processes::~Processes() {
  for (const auto& group : groups_) c10d::unregister_process_group(group->getGroupName());
}

std::string Processes::join(const std::string& name, int64_t rank, int64_t size) {
  if (size == 1) return "";
  const auto store = c10::make_intrusive<c10d::PrefixStore>(name, store_);
  const auto group_rank = static_cast<int>(rank), group_size = static_cast<int>(size);
  const auto group = c10::make_intrusive<c10d::ProcessGroup>(store, group_rank, group_size);
  const auto gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(store, group_rank, group_size,
                                                                c10d::ProcessGroupGloo::Options::create_default());
  group->setBackend(c10::kCPU, c10d::ProcessGroup::GLOO, c10::intrusive_ptr<c10d::Backend>(gloo));
  group->setDefaultBackend(c10d::ProcessGroup::GLOO);
  group->setGroupName(name);
  c10d::register_process_group(name, group);
  groups_.push_back(group);
  return name;
}
