// A stack of its own and the way in and out of it: what one CUDA thread runs on while the emulator has the others wait.
//
// x86-64 has a switch of 16 instructions; elsewhere ucontext does it with system calls. Below each stack lies a page
// that cannot be touched, so that an overflow ends the program instead of overwriting a neighbour. ThreadSanitizer
// knows each fiber as a thread, and a switch orders nothing: only the emulator's barriers do.
#pragma once

#include <cstddef>

#include "cuda/emulator/sanitizers.h"

#if defined(__x86_64__) && !defined(GLAM_EMULATOR_UCONTEXT)
#define GLAM_EMULATOR_OWN_SWITCH
#else
#include <ucontext.h>
#endif

namespace glam::cuda::emulator {

class Fiber {
 public:
  // `index` shifts the top of the stack, so that the stacks' busy ends do not all fall into the same sets of the cache.
  explicit Fiber(size_t index);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry() on an empty stack. entry() ends with suspend() and never returns.
  void prepare(void (*entry)());
  // From the host's stack: runs the fiber until it calls suspend().
  void resume();
  // From the fiber's stack: back into resume().
  void suspend();

  // As if the fiber had done so where it was left, for one that will never go on: see order_before().
  void order_before_as_left(char& tag);

  bool contains(const void* address) const;

 private:
  static void begin();

  char* pages_;
  char* top_;
  void (*entry_)() = nullptr;
  void* watched_thread_;            // for ThreadSanitizer
  void* address_handle_ = nullptr;  // for AddressSanitizer
#if defined(GLAM_EMULATOR_OWN_SWITCH)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace glam::cuda::emulator
