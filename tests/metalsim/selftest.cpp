// Tests of the simulator itself. Everything goes through the exported names,
// as a hook library would use them.

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "hosts/host_common.h"

using namespace host;

namespace {

int failures = 0;

// In what must come about, at any speed: only a hang takes longer.
constexpr uint64_t kLongMs = 600'000;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                          \
    }                                                                      \
  } while (false)

metalsim_totals totals() {
  metalsim_totals all;
  METALSIM(metalsim_get_totals)(&all);
  return all;
}

Class class_of(id object) {
  return function<Class(id)>("object_getClass")(object);
}

std::string name_of(Class cls) {
  return function<const char*(Class)>("class_getName")(cls);
}

std::string chain_of(id object) {
  auto* super = function<Class(Class)>("class_getSuperclass");
  std::string chain;
  for (Class at = class_of(object); at != nullptr; at = super(at)) {
    if (!chain.empty()) chain += ' ';
    chain += name_of(at);
  }
  return chain;
}

Ref new_queue() {
  return Ref::take(send<id>(default_device().get(), SEL_(newCommandQueue)));
}

Ref new_event() {
  return Ref::take(send<id>(default_device().get(), SEL_(newSharedEvent)));
}

Ref new_buffer(const Ref& queue) {
  ScopedPool pool;
  return Ref::share(
      send<id>(queue.get(), SEL_(commandBufferWithUnretainedReferences)));
}

void on_completed(const Ref& buffer, Block::Function function) {
  Block block(std::move(function));
  send(buffer.get(), selector("addCompletedHandler:"), block.get());
}

void encode_signal(const Ref& buffer, const Ref& event, uint64_t value) {
  send(buffer.get(), selector("encodeSignalEvent:value:"), event.get(), value);
}

void encode_wait(const Ref& buffer, const Ref& event, uint64_t value) {
  send(buffer.get(), selector("encodeWaitForEvent:value:"), event.get(), value);
}

using Kernel = void (*)(void*);

void encode_kernel(const Ref& buffer, Kernel kernel, void* context) {
  ScopedPool pool;
  id encoder = send<id>(buffer.get(), SEL_(computeCommandEncoder));
  send(encoder, selector("dispatchSimulatedKernel:context:microseconds:"),
       kernel, context, uint64_t{5});
  send(encoder, SEL_(endEncoding));
}

void commit(const Ref& buffer) { send(buffer.get(), SEL_(commit)); }
void finish(const Ref& buffer) { send(buffer.get(), SEL_(waitUntilCompleted)); }

uint64_t status(const Ref& buffer) {
  return send<uint64_t>(buffer.get(), SEL_(status));
}

uint64_t value_of(const Ref& event) {
  return send<uint64_t>(event.get(), SEL_(signaledValue));
}

bool wait_for(const Ref& event, uint64_t value, uint64_t ms) {
  return send<bool>(event.get(), selector("waitUntilSignaledValue:timeoutMS:"),
                    value, ms);
}

void settle() { CHECK(METALSIM(metalsim_wait_idle)(kLongMs)); }

// ---- runtime ---------------------------------------------------------------

void test_class_chains() {
  Ref queue = new_queue();
  CHECK(chain_of(new_buffer(queue).get()) ==
        "AGXG16XFamilyCommandBuffer IOGPUMetalCommandBuffer _MTLCommandBuffer "
        "_MTLObjectWithLabel NSObject");
  CHECK(chain_of(queue.get()) ==
        "AGXG16XFamilyCommandQueue IOGPUMetalCommandQueue _MTLCommandQueue "
        "_MTLObjectWithLabel NSObject");
  CHECK(chain_of(new_event().get()) ==
        "AGXG16XFamilySharedEvent IOGPUMetalSharedEvent _MTLSharedEvent "
        "_MTLObjectWithLabel NSObject");
}

void test_method_ownership() {
  Ref queue = new_queue();
  Class cls = class_of(new_buffer(queue).get());
  auto* list = function<Method*(Class, unsigned*)>("class_copyMethodList");
  auto* name = function<SEL(Method)>("method_getName");
  auto* types = function<const char*(Method)>("method_getTypeEncoding");
  auto* get = function<Method(Class, SEL)>("class_getInstanceMethod");
  unsigned count = 0;
  Method* own = list(cls, &count);
  CHECK(count == 2);
  for (unsigned i = 0; i < count; ++i) {
    CHECK(name(own[i]) != selector("addCompletedHandler:"));
  }
  std::free(own);
  Method inherited = get(cls, selector("addCompletedHandler:"));
  CHECK(inherited != nullptr);
  CHECK(std::string(types(inherited)) == "v24@0:8@?16");
  CHECK(get(cls, selector("noSuchThing")) == nullptr);
}

void test_messages() {
  CHECK(send<id>(nullptr, SEL_(commandBuffer)) == nullptr);
  CHECK(send<double>(nullptr, SEL_(GPUStartTime)) == 0.0);
  id string_class = function<id(const char*)>("objc_getClass")("NSString");
  ScopedPool pool;
  id text = send<id>(string_class, selector("stringWithUTF8String:"), "here");
  CHECK(text_of(text) == "here");
  CHECK(send<bool>(text, selector("respondsToSelector:"), SEL_(UTF8String)));
  CHECK(text_of(send<id>(text, SEL_(description))) == "here");
  Ref queue = new_queue();
  send(queue.get(), selector("setLabel:"), text);
  CHECK(text_of(send<id>(queue.get(), SEL_(label))) == "here");
}

double original_result;

double replaced_times(id, SEL) { return 42.5; }

// Many arguments of both kinds must survive the trampoline.
double sum(id, SEL, double a, int b, double c, int d, double e, int f, double g,
           int h, double i, int j, double k, double l, double m) {
  return a + b + c + d + e + f + g + h + i + j + k + l + m;
}

void test_replacing_methods() {
  Ref queue = new_queue();
  Ref buffer = new_buffer(queue);
  auto* get = function<Method(Class, SEL)>("class_getInstanceMethod");
  auto* set = function<IMP(Method, IMP)>("method_setImplementation");
  auto* add = function<bool(Class, SEL, IMP, const char*)>("class_addMethod");
  original_result = send<double>(buffer.get(), SEL_(GPUEndTime));
  Method method = get(class_of(buffer.get()), SEL_(GPUEndTime));
  IMP original = set(method, reinterpret_cast<IMP>(&replaced_times));
  CHECK(send<double>(buffer.get(), SEL_(GPUEndTime)) == 42.5);
  CHECK(METALSIM(metalsim_modified_methods)() == 1);
  set(method, original);
  CHECK(send<double>(buffer.get(), SEL_(GPUEndTime)) == original_result);
  CHECK(METALSIM(metalsim_modified_methods)() == 0);
  Class cls = function<Class(const char*)>("objc_getClass")("NSError");
  SEL many = selector("sum:::::::::::::");
  CHECK(add(cls, many, reinterpret_cast<IMP>(&sum), "d@:"));
  CHECK(!add(cls, many, reinterpret_cast<IMP>(&sum), "d@:"));
  Ref error = Ref::take(send<id>(cls, selector("new")));
  CHECK(send<double>(error.get(), many, 1.0, 2, 3.0, 4, 5.0, 6, 7.0, 8, 9.0, 10,
                     11.0, 12.0, 13.0) == 91.0);
}

void throwing(id, SEL) { throw std::runtime_error("through objc_msgSend"); }

void test_exceptions_cross() {
  Class cls = function<Class(const char*)>("objc_getClass")("NSError");
  auto* add = function<bool(Class, SEL, IMP, const char*)>("class_addMethod");
  add(cls, SEL_(throws), reinterpret_cast<IMP>(&throwing), "v@:");
  Ref error = Ref::take(send<id>(cls, selector("new")));
  std::string caught;
  try {
    send(error.get(), SEL_(throws));
  } catch (const std::runtime_error& e) {
    caught = e.what();
  }
  CHECK(caught == "through objc_msgSend");
}

// ---- memory ----------------------------------------------------------------

void test_blocks() {
  auto* copy = function<void*(const void*)>("_Block_copy");
  auto* drop = function<void(const void*)>("_Block_release");
  auto life = std::make_shared<int>(7);
  int called = 0;
  void* heap;
  {
    Block block([life, &called](id) { called += *life; });
    CHECK(life.use_count() == 2);
    heap = copy(block.get());
    CHECK(heap != static_cast<void*>(block.get()));
    CHECK(life.use_count() == 3);
  }
  CHECK(life.use_count() == 2);
  CHECK(copy(heap) == heap);
  drop(heap);
  CHECK(life.use_count() == 2);
  CHECK(METALSIM(metalsim_live_objects)("__NSMallocBlock__") == 1);
  drop(heap);
  CHECK(life.use_count() == 1);
  CHECK(METALSIM(metalsim_live_objects)("__NSMallocBlock__") == 0);
  struct {
    void* isa;
    int32_t flags, reserved;
  } global{entry("_NSConcreteGlobalBlock"), 1 << 28, 0};
  CHECK(copy(&global) == &global);
  drop(&global);
}

void test_address_reuse() {
  Ref queue = new_queue();
  Ref first = new_buffer(queue);
  id address = first.get();
  first = Ref();
  CHECK(new_buffer(queue).get() == address);
}

void test_pools_and_associations() {
  auto* set = function<void(id, const void*, id, uintptr_t)>(
      "objc_setAssociatedObject");
  auto* get = function<id(id, const void*)>("objc_getAssociatedObject");
  auto* live = METALSIM(metalsim_live_objects);
  static char key;
  Ref queue = new_queue();
  Ref buffer = new_buffer(queue);
  {
    Ref event = new_event();
    set(buffer.get(), &key, event.get(), 0x301);
    CHECK(get(buffer.get(), &key) == event.get());
  }
  CHECK(live("_MTLSharedEvent") == 1);
  buffer = Ref();
  CHECK(live("_MTLSharedEvent") == 0);
  CHECK(live("_MTLCommandBuffer") == 0);
  {
    ScopedPool pool;
    send<id>(queue.get(), SEL_(commandBuffer));
    CHECK(live("_MTLCommandBuffer") == 1);
  }
  CHECK(live("_MTLCommandBuffer") == 0);
}

// ---- queues and events -----------------------------------------------------

void test_handlers_in_order() {
  Ref queue = new_queue();
  std::vector<int> order;
  {
    Ref buffer = new_buffer(queue);
    for (int i = 0; i < 5; ++i) {
      on_completed(buffer, [&order, i](id) { order.push_back(i); });
    }
    CHECK(status(buffer) == 0);
    commit(buffer);
    finish(buffer);
    CHECK((order == std::vector<int>{0, 1, 2, 3, 4}));
    CHECK(status(buffer) == 4);
    CHECK(send<double>(buffer.get(), SEL_(GPUEndTime)) >=
          send<double>(buffer.get(), SEL_(GPUStartTime)));
    CHECK(send<id>(buffer.get(), SEL_(error)) == nullptr);
  }
  settle();
  CHECK(totals().handlers_called == 5);
  CHECK(totals().blocks_disposed == totals().blocks_copied);
}

void test_queue_order() {
  METALSIM(metalsim_set_random_delays)(3, 100, 300);
  Ref queue = new_queue();
  std::vector<int> order;
  for (int i = 0; i < 20; ++i) {
    Ref buffer = new_buffer(queue);
    on_completed(buffer, [&order, i](id) { order.push_back(i); });
    commit(buffer);
  }
  settle();
  for (int i = 0; i < 20; ++i) CHECK(order[static_cast<size_t>(i)] == i);
  CHECK(totals().order_violations == 0);
}

void test_enqueue_keeps_the_place() {
  Ref queue = new_queue();
  std::vector<int> order;
  Ref first = new_buffer(queue), second = new_buffer(queue);
  on_completed(first, [&](id) { order.push_back(1); });
  on_completed(second, [&](id) { order.push_back(2); });
  send(first.get(), SEL_(enqueue));
  CHECK(status(first) == 1);
  commit(second);
  commit(first);
  settle();
  // Numbers are given at commit, places at enqueue.
  CHECK((order == std::vector<int>{1, 2}));
}

void test_waits_and_signals() {
  Ref one = new_queue(), two = new_queue();
  Ref event = new_event(), gate = new_event();
  Ref first = new_buffer(one), second = new_buffer(two);
  encode_wait(second, event, 1);
  encode_signal(second, event, 2);
  commit(second);
  CHECK(!wait_for(event, 2, 20));
  encode_wait(first, gate, 7);
  encode_signal(first, event, 1);
  commit(first);
  send(first.get(), SEL_(waitUntilScheduled));
  CHECK(!wait_for(event, 1, 20));
  CHECK(value_of(event) == 0);
  send(gate.get(), selector("setSignaledValue:"), uint64_t{7});
  CHECK(wait_for(event, 2, UINT64_MAX));
  settle();
}

void test_late_handlers() {
  METALSIM(metalsim_hold_handlers)(1);
  Ref queue = new_queue(), event = new_event(), buffer = new_buffer(queue);
  std::atomic<bool> called{false};
  on_completed(buffer, [&](id) { called = true; });
  encode_signal(buffer, event, 1);
  commit(buffer);
  CHECK(wait_for(event, 1, kLongMs));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!called && status(buffer) == 4);
  METALSIM(metalsim_hold_handlers)(0);
  finish(buffer);
  CHECK(called);
  METALSIM(metalsim_set_handler_delay_us)(30000);
  auto start = std::chrono::steady_clock::now();
  Ref late = new_buffer(queue);
  commit(late);
  finish(late);
  auto spent = std::chrono::steady_clock::now() - start;
  CHECK(spent >= std::chrono::milliseconds(30));
}

