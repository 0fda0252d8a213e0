// The scheduler: see scheduler.h. Compiled without a sanitizer's instrumentation.
#include "cuda/emulator/scheduler.h"

#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "cuda/emulator/config.h"
#include "cuda/emulator/counters.h"
#include "cuda/emulator/fiber.h"
#include "cuda/emulator/kernel_name.h"
#include "cuda/emulator/sanitizers.h"

namespace glam::cuda::emulator {

const Position* current = nullptr;
SharedMemory shared_memory;

namespace {

constexpr unsigned kLanes = 32;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kReservedCopies = 256;

struct Copy {
  CopyFunction function;
  void* target;
  const void* source;
  bool valid;
  int group;
};

struct Thread {
  Position position;
  Fiber* fiber = nullptr;
  const char* waits_in = nullptr;  // the operation, null if it can run
  unsigned mask = 0;               // of the lanes that a warp-wide operation waits for
  Location last_wait;              // line 0 if it has not waited yet
  bool ended = false;
  std::vector<Copy> copies;
  int open_group = 0;
};

// The lanes of one mask that meet. Two generations of slots, so that one wait per operation is enough: a lane can be
// one operation ahead of the slowest reader but not two.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  unsigned unread = 0;  // lanes that have been told of the end of an operation and have not read yet
  unsigned generation = 0;
  const char* operation = nullptr;
  Location place;
  Slot slots[2][kLanes];
};

// Every meeting under way keeps a lane busy, so that one is left for the lane that asks. The host allocates them, as
// memory from a thread would look like that thread's to ThreadSanitizer.
struct Warp {
  std::array<Meeting, kLanes> meetings;
  unsigned used = 0;
};

struct Barrier {
  size_t arrived = 0;
  unsigned generation = 0;
  int value = 0, results[2];
  const char* operation = nullptr;
  Location place;
};

// Where the threads of one block hand on what they wrote: at its barrier and at its warps' meetings, by generation.
// Every block has its own. A tag remembers all that was ever handed on through it, so blocks that shared one would be
// ordered.
struct Tags {
  char barrier[2];
  char meetings[kMaxThreads / kLanes][kLanes][2];
};

// Threads that can run.
class ReadyQueue {
 public:
  void clear(size_t capacity) {
    threads_.resize(std::bit_ceil(capacity));
    first_ = count_ = 0;
  }
  bool empty() const { return count_ == 0; }
  void push(Thread* thread) { at(count_++) = thread; }
  Thread* pop(Order order, uint64_t random) {
    if (order == Order::random) std::swap(at(random % count_), at(count_ - 1));
    if (order != Order::forward) return at(--count_);
    Thread* thread = at(0);
    ++first_;
    --count_;
    return thread;
  }

 private:
  Thread*& at(size_t i) { return threads_[(first_ + i) & (threads_.size() - 1)]; }

  std::vector<Thread*> threads_;  // a ring, its size a power of two
  size_t first_ = 0, count_ = 0;
};

// Fibers are dear to make, above all for ThreadSanitizer, and kept for the next thread that starts. Usually that is the
// next one of the same block, while the stack is still in the cache. Where races are watched, a fiber rests for a block
// first, as otherwise threads of two neighbouring blocks, or of one, would be one thread to the sanitizer.
class FiberPool {
 public:
  Fiber* take() {
    if (idle_.empty()) {
      all_.push_back(std::make_unique<Fiber>(all_.size()));
      return all_.back().get();
    }
    Fiber* fiber = idle_.back();
    idle_.pop_back();
    return fiber;
  }
  void give_back(Fiber* fiber) { (kRacesAreWatched ? ended_now_ : idle_).push_back(fiber); }
  void start_block() {
    idle_.insert(idle_.end(), ended_before_.begin(), ended_before_.end());
    ended_before_ = std::move(ended_now_);
    ended_now_.clear();
  }
  void clear() { *this = {}; }

 private:
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> idle_, ended_now_, ended_before_;
};

struct FreeDeleter {
  void operator()(unsigned char* memory) const { std::free(memory); }
};
using Arena = std::unique_ptr<unsigned char, FreeDeleter>;

Arena make_arena(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kSharedAlignment, bytes + kSharedMargin) != 0) throw std::bad_alloc();
  poison(static_cast<char*>(memory) + bytes, kSharedMargin);
  return Arena(static_cast<unsigned char*>(memory));
}

// Everything about the launch that runs; one at a time.
struct Machine {
  Order order;
  uint64_t random_state;
  const std::function<void()>* body = nullptr;
  std::string kernel;
  std::string error;
  FiberPool fibers;
  std::vector<Thread> threads;
  size_t size = 0;  // threads of a block
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier barrier;
  std::vector<std::unique_ptr<Tags>> tags;  // of the launch's blocks; the last one's are in use
  ReadyQueue ready;
  Thread* running = nullptr;
  char launched, ended, fenced;  // tags: host to threads, threads to host, threads to threads

  uint64_t random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state >> 16;
  }
};

std::mutex one_launch;  // there from the start, for ThreadSanitizer, which does not see how machine() is made

// Never destroyed: fibers may not be unmade after the sanitizers have closed.
Machine& machine() {
  static Machine* const machine = new Machine;
  return *machine;
}

