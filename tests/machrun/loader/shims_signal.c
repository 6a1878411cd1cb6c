// Signals: other numbers, other structures, and a jump of another layout.
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>

#include "shims.h"

static const Pair kSignals[] = {SIGNAL_PAIRS};
static const Pair kFlags[] = {
    PAIR(SA_ONSTACK), PAIR(SA_RESTART), PAIR(SA_RESETHAND), PAIR(SA_NOCLDSTOP),
    PAIR(SA_NODEFER), PAIR(SA_SIGINFO)};
static const Pair kStackFlags[] = {
    PAIR(SS_ONSTACK), PAIR(SS_DISABLE)};
static const Pair kIllCodes[] = {
    PAIR(ILL_ILLOPC), PAIR(ILL_ILLTRP), PAIR(ILL_PRVOPC), PAIR(ILL_ILLOPN),
    PAIR(ILL_ILLADR), PAIR(ILL_PRVREG), PAIR(ILL_COPROC), PAIR(ILL_BADSTK)};
static const Pair kFpeCodes[] = {
    PAIR(FPE_FLTDIV), PAIR(FPE_FLTOVF), PAIR(FPE_FLTUND), PAIR(FPE_FLTRES),
    PAIR(FPE_FLTINV), PAIR(FPE_FLTSUB), PAIR(FPE_INTDIV), PAIR(FPE_INTOVF)};
enum { kSignalsMax = 32 };

// 0 for what Linux has not: EMT, INFO.
static int own_signal(int number) { return TO_OWN(kSignals, number, 0); }

static sigset_t linux_mask(uint32_t mask) {
  sigset_t set;
  sigemptyset(&set);
  for (int i = 1; i < kSignalsMax; i++)
    if (mask >> (i - 1) & 1 && own_signal(i)) sigaddset(&set, own_signal(i));
  return set;
}

typedef struct apple_sigaction MacSigaction;
static MacSigaction g_actions[kSignalsMax];  // by Linux's number

// sigtramp.S: calls a handler in a frame from which LLVM's unwinder finds what
// was interrupted, as macOS's _sigtramp does.
typedef void Trampoline(void* handler, int number, apple_siginfo_t* info,
                        apple_ucontext_t* context);

static Trampoline* trampoline(void) {
  static const Library kSystem = {"libSystem", NULL, NULL, true};
  static Trampoline* found;
  if (found == NULL)
    found = (Trampoline*)in_library(&kSystem, "_machrun_sigtramp");
  return found;
}

static int mac_code(int number, int code) {
  if (code <= 0) return apple_SI_USER;
  if (number == SIGILL) return TO_MAC(kIllCodes, code, 0);
  return number == SIGFPE ? TO_MAC(kFpeCodes, code, 0) : code;
}

static void on_signal(int number, siginfo_t* info, void* context) {
  int saved = errno;
  const mcontext_t* from = &((ucontext_t*)context)->uc_mcontext;
  bool fault = number == SIGSEGV || number == SIGBUS || number == SIGILL ||
               number == SIGFPE || number == SIGTRAP;
  apple_siginfo_t mac = {.apple_si_signo = TO_MAC(kSignals, number, number),
                         .apple_si_code = mac_code(number, info->si_code)};
  if (info->si_code <= 0 || number == SIGCHLD) {
    mac.apple_si_pid = info->si_pid;
    mac.apple_si_uid = info->si_uid;
    if (number == SIGCHLD) mac.apple_si_status = info->si_status;
  } else if (fault) {
    mac.apple_si_addr = info->si_addr;
  }
  struct apple___darwin_mcontext64 machine = {0};
  machine.apple___es.apple___far = (uint64_t)info->si_addr;
  // x0 to x28, fp, lr; then sp and pc, as there.
  memcpy(&machine.apple___ss, from->regs, sizeof from->regs);
  machine.apple___ss.apple___sp = from->sp;
  machine.apple___ss.apple___pc = from->pc;
  apple_ucontext_t mac_context = {.apple_uc_mcsize = sizeof machine,
                                  .apple_uc_mcontext = &machine};
  trampoline()(g_actions[number].apple_sa_handler, mac.apple_si_signo, &mac,
               &mac_context);
  errno = saved;
}

// What stands for a handler that Linux code has installed, and is called with
// Linux's own number.
static struct sigaction g_of_linux[kSignalsMax];
static void call_linux(int mac_number, void* info, void* context) {
  (void)info;
  int number = own_signal(mac_number);
  const struct sigaction* action = &g_of_linux[number];
  if (action->sa_flags & SA_SIGINFO) {
    siginfo_t unknown = {.si_signo = number};
    action->sa_sigaction(number, &unknown, context);
  } else {
    action->sa_handler(number);
  }
}

