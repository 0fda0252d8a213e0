// The scheduler: see scheduler.h. Compiled without a sanitizer's instrumentation.
#include "cuda/emulator/scheduler.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "cuda/emulator/counters.h"
#include "cuda/emulator/kernel_name.h"
#include "cuda/emulator/machine.h"

namespace glam::cuda::emulator {

const Position* current = nullptr;
SharedMemory shared_memory;

namespace {

std::mutex one_launch;  // there from the start, for ThreadSanitizer, which does not see how machine() is made

}  // namespace

// Never destroyed: fibers may not be unmade after the sanitizers have closed.
Machine& machine() {
  static Machine* const machine = new Machine;
  return *machine;
}

// --- Leaving and entering a thread

void suspend(Thread& thread) {
  thread.fiber->suspend();
  if (!thread.copies.empty()) advance_copies(thread);
}

void wait(Thread& thread, const char* operation, unsigned mask, Location here) {
  thread.waits_in = operation;
  thread.mask = mask;
  thread.last_wait = here;
  suspend(thread);
}

void wake(Thread& thread) {
  thread.waits_in = nullptr;
  machine().ready.push(&thread);
}

namespace {

void thread_entry() {
  Machine& m = machine();
  order_after(m.launched);
  try {
    (*m.body)();
  } catch (const std::exception& error) {
    fail(std::string("the kernel threw: ") + error.what(), Location());
  }
  Thread& thread = *m.running;
  finish_copies(thread, thread.open_group + 1);
  order_before(m.ended);
  thread.ended = true;
  thread.fiber->suspend();
  std::abort();  // an ended thread is never resumed
}

void resume(Thread& thread) {
  Machine& m = machine();
  if (!thread.fiber) {
    thread.fiber = m.fibers.take();
    thread.fiber->prepare(thread_entry);
  }
  m.running = &thread;
  current = &thread.position;
  thread.fiber->resume();
  if (thread.ended) m.fibers.give_back(thread.fiber);
}

// --- Blocks

void start_block(const Launch& launch, size_t block) {
  Machine& m = machine();
  m.fibers.start_block();
  m.barrier = {};
  for (auto& warp : m.warps) {
    for (unsigned i = 0; i < warp->used; ++i) warp->meetings[i].arrived = warp->meetings[i].unread = 0;
  }
  if (kRacesAreWatched || m.tags.empty()) m.tags.push_back(std::make_unique<Tags>());
  m.ready.clear(m.size);
  for (size_t i = 0; i < m.size; ++i) {
    Thread& thread = m.threads[i];
    const dim3 b = launch.block, g = launch.grid;
    thread.position = {
        .thread = {unsigned(i % b.x), unsigned(i / b.x % b.y), unsigned(i / b.x / b.y)},
        .block = {unsigned(block % g.x), unsigned(block / g.x % g.y), unsigned(block / g.x / g.y)},
        .block_size = b,
        .grid_size = g,
        .lane = unsigned(i % kLanes),
        .warp = unsigned(i / kLanes),
    };
    thread.fiber = nullptr;
    thread.waits_in = nullptr;
    thread.last_wait = {};
    thread.ended = false;
    thread.copies.clear();
    if (kRacesAreWatched) thread.copies.reserve(kReservedCopies);  // memory from the host, as for Warp
    thread.open_group = 0;
    m.ready.push(&thread);
  }
}

void run_block(const Launch& launch, size_t block) {
  Machine& m = machine();
  start_block(launch, block);
  while (!m.ready.empty() && m.error.empty()) resume(*m.ready.pop(m.order, m.order == Order::random ? m.random() : 0));
  for (size_t i = 0; i < m.size && m.error.empty(); ++i) {
    if (!m.threads[i].ended) {
      m.error = "block " + index_text(m.threads[i].position.block) + ": " + describe_deadlock();
    }
  }
  counters::end_block();
}

// Blocks in the configured order; a random one walks the grid in steps that reach every block.
struct BlockOrder {
  size_t count, first, step;

  BlockOrder(size_t num_blocks) : count(num_blocks), first(0), step(1) {
    Machine& m = machine();
    if (m.order == Order::reverse) {
      first = count - 1;
      step = count - 1;
    } else if (m.order == Order::random) {
      first = m.random() % count;
      do {
        step = m.random() % count + 1;
      } while (std::gcd(step, count) != 1);
    }
  }
  size_t operator[](size_t i) const { return (first + i % count * step) % count; }
};

}  // namespace

void run(const Launch& launch, const std::function<void()>& body) {
  static thread_local bool inside = false;
  if (inside) fail("a kernel cannot launch another", launch.where);
  const std::lock_guard lock(one_launch);
  Machine& m = machine();
  m.kernel = kernel_name(launch.kernel);
  check(launch, m.kernel);
  counters::count_launch(m.kernel, launch);

  m.order = config().order;
  m.random_state = (config().seed + 1) * 0x9E3779B97F4A7C15ull;
  m.body = &body;
  m.error.clear();
  m.size = size_t(launch.block.x) * launch.block.y * launch.block.z;
  if (m.threads.size() < m.size) m.threads.resize(m.size);
  while (m.warps.size() * kLanes < m.size) m.warps.push_back(std::make_unique<Warp>());

  struct Inside {
    Inside() { inside = true; }
    ~Inside() {
      inside = false;
      current = nullptr;
      shared_memory = {};
    }
  };
  const Inside guard;
  order_before(m.launched);
  std::vector<Arena> arenas;  // where races are watched one per block, kept to the end: reuse would look like a race
  const BlockOrder blocks(size_t(launch.grid.x) * launch.grid.y * launch.grid.z);
  for (size_t i = 0; i < blocks.count && m.error.empty(); ++i) {
    if (arenas.empty() || kRacesAreWatched) arenas.push_back(make_arena(launch.shared_bytes));
    shared_memory = {arenas.back().get(), launch.shared_bytes};
    std::memset(shared_memory.data, 0xFF, shared_memory.bytes);
    order_before(m.launched);
    run_block(launch, blocks[i]);
  }
  if (!m.error.empty()) {
    for (size_t i = 0; i < m.size; ++i) {
      const Thread& thread = m.threads[i];
      if (thread.fiber && !thread.ended) thread.fiber->order_before_as_left(m.ended);
    }
  }
  order_after(m.ended);
  m.tags.clear();
  if (!m.error.empty()) {
    m.fibers.clear();  // their stacks hold threads that will never go on
    throw std::runtime_error("glam emulator: " + m.kernel + ", " + m.error);
  }
}

void fail(const std::string& message, Location here) {
  Machine& m = machine();
  Thread& thread = *m.running;
  m.error =
      "block " + index_text(thread.position.block) + ", thread " + index_text(thread.position.thread) + ": " + message;
  if (here.line()) m.error += " at " + to_text(here);
  thread.fiber->suspend();
  std::abort();  // a failed launch resumes nobody
}

void maybe_yield() {
  Machine& m = machine();
  if (m.order != Order::random || m.random() % 8 != 0) return;
  m.ready.push(m.running);
  suspend(*m.running);
}

bool on_own_stack(const void* address) { return machine().running->fiber->contains(address); }

const std::string& running_kernel() { return machine().kernel; }

}  // namespace glam::cuda::emulator
