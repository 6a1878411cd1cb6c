// A foreign thread throws an exception whose what() is broken itself.
//
//   what_crashes <directory of the reports> reads|aborts|terminates
#include <cstdlib>
#include <cstring>
#include <exception>
#include <thread>

#include "breadcrumbs.h"
#include "report.h"
#include "terminate.h"

namespace {

struct Broken : std::exception {
  explicit Broken(const char* how) : how(how) {}
  const char* what() const noexcept override {
    if (std::strcmp(how, "aborts") == 0) std::abort();
    if (std::strcmp(how, "terminates") == 0) std::terminate();
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
  std::thread([&] { throw Broken(argv[2]); }).join();
}