static MacSigaction told(int number, const struct sigaction* action,
                         MacSigaction of_mac) {
  if ((void*)action->sa_sigaction == (void*)on_signal) return of_mac;
  MacSigaction mac = {.apple_sa_handler = action->sa_handler,
                      .apple_sa_flags = FLAGS_TO_MAC(kFlags, action->sa_flags)};
  if (action->sa_handler == SIG_DFL || action->sa_handler == SIG_IGN)
    return mac;
  g_of_linux[number] = *action;
  mac.apple_sa_handler = (void*)call_linux;
  mac.apple_sa_flags |= apple_SA_SIGINFO;
  return mac;
}

int mac_sigaction(int mac_number, const MacSigaction* action,
                  MacSigaction* before) {
  int number = own_signal(mac_number);
  if (number == 0) {
    errno = EINVAL;
    return -1;
  }
  struct sigaction set = {0}, old;
  MacSigaction of_mac = g_actions[number];
  if (action != NULL && (void*)action->apple_sa_handler == (void*)call_linux) {
    set = g_of_linux[number];
  } else if (action != NULL) {
    bool plain = action->apple_sa_handler == SIG_DFL ||
                 action->apple_sa_handler == SIG_IGN;
    set.sa_flags = FLAGS_TO_OWN(kFlags, action->apple_sa_flags, "sigaction");
    set.sa_mask = linux_mask(action->apple_sa_mask);
    if (plain) set.sa_handler = action->apple_sa_handler;
    if (!plain) set.sa_sigaction = on_signal;
    if (!plain) set.sa_flags |= SA_SIGINFO;
    if (!plain) g_actions[number] = *action;
    trampoline();  // not to be looked for in a handler
  }
  if (sigaction(number, action ? &set : NULL, &old) != 0) return -1;
  if (before != NULL) *before = told(number, &old, of_mac);
  return 0;
}

int mac_sigaltstack(const apple_stack_t* stack, apple_stack_t* before) {
  stack_t set = {0}, old;
  if (stack != NULL && !(stack->apple_ss_flags & apple_SS_DISABLE) &&
      stack->apple_ss_size < apple_MINSIGSTKSZ) {
    errno = ENOMEM;
    return -1;
  }
  if (stack != NULL)
    set = (stack_t){.ss_sp = stack->apple_ss_sp,
                    .ss_size = stack->apple_ss_size,
                    .ss_flags = FLAGS_TO_OWN(kStackFlags, stack->apple_ss_flags,
                                             "sigaltstack")};
  int status = sigaltstack(stack ? &set : NULL, &old);
  if (status == 0 && before != NULL)
    *before = (apple_stack_t){old.ss_sp, old.ss_size,
                              FLAGS_TO_MAC(kStackFlags, old.ss_flags)};
  return status;
}

int mac_raise(int number) {
  if (number != 0 && own_signal(number) == 0)
    refuse(NULL, "raise of the signal %d, which Linux has not", number);
  return raise(own_signal(number));
}

// ---- sigsetjmp -------------------------------------------------------------

// At 168 in the buffer the mask, at 176 whether it was asked for; of macOS's
// 196 bytes.
__attribute__((used)) int machrun_save_mask(uint8_t* buffer, int wanted) {
  sigset_t set;
  int64_t flag = wanted;
  memcpy(buffer + 176, &flag, 8);
  if (wanted && sigprocmask(SIG_BLOCK, NULL, &set) == 0)
    memcpy(buffer + 168, &set, 8);
  return 0;
}
__attribute__((used)) void machrun_restore_mask(const uint8_t* buffer) {
  sigset_t set;
  sigemptyset(&set);
  memcpy(&set, buffer + 168, 8);
  if (buffer[176] & 1) sigprocmask(SIG_SETMASK, &set, NULL);
}

// clang-format off
#define JUMP(F) F("x19", "x20", 0) F("x21", "x22", 16) F("x23", "x24", 32) \
  F("x25", "x26", 48) F("x27", "x28", 64) F("x29", "x30", 80)              \
  F("d8", "d9", 96) F("d10", "d11", 112) F("d12", "d13", 128) F("d14", "d15", 144)
#define PUT(a, b, at) "stp " a "," b ",[x0,#" #at "]\n"
#define GET(a, b, at) "ldp " a "," b ",[x2,#" #at "]\n"
asm(".text\n.globl mac_sigsetjmp\n.p2align 2\nmac_sigsetjmp:\n" JUMP(PUT)
    "mov x2,sp\n str x2,[x0,#160]\n b machrun_save_mask\n"
    ".globl mac_siglongjmp\n.p2align 2\nmac_siglongjmp:\n"
    "mov x19,x0\n mov w20,w1\n bl machrun_restore_mask\n mov x2,x19\n mov w0,w20\n"
    "ldr x3,[x2,#160]\n mov sp,x3\n" JUMP(GET)
    "cmp w0,#0\n csinc w0,w0,wzr,ne\n ret\n");
// clang-format on