// ---- faults ----------------------------------------------------------------

struct Outcome {
  uint64_t status;
  std::string text, domain;
  int64_t code;
};

Outcome run_one(const Ref& queue) {
  Ref buffer = new_buffer(queue);
  commit(buffer);
  finish(buffer);
  Outcome outcome{status(buffer), {}, {}, 0};
  id error = send<id>(buffer.get(), SEL_(error));
  if (error == nullptr) return outcome;
  ScopedPool pool;
  id string_class = function<id(const char*)>("objc_getClass")("NSString");
  id key = send<id>(string_class, selector("stringWithUTF8String:"),
                    "NSUnderlyingError");
  id info = send<id>(error, SEL_(userInfo));
  id cause = send<id>(info, selector("objectForKey:"), key);
  outcome.text = message_of(buffer.get());
  outcome.domain = text_of(send<id>(cause, SEL_(domain)));
  outcome.code = send<int64_t>(cause, SEL_(code));
  CHECK(text_of(send<id>(error, SEL_(domain))) ==
        "MTLCommandBufferErrorDomain");
  return outcome;
}

void test_codes() {
  Ref queue = new_queue();
  uint64_t before = METALSIM(metalsim_plan_struck_here)();
  for (int code : {2, 3, 5, 6, 8, 9, 0xa, 0xb, 0xe, 0x10, 0x11, 0x77}) {
    METALSIM(metalsim_plan_fail)(1, code, 0, 0);
    Outcome outcome = run_one(queue);
    CHECK(outcome.status == 5);
    CHECK(outcome.code == code);
    CHECK(outcome.domain == "IOGPUCommandQueueErrorDomain");
    CHECK(run_one(queue).status == 4);
  }
  CHECK(METALSIM(metalsim_plan_struck_here)() == before + 12);
  std::thread([] { CHECK(METALSIM(metalsim_plan_struck_here)() == 0); }).join();
  METALSIM(metalsim_plan_fail)(1, 8, 0, 0);
  CHECK(run_one(queue).text ==
        "Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)");
  METALSIM(metalsim_plan_fail)(1, 0x77, 0, 0);
  CHECK(run_one(queue).text == "Internal Error (00000077:Internal Error)");
}

