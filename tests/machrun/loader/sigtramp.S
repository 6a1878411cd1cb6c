// void machrun_sigtramp(handler, number, siginfo, ucontext)
//
// Calls handler(number, siginfo, ucontext). Its frame describes, as macOS's
// _sigtramp does, what the signal interrupted: every register lies in the machine
// context, whose address is kept in x28.
//
// In MacMcontext: x0 at 16, fp at 248, lr at 256, sp at 264, pc at 272.

#define SAVED(register, low, high) \
  .cfi_escape 0x10, register, 3, 0x8c, low, high

  .text
  .globl _machrun_sigtramp
  .p2align 2
_machrun_sigtramp:
  .cfi_startproc
  .cfi_signal_frame
  stp x28, x30, [sp, #-32]!
  str x29, [sp, #16]
  mov x29, sp
  ldr x28, [x3, #48]        // ucontext.mcontext
  // The address of the frame is the interrupted sp: DW_CFA_def_cfa_expression of
  // { x28 + 264, deref }.
  .cfi_escape 0x0f, 4, 0x8c, 0x88, 0x02, 0x06
  // DW_CFA_expression of { x28 + offset } for each register, offsets as SLEB128.
  SAVED(19, 0xa8, 0x01)     // 16 + 8 * 19 = 168
  SAVED(20, 0xb0, 0x01)
  SAVED(21, 0xb8, 0x01)
  SAVED(22, 0xc0, 0x01)
  SAVED(23, 0xc8, 0x01)
  SAVED(24, 0xd0, 0x01)
  SAVED(25, 0xd8, 0x01)
  SAVED(26, 0xe0, 0x01)
  SAVED(27, 0xe8, 0x01)
  SAVED(28, 0xf0, 0x01)     // 240
  SAVED(29, 0xf8, 0x01)     // 248
  SAVED(30, 0x80, 0x02)     // 256: what crashed may be a leaf
  SAVED(32, 0x90, 0x02)     // pc, 272
  .cfi_return_column 32
  mov x8, x0
  mov w0, w1
  mov x1, x2
  mov x2, x3
  blr x8
  ldr x29, [sp, #16]
  ldp x28, x30, [sp], #32
  ret
  .cfi_endproc
