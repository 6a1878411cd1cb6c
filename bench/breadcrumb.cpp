// What a breadcrumb and a record of a command buffer cost, next to the reading
// of the clock that is part of either. Aim: under 100 ns.

#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "crash/async_system.h"
#include "crash/breadcrumbs.h"

namespace {

using namespace mlx_safe;

// Short runs, so that some of them are not interrupted.
constexpr int kCalls = 5'000;
constexpr int kRuns = 400;

// The best of some runs, in ns for each call: what the machine does besides
// only ever adds.
template <class Work>
double best_ns(Work work) {
  double best = 1e18;
  for (int run = 0; run < kRuns; ++run) {
    auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) work(i);
    std::chrono::duration<double, std::nano> spent =
        std::chrono::steady_clock::now() - begin;
    best = std::min(best, spent.count() / kCalls);
  }
  return best;
}

void leave_plain(int) { breadcrumb("bench", "a text of the usual length"); }

void leave_with_fields(int i) {
  Fields fields;
  fields.add("tokens", [=](JsonWriter& json) { json.integer(i); });
  fields.add("id", [](JsonWriter& json) { json.text("cmpl-0123456789"); });
  breadcrumb("bench", "a text of the usual length", fields);
}

void record_buffer(int i) {
  CommandBufferRecord done{};
  done.number = static_cast<std::uint64_t>(i);
  done.time_ns = now_ns();
  command_buffers().store(command_buffers().claim(), done);
}

}  // namespace

int main() {
  std::int64_t sum = 0;
  double clock = best_ns([&](int) { sum += now_ns(); });
  struct {
    const char* name;
    void (*work)(int);
  } cases[] = {{"breadcrumb", &leave_plain},
               {"breadcrumb with two fields", &leave_with_fields},
               {"record of a command buffer", &record_buffer}};
  std::printf("best of %d runs of %d calls; the clock alone: %.0f ns%s\n",
              kRuns, kCalls, clock, sum == 0 ? " " : "");
  for (auto& c : cases) {
    double alone = best_ns(c.work);
    std::printf("  %-28s %6.0f ns  (%.1f of the clock)\n", c.name, alone,
                alone / clock);
  }
  return 0;
}