// The error of a buffer that fails as planned, and what stands in its userInfo
// under NSUnderlyingErrorKey; judged by `look` while they live.
template <class Look>
void with_error(const metalsim_plan& plan, Look look) {
  METALSIM(metalsim_plan_clear)();
  METALSIM(metalsim_plan_add)(&plan);
  ScopedPool pool;
  Ref buffer = new_buffer(new_queue());
  commit(buffer);
  finish(buffer);
  CHECK(status(buffer) == 5);
  look(send<id>(buffer.get(), SEL_(error)));
}

void test_error_shapes() {
  id string_class = function<id(const char*)>("objc_getClass")("NSString");
  auto is_string = [&](id object) {
    return send<bool>(object, selector("isKindOfClass:"), string_class);
  };
  auto info = [](id error) { return send<id>(error, SEL_(userInfo)); };
  auto cause = [&](id error) {
    id key = send<id>(string_class, selector("stringWithUTF8String:"),
                      "NSUnderlyingError");
    return send<id>(info(error), selector("objectForKey:"), key);
  };
  metalsim_plan plan{};
  plan.nth = 1;
  plan.code = 8;
  auto with_shape = [&](uint32_t shape, auto look) {
    plan.error_shape = shape;
    with_error(plan, look);
  };
  with_shape(METALSIM_ERROR_NIL, [](id error) { CHECK(error == nullptr); });
  with_shape(METALSIM_ERROR_NO_DESCRIPTION, [&](id error) {
    CHECK(send<id>(error, SEL_(localizedDescription)) == nullptr);
    CHECK(cause(error) != nullptr);
  });
  with_shape(METALSIM_ERROR_NO_USER_INFO,
             [&](id error) { CHECK(info(error) == nullptr); });
  with_shape(METALSIM_ERROR_USER_INFO_STRING,
             [&](id error) { CHECK(is_string(info(error))); });
  with_shape(METALSIM_ERROR_NO_UNDERLYING,
             [&](id error) { CHECK(cause(error) == nullptr); });
  with_shape(METALSIM_ERROR_UNDERLYING_STRING,
             [&](id error) { CHECK(is_string(cause(error))); });
  plan.error_number = INT64_MIN;
  plan.error_text = "as told";
  with_shape(0, [&](id error) {
    CHECK(send<int64_t>(cause(error), SEL_(code)) == INT64_MIN);
    CHECK(text_of(send<id>(error, SEL_(localizedDescription))) == "as told");
  });
}

