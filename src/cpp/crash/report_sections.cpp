#include "crash/report_sections.h"

#include <signal.h>
#include <unistd.h>

#include <initializer_list>

#include "crash/async_system.h"
#include "crash/breadcrumbs.h"
#include "crash/fault_log.h"
#include "crash/native_stack.h"
#include "crash/report_context.h"

namespace mlx_safe::sections {
namespace {

std::int64_t as_signed(std::uint64_t value) noexcept {
  return static_cast<std::int64_t>(value);
}

void address_member(JsonWriter& json, const char* name,
                    std::uint64_t value) noexcept {
  json.key(name);
  json.address(value);
}

void real_member(JsonWriter& json, const char* name, double value) noexcept {
  json.key(name);
  json.real(value);
}

void optional_member(JsonWriter& json, const char* name,
                     const char* value) noexcept {
  if (value != nullptr) json.member(name, value);
}

const char* signal_name(int number) noexcept {
  switch (number) {
    case SIGABRT:
      return "SIGABRT";
    case SIGSEGV:
      return "SIGSEGV";
    case SIGBUS:
      return "SIGBUS";
    case SIGILL:
      return "SIGILL";
    case SIGFPE:
      return "SIGFPE";
    case SIGTRAP:
      return "SIGTRAP";
    default:
      return nullptr;
  }
}

constexpr const char* kSources[] = {"metal", "terminate", "injected"};

}  // namespace

void head(JsonWriter& json, const Event& event, const char* argv0,
          std::int64_t started_ns) noexcept {
  json.member("schema", 1);
  json.member("why", event.why);
  json.member("time_ns", event.time_ns);
  json.member("pid", static_cast<std::int64_t>(::getpid()));
  json.member("thread", as_signed(current_thread_id()));
  address_member(json, "python_thread", current_python_thread());
  optional_member(json, "argv0", argv0);
  json.member("started_ns", started_ns);
  if (event.signal != 0) {
    json.key("signal");
    json.begin_object();
    json.member("number", event.signal);
    optional_member(json, "name", signal_name(event.signal));
    if (event.sender != 0) {
      json.member("sent_by", event.sender);
    } else if (event.address_known) {
      address_member(json, "address",
                     reinterpret_cast<std::uintptr_t>(event.address));
    }
    json.end_object();
  }
  optional_member(json, "exception_type", event.exception_type);
  optional_member(json, "exception_message", event.exception_message);
  if (event.has_code) json.member("code", event.code);
  optional_member(json, "policy", event.policy);
  json.member("epoch", as_signed(fault_log().epoch()));
}

void memory(JsonWriter& json) noexcept {
  MemorySample last;
  if (!last_memory(&last)) return;
  json.key("memory");
  json.begin_object();
  json.member("time_ns", last.time_ns);
  json.member("active", last.active);
  json.member("peak", last.peak);
  json.member("cache", last.cache);
  json.member("footprint", last.footprint);
  json.member("ceiling", last.ceiling);
  json.member("system_total", last.system_total);
  json.member("system_available", last.system_available);
  json.end_object();
  json.key("memory_history");
  json.begin_array();
  memory_history().each([&](const MemorySample& sample) {
    json.item();
    json.begin_array();
    for (std::int64_t value : {sample.time_ns, sample.active, sample.ceiling}) {
      json.item();
      json.integer(value);
    }
    json.end_array();
  });
  json.end_array();
}

void context(JsonWriter& json) noexcept {
  if (report_context()[0] == '\0') return;
  json.key("context");
  json.json(report_context());
}

void requests(JsonWriter& json, std::int64_t now) noexcept {
  json.key("requests");
  json.begin_array();
  RequestRecord request;
  for (int place = 0; place < kRequestPlaces; ++place) {
    if (!read_request(place, &request)) continue;
    json.item();
    json.begin_object();
    json.member("id", request.identity.id);
    json.member("path", request.identity.path);
    json.member("prompt_tokens", request.prompt_tokens);
    json.member("prefilled", request.prefilled);
    json.member("tokens", request.tokens);
    json.member("age_ms", (now - request.identity.began_ns) / 1'000'000);
    json.end_object();
  }
  json.end_array();
}

void breadcrumbs(JsonWriter& json) noexcept {
  json.key("breadcrumbs");
  json.begin_array();
  mlx_safe::breadcrumbs().each([&](const Breadcrumb& crumb) {
    json.item();
    json.begin_object();
    json.member("time_ns", crumb.time_ns);
    json.member("thread", as_signed(crumb.thread));
    json.member("kind", crumb.kind);
    json.member("text", crumb.text);
    json.key("fields");
    json.begin_object();
    json.raw(crumb.fields);
    json.end_object();
    json.end_object();
  });
  json.end_array();
}

void command_buffers(JsonWriter& json) noexcept {
  json.key("command_buffers");
  json.begin_array();
  mlx_safe::command_buffers().each([&](const CommandBufferRecord& buffer) {
    json.item();
    json.begin_object();
    json.member("number", as_signed(buffer.number));
    address_member(json, "queue", buffer.queue);
    json.member("label", buffer.label);
    json.member("status", buffer.failed != 0 ? "error" : "completed");
    json.member("code", buffer.code);
    json.member("time_ns", buffer.time_ns);
    real_member(json, "gpu_start_s", buffer.gpu_start_s);
    real_member(json, "gpu_end_s", buffer.gpu_end_s);
    json.end_object();
  });
  json.end_array();
}

void faults(JsonWriter& json) noexcept {
  json.key("faults");
  json.begin_array();
  fault_log().each([&](const FaultRecord& fault) {
    json.item();
    json.begin_object();
    json.member("number", as_signed(fault.number));
    json.member("code", fault.code);
    json.member("message", fault.message);
    if (fault.source >= 0 && fault.source < 3)
      json.member("source", kSources[fault.source]);
    json.member("time_ns", fault.time_ns);
    json.member("thread", as_signed(fault.thread));
    json.member("buffer", as_signed(fault.buffer));
    address_member(json, "queue", fault.queue);
    json.member("label", fault.label);
    real_member(json, "gpu_start_s", fault.gpu_start_s);
    real_member(json, "gpu_end_s", fault.gpu_end_s);
    json.end_object();
  });
  json.end_array();
}

void native_stack(JsonWriter& json, const Event& event) noexcept {
  constexpr std::size_t kFrames = 96;
  std::uintptr_t frames[kFrames];
  std::size_t n = capture_native_stack(frames, kFrames, event.signal_context);
  // Without a signal the stack begins with the writer's own calls.
  const char* own =
      symbol_of(reinterpret_cast<std::uintptr_t>(&sections::native_stack))
          .image;
  bool begun = event.signal_context != nullptr;
  json.key("native_stack");
  json.begin_array();
  for (std::size_t i = 0; i < n; ++i) {
    // A return address may belong to the next function.
    std::uintptr_t back = i == 0 ? 0 : 1;
    Symbol symbol = symbol_of(frames[i] - back);
    begun = begun || symbol.image != own;
    if (!begun) continue;
    json.item();
    json.begin_object();
    address_member(json, "address", frames[i]);
    optional_member(json, "image", symbol.image);
    if (symbol.image != nullptr)
      address_member(json, "offset", symbol.offset + back);
    optional_member(json, "symbol", symbol.name);
    json.end_object();
  }
  json.end_array();
}

}  // namespace mlx_safe::sections
