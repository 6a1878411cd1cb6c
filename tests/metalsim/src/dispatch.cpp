// objc_msgSend: finds the implementation and jumps there with every argument
// register as it was, so it fits any signature and leaves no frame behind
// for an exception to unwind through.

#include <cstdio>
#include <cstdlib>

#include "objc.h"
#include "trace.h"

extern "C" __attribute__((visibility("hidden"), used)) IMP
metalsim_lookup_imp(id self, SEL sel) {
  if (metalsim::is_tracing.load(std::memory_order_relaxed))
    metalsim::note_message(self, sel);
  return metalsim::find_implementation(self->isa, sel);
}

#if defined(__x86_64__)
asm(R"(
  .text
  .globl objc_msgSend
  .type objc_msgSend, @function
  .p2align 4
objc_msgSend:
  .cfi_startproc
  testq %rdi, %rdi
  je 1f
  pushq %rbp
  .cfi_def_cfa_offset 16
  .cfi_offset %rbp, -16
  movq %rsp, %rbp
  .cfi_def_cfa_register %rbp
  subq $192, %rsp
  movaps %xmm0, 0(%rsp)
  movaps %xmm1, 16(%rsp)
  movaps %xmm2, 32(%rsp)
  movaps %xmm3, 48(%rsp)
  movaps %xmm4, 64(%rsp)
  movaps %xmm5, 80(%rsp)
  movaps %xmm6, 96(%rsp)
  movaps %xmm7, 112(%rsp)
  movq %rdi, 128(%rsp)
  movq %rsi, 136(%rsp)
  movq %rdx, 144(%rsp)
  movq %rcx, 152(%rsp)
  movq %r8, 160(%rsp)
  movq %r9, 168(%rsp)
  movq %rax, 176(%rsp)
  call metalsim_lookup_imp
  movq %rax, %r11
  movaps 0(%rsp), %xmm0
  movaps 16(%rsp), %xmm1
  movaps 32(%rsp), %xmm2
  movaps 48(%rsp), %xmm3
  movaps 64(%rsp), %xmm4
  movaps 80(%rsp), %xmm5
  movaps 96(%rsp), %xmm6
  movaps 112(%rsp), %xmm7
  movq 128(%rsp), %rdi
  movq 136(%rsp), %rsi
  movq 144(%rsp), %rdx
  movq 152(%rsp), %rcx
  movq 160(%rsp), %r8
  movq 168(%rsp), %r9
  movq 176(%rsp), %rax
  leave
  .cfi_def_cfa %rsp, 8
  .cfi_restore %rbp
  jmp *%r11
1:
  xorl %eax, %eax
  xorl %edx, %edx
  xorps %xmm0, %xmm0
  xorps %xmm1, %xmm1
  ret
  .cfi_endproc
  .size objc_msgSend, .-objc_msgSend
)");
#elif defined(__aarch64__)
// Apple's linker knows C's names by their underscore, and no types and sizes.
#if defined(__APPLE__)
#define METALSIM_C "_"
#define METALSIM_TYPE ""
#define METALSIM_SIZE ""
#else
#define METALSIM_C ""
#define METALSIM_TYPE ".type objc_msgSend, %function\n"
#define METALSIM_SIZE ".size objc_msgSend, .-objc_msgSend\n"
#endif
asm(".text\n.globl " METALSIM_C "objc_msgSend\n" METALSIM_TYPE
    ".p2align 4\n" METALSIM_C
    "objc_msgSend:"
    R"(
  .cfi_startproc
  cbz x0, 1f
  stp x29, x30, [sp, #-224]!
  .cfi_def_cfa_offset 224
  .cfi_offset x29, -224
  .cfi_offset x30, -216
  mov x29, sp
  stp x0, x1, [sp, #16]
  stp x2, x3, [sp, #32]
  stp x4, x5, [sp, #48]
  stp x6, x7, [sp, #64]
  str x8, [sp, #80]
  stp q0, q1, [sp, #96]
  stp q2, q3, [sp, #128]
  stp q4, q5, [sp, #160]
  stp q6, q7, [sp, #192]
  bl )" METALSIM_C R"(metalsim_lookup_imp
  mov x17, x0
  ldp x0, x1, [sp, #16]
  ldp x2, x3, [sp, #32]
  ldp x4, x5, [sp, #48]
  ldp x6, x7, [sp, #64]
  ldr x8, [sp, #80]
  ldp q0, q1, [sp, #96]
  ldp q2, q3, [sp, #128]
  ldp q4, q5, [sp, #160]
  ldp q6, q7, [sp, #192]
  ldp x29, x30, [sp], #224
  .cfi_def_cfa_offset 0
  .cfi_restore x29
  .cfi_restore x30
  br x17
1:
  mov x0, #0
  mov x1, #0
  movi d0, #0
  movi d1, #0
  movi d2, #0
  movi d3, #0
  ret
  .cfi_endproc
)" METALSIM_SIZE);
#else
#error "objc_msgSend is written for x86-64 and aarch64 only"
#endif