void test_ban() {
  Ref queue = new_queue();
  METALSIM(metalsim_plan_fail)(1, 4, 0, 0);
  for (int i = 0; i < 3; ++i) CHECK(run_one(queue).code == 4);
}

void test_plans() {
  Ref one = new_queue(), two = new_queue();
  metalsim_plan plan{};
  plan.nth = 2;
  plan.code = 8;
  plan.count = 2;
  plan.queue = one.get();
  METALSIM(metalsim_plan_add)(&plan);
  std::vector<uint64_t> seen;
  for (int i = 0; i < 4; ++i) {
    CHECK(run_one(two).status == 4);
    seen.push_back(run_one(one).status);
  }
  CHECK((seen == std::vector<uint64_t>{4, 5, 5, 4}));
  METALSIM(metalsim_plan_fail)(2, 3, 1, 0);
  CHECK(run_one(one).status == 4);
  for (int i = 0; i < 3; ++i) CHECK(run_one(one).code == 3);
}

void test_withheld_signals() {
  METALSIM(metalsim_set_detailed_log)(8);
  Ref queue = new_queue(), event = new_event();
  static std::atomic<int> written{0};
  written = 0;
  metalsim_plan plan{};
  plan.nth = 1;
  plan.code = 8;
  plan.after_commands = 2;
  METALSIM(metalsim_plan_add)(&plan);
  Ref buffer = new_buffer(queue);
  auto write = +[](void*) { ++written; };
  encode_kernel(buffer, write, nullptr);
  encode_signal(buffer, event, 1);
  encode_kernel(buffer, write, nullptr);
  encode_signal(buffer, event, 2);
  commit(buffer);
  finish(buffer);
  settle();
  CHECK(value_of(event) == 1);
  CHECK(written == 1);
  CHECK(totals().signals_withheld == 1);
  metalsim_record record;
  CHECK(METALSIM(metalsim_read_log)(&record, 1) == 1);
  CHECK(record.code == 8 && record.status == 5);
  CHECK(record.signals_done == 1 && record.signals_withheld == 1);
}

