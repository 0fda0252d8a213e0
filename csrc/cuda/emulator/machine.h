// The scheduler's own state, shared by its files alone: the threads of the block that runs, where they meet and wait,
// and their fibers. One launch at a time; guarded by there being one host thread in it.
#pragma once

#include <array>
#include <bit>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cuda/emulator/config.h"
#include "cuda/emulator/fiber.h"
#include "cuda/emulator/sanitizers.h"
#include "cuda/emulator/scheduler.h"

namespace glam::cuda::emulator {

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

inline Arena make_arena(size_t bytes) {
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

Machine& machine();

// --- Leaving the running thread (scheduler.cpp)

void suspend(Thread& thread);
void wait(Thread& thread, const char* operation, unsigned mask, Location here);
void wake(Thread& thread);

// --- A thread's asynchronous copies (meetings.cpp)

// Those of groups before `first_open_group`, whatever the order.
void finish_copies(Thread& thread, int first_open_group);
// Each pending copy may be done by now.
void advance_copies(Thread& thread);

// --- What errors say (reports.cpp)

std::string index_text(uint3 index);
std::string hexadecimal(unsigned mask);
// Nobody can run and not all have ended: who waits where, and who has gone.
std::string describe_deadlock();
// Throws where a GPU would refuse the launch.
void check(const Launch& launch, const std::string& kernel);

}  // namespace glam::cuda::emulator
