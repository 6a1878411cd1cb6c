#include "crash/report_context.h"

#include <cstring>

#include "crash/async_io.h"
#include "crash/async_system.h"

namespace mlx_safe {
namespace {

constexpr std::int64_t kHistoryStepNs = 2'000'000'000;
constexpr std::size_t kContextCapacity = 16 * 1024;

constinit Latest<MemorySample> g_memory;
constinit MemoryHistory g_history;
constinit std::atomic<std::int64_t> g_history_at{0};

// The one that is not read is written, then they change places.
constinit char g_contexts[2][kContextCapacity] = {};
constinit std::atomic<int> g_context{0};

enum State : int { kFree, kTaken, kOpen };

struct RequestPlace {
  std::atomic<int> state{kFree};
  Latest<RequestIdentity> identity;
  std::atomic<std::int64_t> prompt_tokens{0}, prefilled{0}, tokens{0};
};
constinit RequestPlace g_requests[kRequestPlaces];

RequestPlace* place_at(int place) noexcept {
  return place >= 0 && place < kRequestPlaces ? &g_requests[place] : nullptr;
}

}  // namespace

void sample_memory(MemorySample sample) noexcept {
  sample.time_ns = now_ns();
  // MLX raises the one before the other; and the server resets MLX's peak,
  // which then is 0 until something is allocated.
  if (sample.peak < sample.active) sample.peak = sample.active;
  g_memory.store(sample);
  if (sample.active < 0) return;  // MLX is not there yet
  std::int64_t last = g_history_at.load();
  if (sample.time_ns - last >= kHistoryStepNs &&
      g_history_at.compare_exchange_strong(last, sample.time_ns))
    g_history.store(g_history.claim(), sample);
}

bool last_memory(MemorySample* out) noexcept { return g_memory.load(out); }

const MemoryHistory& memory_history() noexcept { return g_history; }

bool set_report_context(const char* json) noexcept {
  std::size_t size = std::strlen(json) + 1;
  if (size > kContextCapacity) return false;
  int next = 1 - g_context.load();
  std::memcpy(g_contexts[next], json, size);
  g_context.store(next);
  return true;
}

const char* report_context() noexcept { return g_contexts[g_context.load()]; }

int request_begin(const char* id, const char* path) noexcept {
  for (int i = 0; i < kRequestPlaces; ++i) {
    RequestPlace& place = g_requests[i];
    int state = kFree;
    if (!place.state.compare_exchange_strong(state, kTaken)) continue;
    RequestIdentity identity{};
    identity.began_ns = now_ns();
    copy_text(identity.id, sizeof identity.id, id);
    copy_text(identity.path, sizeof identity.path, path);
    place.identity.store(identity);
    place.prompt_tokens.store(-1);
    place.prefilled.store(0);
    place.tokens.store(0);
    place.state.store(kOpen);
    return i;
  }
  return -1;
}

void request_progress(int place, std::int64_t prompt_tokens,
                      std::int64_t prefilled, std::int64_t tokens) noexcept {
  RequestPlace* found = place_at(place);
  if (found == nullptr) return;
  found->prompt_tokens.store(prompt_tokens, std::memory_order_relaxed);
  found->prefilled.store(prefilled, std::memory_order_relaxed);
  found->tokens.store(tokens, std::memory_order_relaxed);
}

void request_end(int place) noexcept {
  RequestPlace* found = place_at(place);
  if (found != nullptr) found->state.store(kFree);
}

bool read_request(int place, RequestRecord* out) noexcept {
  RequestPlace* found = place_at(place);
  if (found == nullptr || found->state.load() != kOpen ||
      !found->identity.load(&out->identity))
    return false;
  out->prompt_tokens = found->prompt_tokens.load();
  out->prefilled = found->prefilled.load();
  out->tokens = found->tokens.load();
  return true;
}

void report_context_after_fork_in_child() noexcept {
  for (RequestPlace& place : g_requests) place.state.store(kFree);
}

}  // namespace mlx_safe
