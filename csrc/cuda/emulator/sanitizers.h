// What the emulator tells the sanitizers; nothing in an ordinary build.
//
// The emulator's own sources are compiled without instrumentation (its bookkeeping is shared by all fibers and guarded
// by there being one host thread), so they learn from GLAM_EMULATOR_TSAN and GLAM_EMULATOR_ASAN what the kernels are
// built with.
#pragma once

#include <cstddef>

#if defined(GLAM_EMULATOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* tag);
void __tsan_release(void* tag);
}
#endif
#if defined(GLAM_EMULATOR_ASAN)
extern "C" {
void __asan_poison_memory_region(const volatile void* address, size_t size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_bytes);
}
#endif

namespace glam::cuda::emulator {

// --- ThreadSanitizer

// A tag is a place through which one thread hands its writes to others: everything before order_before(tag) in one
// thread happens before everything after order_after(tag) in another.
#if defined(GLAM_EMULATOR_TSAN)
constexpr bool kRacesAreWatched = true;
inline void order_before(char& tag) { __tsan_release(&tag); }
inline void order_after(char& tag) { __tsan_acquire(&tag); }
inline void* make_watched_thread() { return __tsan_create_fiber(0); }
inline void destroy_watched_thread(void* thread) { __tsan_destroy_fiber(thread); }
inline void* this_watched_thread() { return __tsan_get_current_fiber(); }
// Orders nothing, which is flag 1.
inline void switch_watched_thread(void* thread) { __tsan_switch_to_fiber(thread, 1); }
#else
constexpr bool kRacesAreWatched = false;
inline void order_before(char&) {}
inline void order_after(char&) {}
inline void* make_watched_thread() { return nullptr; }
inline void destroy_watched_thread(void*) {}
inline void* this_watched_thread() { return nullptr; }
inline void switch_watched_thread(void*) {}
#endif

// --- AddressSanitizer

struct Stack {
  const void* bottom = nullptr;
  size_t bytes = 0;
};

// Right before a switch to a stack and right after one; the handle belongs to the stack that is left.
#if defined(GLAM_EMULATOR_ASAN)
inline void poison(const void* address, size_t bytes) { __asan_poison_memory_region(address, bytes); }
inline void unpoison(const void* address, size_t bytes) { __asan_unpoison_memory_region(address, bytes); }
inline void leave_for(Stack stack, void*& handle) {
  __sanitizer_start_switch_fiber(&handle, stack.bottom, stack.bytes);
}
inline Stack arrived_from(void* handle) {
  Stack old;
  __sanitizer_finish_switch_fiber(handle, &old.bottom, &old.bytes);
  return old;
}
#else
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
inline void leave_for(Stack, void*&) {}
inline Stack arrived_from(void*) { return {}; }
#endif

}  // namespace glam::cuda::emulator