bool same_place(Location a, Location b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string index_text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string hexadecimal(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

// --- Leaving and entering a thread

void finish_copies(Thread& thread, int first_open_group) {
  auto& copies = thread.copies;
  size_t kept = 0;
  for (const Copy& copy : copies) {
    if (copy.group < first_open_group) {
      copy.function(copy.target, copy.source, copy.valid);
    } else {
      copies[kept++] = copy;
    }
  }
  copies.resize(kept);
}

// Each pending copy may be done by now.
void advance_copies(Thread& thread) {
  Machine& m = machine();
  if (m.order == Order::forward) return;
  auto& copies = thread.copies;
  size_t kept = 0;
  for (const Copy& copy : copies) {
    if (m.order == Order::reverse || m.random() % 4 == 0) {
      copy.function(copy.target, copy.source, copy.valid);
    } else {
      copies[kept++] = copy;
    }
  }
  copies.resize(kept);
}

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

// --- Errors

std::string describe_wait(const Thread& thread) {
  std::string text = std::string("in ") + thread.waits_in + " at " + to_text(thread.last_wait);
  if (thread.mask) text += " with mask " + hexadecimal(thread.mask);
  return text;
}

// Nobody can run and not all have ended: who waits where, and who has gone.
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

int barrier(Vote vote, int value, Location here) {
  static constexpr const char* kNames[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_and",
                                           "__syncthreads_or"};
  const char* operation = kNames[static_cast<int>(vote)];
  Machine& m = machine();
  Thread& self = *m.running;
  Barrier& b = m.barrier;
  if (b.arrived && (!same_place(b.place, here) || b.operation != operation)) {
    fail(std::string("divergent barriers: others of the block wait in ") + b.operation + " at " + to_text(b.place) +
             ", this one has come to " + operation,
         here);
  }
  if (b.arrived == 0) b.value = vote == Vote::all;
  if (vote == Vote::all) {
    b.value &= value != 0;
  } else {
    b.value += value != 0;
  }
  b.operation = operation;
  b.place = here;
  const unsigned generation = b.generation % 2;
  char& tag = m.tags.back()->barrier[generation];
  order_before(tag);
  if (++b.arrived == m.size) {
    b.results[generation] = vote == Vote::any ? b.value != 0 : b.value;
    b.arrived = 0;
    ++b.generation;
    self.last_wait = here;
    for (size_t i = 0; i < m.size; ++i) wake(m.threads[i]);
    suspend(self);
  } else {
    wait(self, operation, 0, here);
  }
  order_after(tag);
  return b.results[generation];
}

namespace {

// The meeting of this mask that is under way or was the last of it; else one that all its lanes have left.
Meeting& meeting_of(unsigned warp_index, unsigned mask) {
  Warp& warp = *machine().warps[warp_index];
  for (unsigned i = 0; i < warp.used; ++i) {
    if (warp.meetings[i].mask == mask) return warp.meetings[i];
  }
  unsigned i = 0;
  while (i < warp.used && (warp.meetings[i].arrived != 0 || warp.meetings[i].unread != 0)) ++i;
  if (i == warp.used) ++warp.used;
  warp.meetings[i].mask = mask;
  return warp.meetings[i];
}

}  // namespace

const Slot* exchange(unsigned mask, const Slot& slot, const char* operation, Location here, bool orders_memory) {
  Machine& m = machine();
  Thread& self = *m.running;
  const unsigned lane = self.position.lane;
  if (!(mask >> lane & 1)) {
    fail("lane " + std::to_string(lane) + " is not in its own mask " + hexadecimal(mask) + " in " + operation, here);
  }
  Meeting& meeting = meeting_of(self.position.warp, mask);
  if (meeting.arrived && (meeting.operation != operation || !same_place(meeting.place, here))) {
    fail(std::string("divergent warp: others of the mask ") + hexadecimal(mask) + " wait in " + meeting.operation +
             " at " + to_text(meeting.place) + ", this one has come to " + operation,
         here);
  }
  meeting.operation = operation;
  meeting.place = here;
  const unsigned generation = meeting.generation % 2;
  meeting.slots[generation][lane] = slot;
  meeting.arrived |= 1u << lane;
  const size_t number = &meeting - m.warps[self.position.warp]->meetings.data();
  char& tag = m.tags.back()->meetings[self.position.warp][number][generation];
  if (orders_memory) order_before(tag);
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.generation;
    self.last_wait = here;
    for (unsigned other = 0; other < kLanes; ++other) {
      if (!(mask >> other & 1) || other == lane) continue;
      wake(m.threads[self.position.warp * kLanes + other]);
      ++meeting.unread;
    }
  } else {
    wait(self, operation, mask, here);
    --meeting.unread;
  }
  if (orders_memory) order_after(tag);
  return meeting.slots[generation];
}

void fence() {
  order_after(machine().fenced);
  order_before(machine().fenced);
  maybe_yield();
}

void start_copy(CopyFunction copy, void* target, const void* source, bool valid) {
  Thread& self = *machine().running;
  self.copies.push_back({copy, target, source, valid, self.open_group});
  advance_copies(self);
}

void commit_copies() {
  Thread& self = *machine().running;
  ++self.open_group;
  advance_copies(self);
}

void wait_for_copies(int pending) {
  Thread& self = *machine().running;
  finish_copies(self, self.open_group - pending);
}

bool on_own_stack(const void* address) { return machine().running->fiber->contains(address); }

const std::string& running_kernel() { return machine().kernel; }

std::string to_text(Location here) {
  const std::string file = here.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(here.line());
}

}  // namespace glam::cuda::emulator
