// Fibers: see fiber.h.
#include "cuda/emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace glam::cuda::emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // sanitizers make frames several times larger
constexpr size_t kColours = 64;
constexpr size_t kColourBytes = 192;

// Of the one host thread that runs fibers at a time.
struct Host {
  Stack stack;
  void* watched_thread = nullptr;
  void* address_handle = nullptr;
#if defined(GLAM_EMULATOR_OWN_SWITCH)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};
Host host;
Fiber* resumed = nullptr;

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

#if defined(GLAM_EMULATOR_OWN_SWITCH)
// Pushes the registers that a called function must preserve, stores the stack pointer, and does the reverse on the
// other stack, which prepare() has laid out if it is fresh. It returns by a jump: the processor would predict a ret to
// go back to where this call came from.
extern "C" void glam_emulator_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.globl glam_emulator_switch
.hidden glam_emulator_switch
.type glam_emulator_switch, @function
glam_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  pop %rcx
  jmp *%rcx
.size glam_emulator_switch, .-glam_emulator_switch
)");
#endif

Fiber::Fiber(size_t index) {
  const size_t bytes = page_bytes() + kStackBytes;
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  pages_ = static_cast<char*>(pages);
  mprotect(pages_, page_bytes(), PROT_NONE);
  top_ = pages_ + bytes - index % kColours * kColourBytes;
  unpoison(pages_, bytes);  // an abandoned stack may have lain here
  watched_thread_ = make_watched_thread();
}

Fiber::~Fiber() {
  destroy_watched_thread(watched_thread_);
  munmap(pages_, page_bytes() + kStackBytes);
}

void Fiber::order_before_as_left(char& tag) {
  void* host_thread = this_watched_thread();
  switch_watched_thread(watched_thread_);
  order_before(tag);
  switch_watched_thread(host_thread);
}

bool Fiber::contains(const void* address) const {
  const auto* byte = static_cast<const char*>(address);
  return byte >= pages_ && byte < pages_ + page_bytes() + kStackBytes;
}

void Fiber::begin() {
  host.stack = arrived_from(nullptr);
  resumed->entry_();
}

void Fiber::prepare(void (*entry)()) {
  entry_ = entry;
#if defined(GLAM_EMULATOR_OWN_SWITCH)
  // From the top down: no return address for begin(), begin() itself for the switch to go to, six registers. The
  // address of begin lies on a multiple of 16, as the calling convention asks.
  void** slot = reinterpret_cast<void**>(top_) - 1;
  *slot-- = nullptr;
  *slot = reinterpret_cast<void*>(&Fiber::begin);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  stack_pointer_ = slot;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = pages_ + page_bytes();
  context_.uc_stack.ss_size = static_cast<size_t>(top_ - pages_) - page_bytes();
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::begin, 0);
#endif
}

void Fiber::resume() {
  resumed = this;
  host.watched_thread = this_watched_thread();
  leave_for({pages_ + page_bytes(), kStackBytes}, host.address_handle);
  switch_watched_thread(watched_thread_);
#if defined(GLAM_EMULATOR_OWN_SWITCH)
  glam_emulator_switch(&host.stack_pointer, stack_pointer_);
#else
  swapcontext(&host.context, &context_);
#endif
  arrived_from(host.address_handle);
}

void Fiber::suspend() {
  leave_for(host.stack, address_handle_);
  switch_watched_thread(host.watched_thread);
#if defined(GLAM_EMULATOR_OWN_SWITCH)
  glam_emulator_switch(&stack_pointer_, host.stack_pointer);
#else
  swapcontext(&context_, &host.context);
#endif
  host.stack = arrived_from(address_handle_);
}

}  // namespace glam::cuda::emulator
