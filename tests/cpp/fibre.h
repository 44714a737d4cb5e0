// Fibres: stacks that one thread of the system switches between. On x86-64 without a call of the system, which is what
// swapcontext takes twice.
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastrnn {

struct alignas(64) Stack {
  static constexpr size_t kBytes = 128 << 10;
  char bytes[kBytes];

  Stack() {}  // not cleared
};

#if defined(__x86_64__)

// Saves what a call preserves on the stack, the stack pointer in *from; goes on where `to` was saved.
extern "C" __attribute__((visibility("hidden"))) void fastrnn_switch_stack(void** from, void* to);
asm(R"(
  .text
  .hidden fastrnn_switch_stack
  .weak fastrnn_switch_stack
  .type fastrnn_switch_stack, @function
fastrnn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

class Fibre {
 public:
  // The first switch to it calls body(argument), which never returns.
  void start(Stack& stack, void (*body)(void*), void* argument) {
    body_ = body, argument_ = argument;
    void** top = reinterpret_cast<void**>(stack.bytes + Stack::kBytes);
    *--top = nullptr;                              // where the body would return to; and the alignment of a call
    *--top = reinterpret_cast<void*>(&enter);      // where the first switch returns to
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // saved registers
    stack_pointer_ = top;
  }
  // From this fibre to another.
  void switch_to(Fibre& other) {
    starting() = &other;
    fastrnn_switch_stack(&stack_pointer_, other.stack_pointer_);
  }

 private:
  static Fibre*& starting() {
    static thread_local Fibre* fibre = nullptr;
    return fibre;
  }
  static void enter() {
    Fibre* const self = starting();
    self->body_(self->argument_);
  }

  void* stack_pointer_ = nullptr;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
};

#else

class Fibre {
 public:
  void start(Stack& stack, void (*body)(void*), void* argument) {
    body_ = body, argument_ = argument;
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack.bytes, context_.uc_stack.ss_size = Stack::kBytes, context_.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(this);
    makecontext(&context_, reinterpret_cast<void (*)()>(&enter), 2, static_cast<unsigned>(address),
                static_cast<unsigned>(static_cast<uint64_t>(address) >> 32));
  }
  void switch_to(Fibre& other) { swapcontext(&context_, &other.context_); }

 private:
  static void enter(unsigned low, unsigned high) {
    auto* const self = reinterpret_cast<Fibre*>(static_cast<uintptr_t>(static_cast<uint64_t>(high) << 32 | low));
    self->body_(self->argument_);
  }

  ucontext_t context_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
};

#endif

}  // namespace fastrnn
