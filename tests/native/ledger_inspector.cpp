#include "ledger_inspector.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>

namespace mlx_safe::metal {
namespace {

void hold(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "the ledger's records are wrong: %s\n", what);
  std::abort();
}

std::string name_of(const FailureRef& failure) {
  return failure ? failure->message + (failure->raised ? "!" : "") : "-";
}

void check_queue(const Queue& queue) {
  std::uint64_t next = queue.settled;
  for (const BufferRef& buffer : queue.in_flight) {
    hold(buffer->sequence == ++next, "a queue's buffers are in their order");
    hold(!buffer->settled, "a buffer that has settled is not in flight");
    hold(buffer->queue.get() == &queue, "a buffer knows its queue");
  }
  hold(next == queue.committed, "what is not in flight has settled");
  hold(queue.tainted_until <= queue.committed,
       "what is committed later is not tainted");
}

}  // namespace

void LedgerInspector::check(const Ledger& ledger) {
  for (const auto& [address, queue] : ledger.queues_) {
    check_queue(*queue);
    hold(!queue->unraised || !queue->unraised->raised,
         "what stays with a queue is not raised");
  }
  for (const auto& queue : ledger.leaving_) check_queue(*queue);
  for (const auto& [address, buffer] : ledger.buffers_) {
    hold(buffer != nullptr, "a record is there");
    hold(buffer->address == address, "a record is found by its address");
    hold(!buffer->settled, "the record of what has settled is gone");
    hold(buffer->sequence == 0 || buffer->queue != nullptr,
         "what is committed has a queue");
    hold(buffer->sequence != 0 || !buffer->completed,
         "what is not committed has not completed");
  }
  for (const auto& [address, event] : ledger.events_) {
    hold(!event.pending.empty() || !event.poisons.empty(),
         "an event without anything has no record");
    for (const auto& p : event.pending) {
      hold(!p.buffer->settled, "a pending signal's buffer has not settled");
      hold(p.buffer->sequence != 0, "a pending signal is committed");
      hold(p.need == p.buffer->sequence || p.need + 1 == p.buffer->sequence,
           "a signal needs its own buffer or the one before");
      bool found = std::any_of(
          p.buffer->signals.begin(), p.buffer->signals.end(),
          [&, at = address](const Signal& signal) {
            return signal.event.get() == at && signal.value == p.value;
          });
      hold(found, "a pending signal is its buffer's");
    }
    for (const auto& p : event.poisons) {
      hold(p.from <= p.to, "failed values are a range");
      hold(p.failure != nullptr, "failed values have a failure");
    }
  }
}

std::string LedgerInspector::digest(const Ledger& ledger) {
  std::map<const void*, std::string> all;
  auto buffer_text = [](const Buffer& b) {
    return std::to_string(b.sequence) + (b.completed ? "c" : "") +
           (b.settled ? "s" : "") + name_of(b.own);
  };
  for (const auto& [address, queue] : ledger.queues_) {
    std::string& text = all[address];
    text = "q" + std::to_string(queue->committed) + "," +
           std::to_string(queue->settled) + name_of(queue->unraised) +
           name_of(queue->taint) + std::to_string(queue->tainted_until);
    for (const BufferRef& b : queue->in_flight) text += buffer_text(*b);
  }
  for (const auto& [address, buffer] : ledger.buffers_)
    all[address] = "b" + buffer_text(*buffer);
  for (const auto& [address, event] : ledger.events_) {
    std::string& text = all[address];
    text = "e" + std::to_string(event.settled);
    for (const auto& p : event.pending)
      text += "p" + std::to_string(p.value) + "," + std::to_string(p.need) +
              buffer_text(*p.buffer);
    for (const auto& p : event.poisons)
      text += "x" + std::to_string(p.from) + "-" + std::to_string(p.to) +
              name_of(p.failure);
  }
  std::string whole;
  for (const auto& [address, text] : all) whole += text + ";";
  return whole;
}

void LedgerInspector::dismantle(Ledger& ledger) {
  for (auto& [address, queue] : ledger.queues_) queue->in_flight.clear();
  for (auto& queue : ledger.leaving_) queue->in_flight.clear();
}

}  // namespace mlx_safe::metal
