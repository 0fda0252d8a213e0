// Where threads meet: the block's barrier and the exchanges of a warp's lanes; fences and asynchronous copies. Compiled
// without a sanitizer's instrumentation, like scheduler.cpp.

#include <cstring>

#include "cuda/emulator/machine.h"

namespace glam::cuda::emulator {
namespace {

bool same_place(Location a, Location b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

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

}  // namespace glam::cuda::emulator