void test_working_set() {
  constexpr uint64_t kMiB = 1 << 20;
  METALSIM(metalsim_set_memory)(METALSIM_MEMORY_PROCESS, 100 * kMiB, 0);
  Ref device = default_device(), queue = new_queue();
  CHECK(send<uint64_t>(device.get(), SEL_(recommendedMaxWorkingSetSize)) ==
        100 * kMiB);
  SEL make = selector("newBufferWithLength:options:");
  Ref some = Ref::take(send<id>(device.get(), make, 60 * kMiB, uint64_t{0}));
  CHECK(run_one(queue).status == 4);
  Ref more = Ref::take(send<id>(device.get(), make, 60 * kMiB, uint64_t{0}));
  CHECK(METALSIM(metalsim_resident_bytes)() == 120 * kMiB);
  CHECK(run_one(queue).code == 8);
  more = Ref();
  CHECK(run_one(queue).status == 4);
}

void test_gpu_wait_limit() {
  METALSIM(metalsim_set_gpu_wait_limit_us)(2000);
  Ref queue = new_queue(), event = new_event(), buffer = new_buffer(queue);
  encode_wait(buffer, event, 1);
  encode_signal(buffer, event, 2);
  commit(buffer);
  finish(buffer);
  CHECK(message_of(buffer.get()).find("00000002") != std::string::npos);
  CHECK(value_of(event) == 0);
}

