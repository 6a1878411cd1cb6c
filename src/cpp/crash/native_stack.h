// The calling thread's native stack, in the crash path.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlx_safe {

// Return addresses of the calling thread, innermost first; their number. In a
// signal handler give its third argument: the stack then begins where the
// signal struck. `_Unwind_Backtrace` walks the tables of the binaries, so no
// frame pointers are needed. It takes no lock that a crashed thread could hold
// (the loader's is recursive). It allocates nothing once `prime_native_stack`
// has run. Not on POSIX's list of async-signal-safe functions all the same:
// call it inside `run_guarded`.
std::size_t capture_native_stack(std::uintptr_t* frames, std::size_t capacity,
                                 const void* signal_context) noexcept;

// Makes the unwinder load what it loads at first use. Not for the crash path.
void prime_native_stack() noexcept;

struct Symbol {
  const char* image = nullptr;  // path of the binary; null: not known
  std::uintptr_t offset = 0;    // of the address in it
  const char* name = nullptr;   // mangled; null: not known
};

// By dladdr: of an exported symbol. As safe as the above.
Symbol symbol_of(std::uintptr_t address) noexcept;

}  // namespace mlx_safe
