// What the emulator says of a launch that went wrong. Compiled without a sanitizer's instrumentation, like
// scheduler.cpp.

#include <cstdio>
#include <stdexcept>
#include <utility>

#include "cuda/emulator/machine.h"

namespace glam::cuda::emulator {

std::string index_text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string hexadecimal(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

std::string to_text(Location here) {
  const std::string file = here.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(here.line());
}

namespace {

std::string describe_wait(const Thread& thread) {
  std::string text = std::string("in ") + thread.waits_in + " at " + to_text(thread.last_wait);
  if (thread.mask) text += " with mask " + hexadecimal(thread.mask);
  return text;
}

}  // namespace

std::string describe_deadlock() {
  Machine& m = machine();
  std::string text = "deadlock: no thread can go on";
  std::vector<std::pair<std::string, size_t>> groups;
  std::vector<const Thread*> firsts;
  const Thread* ended = nullptr;
  size_t num_ended = 0;
  for (size_t i = 0; i < m.size; ++i) {
    const Thread& thread = m.threads[i];
    if (thread.ended) {
      if (!ended) ended = &thread;
      ++num_ended;
      continue;
    }
    const std::string wait = describe_wait(thread);
    size_t g = 0;
    while (g < groups.size() && groups[g].first != wait) ++g;
    if (g == groups.size()) {
      groups.emplace_back(wait, 0);
      firsts.push_back(&thread);
    }
    ++groups[g].second;
  }
  constexpr size_t kShown = 4;
  for (size_t g = 0; g < groups.size() && g < kShown; ++g) {
    text += "; " + std::to_string(groups[g].second) + " waiting " + groups[g].first + ", the first is thread " +
            index_text(firsts[g]->position.thread);
  }
  if (groups.size() > kShown) text += "; and others elsewhere";
  if (ended) {
    text += "; " + std::to_string(num_ended) + " ended, the first is thread " + index_text(ended->position.thread);
    text += ended->last_wait.line() ? ", which last waited at " + to_text(ended->last_wait) : ", which never waited";
  }
  return text;
}

void check(const Launch& launch, const std::string& kernel) {
  const dim3 g = launch.grid, b = launch.block;
  const size_t threads = size_t(b.x) * b.y * b.z;
  std::string problem;
  if (threads == 0 || threads > kMaxThreads || b.z > 64) {
    problem =
        "a block of " + std::to_string(b.x) + " x " + std::to_string(b.y) + " x " + std::to_string(b.z) + " threads";
  } else if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    problem =
        "a grid of " + std::to_string(g.x) + " x " + std::to_string(g.y) + " x " + std::to_string(g.z) + " blocks";
  } else if (launch.shared_bytes > kMaxSharedBytes) {
    problem = std::to_string(launch.shared_bytes) + " bytes of shared memory";
  }
  if (!problem.empty()) {
    throw std::runtime_error("glam emulator: " + kernel + " cannot be launched with " + problem + ", at " +
                             to_text(launch.where));
  }
}

}  // namespace glam::cuda::emulator