// ---- shapes ----------------------------------------------------------------

std::vector<std::string>& hook_calls() {
  static std::vector<std::string> calls;
  return calls;
}

IMP debug_commit_original, base_commit_original;

template <IMP* original>
void counting_commit(id self, SEL sel) {
  hook_calls().push_back(name_of(class_of(self)));
  reinterpret_cast<void (*)(id, SEL)>(*original)(self, sel);
}

void test_debug_layer() {
  METALSIM(metalsim_set_debug_layer)
  (METALSIM_DEBUG_BUFFERS | METALSIM_DEBUG_EVENTS);
  Ref queue = new_queue(), event = new_event(), buffer = new_buffer(queue);
  CHECK(chain_of(buffer.get()) ==
        "MTLDebugCommandBuffer MTLToolsCommandBuffer MTLToolsObject NSObject");
  id base = send<id>(buffer.get(), SEL_(baseObject));
  auto* get = function<Method(Class, SEL)>("class_getInstanceMethod");
  auto* set = function<IMP(Method, IMP)>("method_setImplementation");
  Method outer = get(class_of(buffer.get()), SEL_(commit));
  Method inner = get(class_of(base), SEL_(commit));
  CHECK(outer != inner);
  debug_commit_original = set(
      outer, reinterpret_cast<IMP>(&counting_commit<&debug_commit_original>));
  base_commit_original = set(
      inner, reinterpret_cast<IMP>(&counting_commit<&base_commit_original>));
  id given = nullptr;
  on_completed(buffer, [&](id object) { given = object; });
  encode_signal(buffer, event, 3);
  hook_calls().clear();
  commit(buffer);
  finish(buffer);
  CHECK(
      (hook_calls() == std::vector<std::string>{"MTLDebugCommandBuffer",
                                                "AGXG16XFamilyCommandBuffer"}));
  CHECK(given == buffer.get());
  CHECK(value_of(event) == 3);
  set(outer, debug_commit_original);
  set(inner, base_commit_original);
  buffer = Ref();
  settle();
  CHECK(METALSIM(metalsim_live_objects)("MTLDebugCommandBuffer") == 0);
}

void test_late_family() {
  auto* find = function<Class(const char*)>("objc_lookUpClass");
  CHECK(find("AGXG17XFamilyCommandBuffer") == nullptr);
  METALSIM(metalsim_set_family)(1);
  Ref queue = new_queue();
  CHECK(find("AGXG17XFamilyCommandBuffer") ==
        class_of(new_buffer(queue).get()));
  CHECK(run_one(queue).status == 4);
}

