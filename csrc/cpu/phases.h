// Parallel work in phases that overlap: threads take tasks in one fixed order, and a task waits only for a phase that
// comes before its own. So one phase may be at work while the next has begun, and no thread can wait for ever.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace glam::cpu {

class Phases {
 public:
  static constexpr int64_t kNone = -1;
  static constexpr int64_t kSpins = 2000;  // looks before a thread lets another one have its core

  // A phase of `tasks` tasks, which begin once phase `after`, an earlier one, is complete. Returns its index.
  int64_t add(int64_t tasks, int64_t after = kNone) {
    phases_.push_back({num_tasks_, tasks, after});
    num_tasks_ += tasks;
    return static_cast<int64_t>(phases_.size()) - 1;
  }

  // Calls run_task(phase, task) for every task. An exception ends the work and is thrown here.
  template <class RunTask>
  void run(RunTask&& run_task) const {
    const auto remaining = std::make_unique<std::atomic<int64_t>[]>(phases_.size());
    for (size_t phase = 0; phase < phases_.size(); ++phase) remaining[phase] = phases_[phase].num_tasks;
    std::atomic<int64_t> next = 0;
    std::atomic<bool> failed = false;
    const auto work = [&] {
      size_t phase = 0;
      for (int64_t task = next++; task < num_tasks_ && !failed; task = next++) {
        while (task >= phases_[phase].first_task + phases_[phase].num_tasks) ++phase;
        const int64_t after = phases_[phase].after;
        const auto must_wait = [&] { return after != kNone && remaining[after].load(std::memory_order_acquire) > 0; };
        for (int64_t spins = 0; must_wait() && !failed; ++spins) {
          if (spins >= kSpins) std::this_thread::yield();
        }
        if (failed) return;
        run_task(static_cast<int64_t>(phase), task - phases_[phase].first_task);
        remaining[phase].fetch_sub(1, std::memory_order_release);
      }
    };
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), num_tasks_);
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      try {
        work();
      } catch (...) {
        failed = true;
        throw;
      }
    });
  }

 private:
  struct Phase {
    int64_t first_task, num_tasks, after;
  };
  std::vector<Phase> phases_;
  int64_t num_tasks_ = 0;
};

}  // namespace glam::cpu
