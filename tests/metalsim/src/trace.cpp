// Writes down the messages that come from outside, as they are sent.

#include "trace.h"

#include <fcntl.h>
#include <unistd.h>

#include <mutex>
#include <string>

#include "../metalsim.h"

namespace metalsim {
namespace {

// Never destroyed: other threads may still send messages while the process
// exits.
struct Trace {
  std::mutex lock;
  int file = -1;
  int threads = 0;
};

Trace& trace() {
  static auto* one = new Trace;
  return *one;
}

// Neither has a destructor, which would run before that of MLX's encoders.
thread_local bool is_ours = false;
thread_local int number = 0;

}  // namespace

std::atomic<bool> is_tracing{false};

void this_thread_runs_handlers() { is_ours = true; }

void note_message(id object, SEL sel) {
  Trace& all = trace();
  std::lock_guard guard(all.lock);
  if (all.file < 0) return;
  if (!is_ours && number == 0) number = ++all.threads;
  std::string line = is_ours ? "handlers" : std::to_string(number);
  line += ' ' + object->isa->name + ' ' + sel->name + '\n';
  // At once, since the process may be about to die.
  [[maybe_unused]] auto written =
      ::write(all.file, line.data(), line.size());
}

}  // namespace metalsim

METALSIM_API int metalsim_trace(const char* path) {
  using namespace metalsim;
  Trace& all = trace();
  std::lock_guard guard(all.lock);
  is_tracing = false;
  if (all.file >= 0) ::close(all.file);
  all.file = -1;
  if (path == nullptr) return 0;
  all.file = ::open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
  is_tracing = all.file >= 0;
  return is_tracing ? 0 : -1;
}
