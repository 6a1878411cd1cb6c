// What the hooks cost: hook_overhead HOOKS [ROUNDS], hook_overhead HOOKS --many
// N
//
// The simulated device completes buffers at once on the calling thread, so that
// only the calls are timed. Unhooked, observe and intercept take turns in one
// run; figures are medians of the differences. `--many N` runs N buffers in one
// mode and prints the memory before and after.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <vector>

#include "drive.h"

namespace {

using Clock = std::chrono::steady_clock;

// Microseconds for `buffers` buffers, each with `handlers` handlers and, with
// `event`, a signal of it that is waited for.
double run(int buffers, int handlers, host::id event = nullptr) {
  host::Block handler([](host::id) {});
  static std::uint64_t value = 0;
  auto begin = Clock::now();
  for (int i = 0; i < buffers; ++i) {
    host::ScopedPool pool;
    auto buffer = host::send<host::id>(
        drive::queue(), SEL_(commandBufferWithUnretainedReferences));
    for (int h = 0; h < handlers; ++h)
      host::send(buffer, SEL_(addCompletedHandler:), handler.get());
    if (event != nullptr)
      host::send(buffer, SEL_(encodeSignalEvent:value:), event, ++value);
    host::send(buffer, SEL_(commit));
    if (event != nullptr)
      CHECK(host::send<bool>(event, SEL_(waitUntilSignaledValue:timeoutMS:),
                             value, std::uint64_t{10000}));
  }
  std::chrono::duration<double, std::micro> spent = Clock::now() - begin;
  return spent.count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Figures {
  double per_buffer, per_signalling, per_handler;
};

host::id event() {
  static auto* one = new host::Ref(host::Ref::take(
      host::send<host::id>(drive::device(), SEL_(newSharedEvent))));
  return one->get();
}

Figures measure(int buffers) {
  constexpr int kHandlers = 130;  // 2460 handlers in 19 buffers: a decode step
  double bare = run(buffers, 0) / buffers;
  double signalling = run(buffers, 0, event()) / buffers;
  double full = run(buffers / 10, kHandlers) / (buffers / 10);
  return {bare, signalling, (full - bare) / kHandlers};
}

long resident_kb() {
  std::ifstream file("/proc/self/statm");
  long pages = 0, resident = 0;
  file >> pages >> resident;
  return resident * 4;
}

int many(const drive::Hooks& hooks, long count) {
  for (const char* mode : {"observe", "intercept"}) {
    CHECK(hooks.install(mode) == 0);
    run(100000, 1, event());
    long before = resident_kb();
    double us = 0;
    for (long done = 0; done < count; done += 100000)
      us += run(100000, 1, event());
    std::printf("%s: %ld buffers, %.3f us each, resident %+ld kB\n", mode,
                count, us / static_cast<double>(count), resident_kb() - before);
    hooks.uninstall();
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: hook_overhead HOOKS [ROUNDS] | --many N\n");
    return 2;
  }
  METALSIM(metalsim_set_fast)(1);
  METALSIM(metalsim_set_inline)(1);
  drive::Hooks hooks = drive::Hooks::open(argv[1]);
  if (argc > 3 && std::strcmp(argv[2], "--many") == 0)
    return many(hooks, std::atol(argv[3]));
  int rounds = argc > 2 ? std::atoi(argv[2]) : 15;
  constexpr int kBuffers = 4000;
  const char* const modes[] = {"observe", "intercept"};
  std::vector<double> bare_buffer, bare_signalling, bare_handler;
  std::vector<double> buffer[2], signalling[2], handler[2];
  measure(kBuffers);
  for (int round = 0; round < rounds; ++round) {
    Figures bare = measure(kBuffers);
    bare_buffer.push_back(bare.per_buffer);
    bare_signalling.push_back(bare.per_signalling);
    bare_handler.push_back(bare.per_handler);
    for (int m = 0; m < 2; ++m) {
      CHECK(hooks.install(modes[m]) == 0);
      Figures hooked = measure(kBuffers);
      hooks.uninstall();
      buffer[m].push_back(hooked.per_buffer - bare.per_buffer);
      signalling[m].push_back(hooked.per_signalling - bare.per_signalling);
      handler[m].push_back(hooked.per_handler - bare.per_handler);
    }
  }
  std::printf("medians of %d rounds, in us\n", rounds);
  std::printf("             %-20s %-28s %s\n", "per buffer",
              "with a signal and its wait", "per handler");
  std::printf("  unhooked   %-+20.3f %-+28.3f %+.4f\n", median(bare_buffer),
              median(bare_signalling), median(bare_handler));
  for (int m = 0; m < 2; ++m) {
    double b = median(buffer[m]), h = median(handler[m]);
    std::printf("  %-10s %-+20.3f %-+28.3f %+.4f\n", modes[m], b,
                median(signalling[m]), h);
    std::printf("    a decode step of 19 buffers and 2460 handlers: %+.3f ms\n",
                (19 * b + 2460 * h) / 1000);
  }
  return 0;
}