void test_absences() {
  METALSIM(metalsim_set_no_device)(1);
  CHECK(!default_device());
  METALSIM(metalsim_set_no_device)(0);
  Ref event = new_event();
  SEL wait = selector("waitUntilSignaledValue:timeoutMS:");
  CHECK(METALSIM(metalsim_remove_selector)(
            "waitUntilSignaledValue:timeoutMS:") > 0);
  SEL responds = selector("respondsToSelector:");
  CHECK(!send<bool>(event.get(), responds, wait));
  METALSIM(metalsim_reset)();
  CHECK(send<bool>(event.get(), responds, wait));
}

void test_inline() {
  METALSIM(metalsim_set_fast)(1);
  METALSIM(metalsim_set_inline)(1);
  Ref queue = new_queue();
  std::thread::id ran;
  for (int i = 0; i < 1000; ++i) {
    Ref buffer = new_buffer(queue);
    on_completed(buffer, [&](id) { ran = std::this_thread::get_id(); });
    commit(buffer);
    CHECK(status(buffer) == 4);
  }
  CHECK(ran == std::this_thread::get_id());
  CHECK(totals().handlers_called == 1000);
}

// A child process, since these abort; nothing is started before the fork.
template <class Body>
bool aborts(Body body) {
  pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    body();
    _exit(0);
  }
  int result = 0;
  waitpid(child, &result, 0);
  return WIFSIGNALED(result) && WTERMSIG(result) == SIGABRT;
}

void test_assertions() {
  CHECK(aborts([] {
    Ref queue = new_queue(), buffer = new_buffer(queue);
    commit(buffer);
    on_completed(buffer, [](id) {});
  }));
  CHECK(aborts([] {
    Ref queue = new_queue(), buffer = new_buffer(queue);
    commit(buffer);
    commit(buffer);
  }));
  CHECK(aborts([] {
    Ref queue = new_queue(), buffer = new_buffer(queue);
    on_completed(buffer, [](id) { throw std::runtime_error("escapes"); });
    commit(buffer);
    finish(buffer);
  }));
  CHECK(aborts([] { send(default_device().get(), SEL_(noSuchThing)); }));
}

void test_nothing_leaks() {
  auto* live = METALSIM(metalsim_live_objects);
  settle();
  for (const char* name : {"_MTLCommandBuffer", "_MTLCommandQueue",
                           "_MTLSharedEvent", "_MTLCommandEncoder", "NSError",
                           "__NSMallocBlock__", "MTLToolsObject"}) {
    if (live(name) != 0) std::fprintf(stderr, "leaked: %s\n", name);
    CHECK(live(name) == 0);
  }
}

struct Case {
  const char* name;
  void (*run)();
};

constexpr Case kCases[] = {
    // First: it forks, which must happen before there are threads.
    {"assertions", &test_assertions},
    {"class chains", &test_class_chains},
    {"method ownership", &test_method_ownership},
    {"messages", &test_messages},
    {"replacing methods", &test_replacing_methods},
    {"exceptions cross", &test_exceptions_cross},
    {"blocks", &test_blocks},
    {"address reuse", &test_address_reuse},
    {"pools and associations", &test_pools_and_associations},
    {"handlers in order", &test_handlers_in_order},
    {"queue order", &test_queue_order},
    {"enqueue keeps the place", &test_enqueue_keeps_the_place},
    {"waits and signals", &test_waits_and_signals},
    {"late handlers", &test_late_handlers},
    {"codes", &test_codes},
    {"error shapes", &test_error_shapes},
    {"ban", &test_ban},
    {"plans", &test_plans},
    {"withheld signals", &test_withheld_signals},
    {"working set", &test_working_set},
    {"gpu wait limit", &test_gpu_wait_limit},
    {"debug layer", &test_debug_layer},
    {"late family", &test_late_family},
    {"absences", &test_absences},
    {"inline", &test_inline},
    {"nothing leaks", &test_nothing_leaks},
};

}  // namespace

int main() {
  alarm(300);
  for (const Case& test : kCases) {
    int before = failures;
    test.run();
    CHECK(METALSIM(metalsim_reset)() == 0);
    std::printf("%s %s\n", failures == before ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);
  }
  return failures == 0 ? 0 : 1;
}
