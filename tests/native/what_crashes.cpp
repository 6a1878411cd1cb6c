// A foreign thread throws an exception whose what() is broken itself. When it
// "hangs", another thread crashes meanwhile.
//
//   what_crashes <directory of the reports> reads|aborts|terminates|hangs
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <thread>

#include "crash/breadcrumbs.h"
#include "crash/report.h"
#include "crash/signals.h"
#include "crash/terminate.h"

namespace {

std::atomic<bool> g_hanging{false};

const char* hang() noexcept {
  g_hanging.store(true);
  for (;;) ::pause();
}

struct Broken : std::exception {
  explicit Broken(const char* way) : how(way) {}
  const char* what() const noexcept override {
    if (std::strcmp(how, "aborts") == 0) std::abort();
    if (std::strcmp(how, "terminates") == 0) std::terminate();
    if (std::strcmp(how, "hangs") == 0) return hang();
    return reinterpret_cast<const char*>(8);
  }
  const char* how;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  mlx_safe::report_prepare(argv[1], "what_crashes");
  if (!mlx_safe::write_run_file()) return 3;
  mlx_safe::terminate_install({});
  mlx_safe::breadcrumb("note", "about to die");
  if (std::strcmp(argv[2], "hangs") == 0) mlx_safe::signals_install();
  std::thread([&] { throw Broken(argv[2]); }).detach();
  while (!g_hanging.load()) std::this_thread::yield();
  *static_cast<volatile int*>(nullptr) = 0;
}
