// A process dies, and the report of its death crashes while it is written.
//
//   report_crashes <directory of the reports> context|stacks abort|throw|segv
//
// context: where the report's context is read, which nothing guards.
// stacks: where the stacks of Python are read, which may crash.
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "crash/breadcrumbs.h"
#include "crash/report.h"
#include "crash/report_context.h"
#include "crash/signals.h"
#include "crash/terminate.h"

namespace {

// The context is long enough to fill a page, which then cannot be read.
bool break_context() {
  auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  std::string json = '"' + std::string(2 * page, 'x') + '"';
  if (!mlx_safe::set_report_context(json.c_str())) return false;
  auto begin = reinterpret_cast<std::uintptr_t>(mlx_safe::report_context());
  std::uintptr_t whole = (begin + page - 1) / page * page;
  return ::mprotect(reinterpret_cast<void*>(whole), page, PROT_NONE) == 0;
}

void crash() { *static_cast<volatile int*>(nullptr) = 0; }

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  mlx_safe::report_prepare(argv[1], "report_crashes");
  if (!mlx_safe::write_run_file()) return 3;
  mlx_safe::terminate_install({});
  mlx_safe::signals_install();
  mlx_safe::breadcrumb("note", "about to die");
  if (std::strcmp(argv[2], "stacks") == 0) {
    mlx_safe::report_set_python_stacks(crash);
  } else if (!break_context()) {
    return 3;
  }
  std::string how = argv[3];
  if (how == "abort") std::abort();
  if (how == "segv") crash();
  std::thread([] { throw std::runtime_error("thrown here"); }).detach();
  std::this_thread::sleep_for(std::chrono::seconds(200));
}
