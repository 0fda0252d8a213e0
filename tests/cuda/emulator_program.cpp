// Runs the kernels of planted_kernels.cu and misuse_kernels.cu, and checks of the emulator's own functions, by name.
//
//   emulator_program CASE:ORDER:SEEDS ...   each case in this order with the seeds 1..SEEDS; prints lines
//                                           "CASE ORDER SEED RESULT": ok, wrong, or "error" and its text
//   emulator_program --count                the counters of counted_kernel, as JSON and as a table
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/emulator/config.h"
#include "function_kernels.h"
#include "misuse_kernels.h"
#include "planted_kernels.h"

namespace planted {
namespace {

using bf16 = __nv_bfloat16;

std::vector<int> random_numbers(size_t count, int low, int high) {
  std::mt19937 generator(static_cast<unsigned>(count));
  std::vector<int> numbers(count);
  for (int& number : numbers) number = low + static_cast<int>(generator() % static_cast<unsigned>(high - low));
  return numbers;
}

bool row_is_right(Bug bug) {
  const int rows = 3, columns = 300;
  std::vector<float> x, y(rows * columns, -1.0f);
  for (const int number : random_numbers(rows * columns, 1, 100)) x.push_back(static_cast<float>(number) / 16);
  row_normalize(bug, x.data(), y.data(), rows, columns);
  for (int r = 0; r < rows; ++r) {
    double sum = 0;
    for (int i = 0; i < columns; ++i) sum += x[r * columns + i];
    for (int i = 0; i < columns; ++i) {
      if (!(std::abs(y[r * columns + i] - x[r * columns + i] / sum) < 1e-6)) return false;
    }
  }
  return true;
}

bool sort_is_right(Bug bug) {
  const int count = 777, num_experts = 13;
  const std::vector<int> experts = random_numbers(count, 0, num_experts);
  std::vector<int> offsets(num_experts + 1, -1), order(count, -1);
  sort_by_expert(bug, experts.data(), count, num_experts, offsets.data(), order.data());
  std::vector<int> next(num_experts + 1);
  for (const int expert : experts) ++next[expert + 1];
  for (int e = 0; e < num_experts; ++e) next[e + 1] += next[e];
  if (offsets != next) return false;
  for (int i = 0; i < count; ++i) {
    if (order[i] != next[experts[i]]++) return false;
  }
  return true;
}

bool product_is_right(Bug bug) {
  const int m = 72, n = 80, k = 104;
  std::vector<bf16> a, b, c(m * n, __float2bfloat16(-1.0f));
  for (const int number : random_numbers(m * k, -8, 9)) a.push_back(__float2bfloat16(static_cast<float>(number) / 8));
  for (const int number : random_numbers(k * n, -8, 9)) b.push_back(__float2bfloat16(static_cast<float>(number) / 8));
  product(bug, a.data(), b.data(), c.data(), m, n, k);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      float sum = 0;  // exact: sums of multiples of 1/64
      for (int l = 0; l < k; ++l) sum += __bfloat162float(a[i * k + l]) * __bfloat162float(b[l * n + j]);
      if (!(__bfloat162float(c[i * n + j]) == __bfloat162float(__float2bfloat16(sum)))) return false;
    }
  }
  return true;
}

bool count_is_right(Bug bug) {
  const std::vector<int> x = random_numbers(1000, -5, 6);
  int total = 0, expected = 0;
  count_positive(bug, x.data(), 1000, &total);
  for (const int number : x) expected += number > 0;
  return total == expected;
}

bool total_is_right(Bug bug) {
  const std::vector<int> x = random_numbers(300, -5, 6);
  std::vector<int> partials(10, -1);
  unsigned tickets = 0;
  int total = 0, expected = 0;
  last_block_total(bug, x.data(), 300, partials.data(), &tickets, &total);
  for (const int number : x) expected += number;
  return total == expected;
}

// Launches from several host threads at once.
bool host_threads_are_right() {
  bool right[4] = {};
  std::vector<std::thread> threads;
  for (bool& result : right) {
    threads.emplace_back([&result] { result = row_is_right(Bug::none) && count_is_right(Bug::none); });
  }
  for (std::thread& thread : threads) thread.join();
  return right[0] && right[1] && right[2] && right[3];
}

// Between failed launches the others are right.
bool right_after_errors() {
  for (const std::string& name : misuse_names()) {
    try {
      run_misuse(name);
      return false;
    } catch (const std::runtime_error&) {
    }
    if (!row_is_right(Bug::none)) return false;
  }
  return true;
}

const std::map<std::string, std::function<bool()>>& cases() {
  static const auto cases = [] {
    std::map<std::string, std::function<bool()>> cases = {
        {"row", [] { return row_is_right(Bug::none); }},
        {"row_without_barrier", [] { return row_is_right(Bug::row_without_barrier); }},
        {"sort", [] { return sort_is_right(Bug::none); }},
        {"sort_without_zeroing", [] { return sort_is_right(Bug::sort_without_zeroing); }},
        {"sort_without_histogram", [] { return sort_is_right(Bug::sort_without_histogram); }},
        {"sort_without_scan", [] { return sort_is_right(Bug::sort_without_scan); }},
        {"sort_without_warp_barrier", [] { return sort_is_right(Bug::sort_without_warp_barrier); }},
        {"product", [] { return product_is_right(Bug::none); }},
        {"product_overwrites_stage", [] { return product_is_right(Bug::product_overwrites_stage); }},
        {"product_without_wait", [] { return product_is_right(Bug::product_without_wait); }},
        {"count", [] { return count_is_right(Bug::none); }},
        {"count_without_atomic", [] { return count_is_right(Bug::count_without_atomic); }},
        {"count_past_the_end", [] { return count_is_right(Bug::count_past_the_end); }},
        {"total", [] { return total_is_right(Bug::none); }},
        {"total_without_fence", [] { return total_is_right(Bug::total_without_fence); }},
        {"host_threads", host_threads_are_right},
        {"after_errors", right_after_errors},
        {"stack_overflow",
         [] {
           run_stack_overflow();
           return false;
         }},
    };
    for (const std::string& name : misuse_names()) {
      cases[name] = [name] {
        run_misuse(name);
        return false;
      };
    }
    for (const auto& [name, check] : function_checks()) cases[name] = check;
    return cases;
  }();
  return cases;
}

void run_cases(const std::string& argument) {
  std::istringstream stream(argument);
  std::string name, order, seeds;
  std::getline(stream, name, ':');
  std::getline(stream, order, ':');
  std::getline(stream, seeds);
  for (int seed = 1; seed <= std::stoi(seeds); ++seed) {
    if (!glam_emulator_configure(order.c_str(), static_cast<uint64_t>(seed)))
      throw std::runtime_error("order " + order);
    std::printf("%s %s %d ", name.c_str(), order.c_str(), seed);
    std::fflush(stdout);
    try {
      std::printf("%s\n", cases().at(name)() ? "ok" : "wrong");
    } catch (const std::runtime_error& error) {
      std::printf("error %s\n", error.what());
    }
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace planted

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--count") == 0) {
      planted::run_counted();
      std::printf("%s\n%s", glam_emulator_report(), glam_emulator_table());
    } else {
      planted::run_cases(argv[i]);
    }
  }
}
