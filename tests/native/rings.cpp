// The rings of breadcrumbs and faults, and the table of requests, with writers
// and a reader at work at once: no record is ever read half, and none out of
// order. Under ThreadSanitizer: without a data race.

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "crash/breadcrumbs.h"
#include "crash/fault_log.h"
#include "crash/report_context.h"

using namespace mlx_safe;

namespace {

constexpr int kWriters = 3;
constexpr int kEach = 20'000;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// Every part of a record says the same number.
void write_all(int writer) {
  for (int i = 0; i < kEach; ++i) {
    std::string text = std::to_string(writer) + "." + std::to_string(i);
    Fields fields;
    fields.add("", [&](JsonWriter& json) { json.raw(text.c_str()); });
    breadcrumb(text.c_str(), text.c_str(), fields);
    FaultRecord fault{};
    fault.code = i;
    fault.buffer = static_cast<std::uint64_t>(i);
    fault_log().record(fault);
    sample_memory({0, i, i, i, i, i, i, i});
    int place = request_begin(text.c_str(), text.c_str());
    request_progress(place, i, i, i);
    request_end(place);
  }
}

void read_all() {
  breadcrumbs().each([](const Breadcrumb& crumb) {
    if (std::strcmp(crumb.kind, crumb.text) != 0 ||
        crumb.fields != "\"\": " + std::string(crumb.text))
      fail("half a breadcrumb");
  });
  std::uint64_t last = 0;
  fault_log().each([&](const FaultRecord& fault) {
    if (fault.buffer != static_cast<std::uint64_t>(fault.code))
      fail("half a fault");
    if (fault.number <= last) fail("faults out of order");
    last = fault.number;
  });
  MemorySample memory;
  if (last_memory(&memory) && memory.active != memory.system_available)
    fail("half a sample");
  RequestRecord request;
  for (int place = 0; place < kRequestPlaces; ++place)
    if (read_request(place, &request) &&
        std::strncmp(request.identity.id, request.identity.path, 12) != 0)
      fail("half a request");
}

}  // namespace

int main() {
  std::atomic<int> at_work{kWriters};
  std::vector<std::thread> writers;
  for (int w = 0; w < kWriters; ++w)
    writers.emplace_back([&, w] {
      write_all(w);
      at_work.fetch_sub(1);
    });
  while (at_work.load() > 0) read_all();
  for (auto& writer : writers) writer.join();
  read_all();
  if (breadcrumbs().claimed() != kWriters * kEach)
    fail("breadcrumbs not counted");
  if (fault_log().epoch() != kWriters * kEach) fail("faults not counted");
  return 0;
}
