// What happened: counters, and a ring of the last finished buffers.

#include <algorithm>
#include <mutex>

#include "metal.h"

namespace metalsim {
namespace {

struct Ring {
  std::mutex lock;
  std::atomic<bool> on{false};
  std::vector<metalsim_record> records;
  uint64_t written = 0;
};

Ring& ring() {
  static auto* instance = new Ring;
  return *instance;
}

}  // namespace

Totals& totals() {
  static auto* instance = new Totals;
  return *instance;
}

void log_finished(const metalsim_record& record) {
  Ring& all = ring();
  if (!all.on.load(std::memory_order_relaxed)) return;
  std::lock_guard guard(all.lock);
  if (all.records.empty()) return;
  all.records[all.written++ % all.records.size()] = record;
}

void reset_log() {
  Totals& t = totals();
  for (auto* counter :
       {&t.buffers_created, &t.buffers_committed, &t.buffers_completed,
        &t.buffers_failed, &t.handlers_added, &t.handlers_called,
        &t.handlers_released, &t.handlers_dropped, &t.order_violations,
        &t.signals_encoded, &t.signals_done, &t.signals_withheld,
        &t.waits_encoded, &t.waits_done, &t.waits_skipped, &t.kernels_run,
        &t.kernels_skipped}) {
    counter->store(0);
  }
  metalsim_set_detailed_log(0);
}

}  // namespace metalsim

using namespace metalsim;

void metalsim_get_totals(metalsim_totals* out) {
  Totals& t = totals();
  out->buffers_created = t.buffers_created;
  out->buffers_committed = t.buffers_committed;
  out->buffers_completed = t.buffers_completed;
  out->buffers_failed = t.buffers_failed;
  out->handlers_added = t.handlers_added;
  out->handlers_called = t.handlers_called;
  out->handlers_released = t.handlers_released;
  out->handlers_dropped = t.handlers_dropped;
  out->order_violations = t.order_violations;
  out->signals_encoded = t.signals_encoded;
  out->signals_done = t.signals_done;
  out->signals_withheld = t.signals_withheld;
  out->waits_encoded = t.waits_encoded;
  out->waits_done = t.waits_done;
  out->waits_skipped = t.waits_skipped;
  out->kernels_run = t.kernels_run;
  out->kernels_skipped = t.kernels_skipped;
  out->blocks_copied = blocks_copied();
  out->blocks_disposed = blocks_disposed();
}

void metalsim_set_detailed_log(uint32_t capacity) {
  Ring& all = ring();
  std::lock_guard guard(all.lock);
  all.records.assign(capacity, metalsim_record{});
  all.records.shrink_to_fit();
  all.written = 0;
  all.on = capacity != 0;
}

uint32_t metalsim_read_log(metalsim_record* out, uint32_t max) {
  Ring& all = ring();
  std::lock_guard guard(all.lock);
  uint64_t capacity = all.records.size();
  if (capacity == 0) return 0;
  uint64_t kept = std::min(all.written, capacity);
  uint64_t given = std::min<uint64_t>(kept, max);
  for (uint64_t i = 0; i < given; ++i) {
    out[i] = all.records[(all.written - kept + i) % capacity];
  }
  return static_cast<uint32_t>(given);
}
