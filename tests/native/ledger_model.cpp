// The ledger against a model of the GPU: every program of two queues with two
// command buffers, every failing buffer. Every order of commits, handlers and
// raising, with a GPU that goes on at once. Then as many as the time allows
// with a GPU that takes its time, and of 2 x 3 and 3 x 2.
//
//   ledger_model [seconds for each of these three]
//
// The ledger runs alone: no thread, no clock, no Metal. What it answers is held
// against what the model knows after each step. Orders that lead to the same
// state of the model and of the ledger go on alike, so the rest is run once,
// and counted for each of them.
#include <array>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ledger_inspector.h"
#include "metal/ledger.h"

namespace {

using namespace mlx_safe::metal;
using Mask = std::uint32_t;  // of buffers

constexpr int kQueuesMax = 3, kBuffersMax = 6, kValuesMax = 8;
constexpr int kNone = -1, kByCpu = -2;

// A queue's own event has the queue's number.
struct Op {
  bool waits;
  int event;
  int value;
};

struct Program {
  int queues = 0, per_queue = 0;
  std::vector<Op> ops[kBuffersMax];  // buffer: queue * per_queue + place
  int failing = kNone;
  std::size_t fails_at = 0;  // before this of its ops

  int count() const { return queues * per_queue; }
  int queue_of(int b) const { return b / per_queue; }
  int before(int b) const { return b % per_queue == 0 ? kNone : b - 1; }
  // The ops that the GPU does not do: it has failed.
  bool is_left_out(int b, std::size_t op) const {
    return b == failing && op >= fails_at;
  }
};

enum class Kind : std::uint8_t { kCommit, kGpu, kHandlers, kRaise, kCpuSets };
struct Step {
  Kind kind;
  int which;  // buffer; queue, for kGpu; event, for kRaise and kCpuSets
  int value;
};

// What really happens. Plain bytes: compared as such.
struct World {
  Mask committed = 0, done = 0, handled = 0;
  Mask settled_now = 0;  // by the last step
  // When the failure was raised, and when each buffer settled after that:
  // what was committed then.
  Mask committed_at_raise = 0;
  Mask committed_at_settling[kBuffersMax] = {};
  std::uint8_t raised = 0;
  std::uint8_t at_buffer[kQueuesMax] = {}, at_op[kQueuesMax] = {};
  std::uint8_t real[kQueuesMax] = {};
  // Who brought each value of an event.
  std::int8_t bringer[kQueuesMax][kValuesMax];

  World() { std::memset(bringer, kNone, sizeof bringer); }
};

Id queue_id(int q) { return reinterpret_cast<Id>(std::uintptr_t(100 + q)); }
Id event_id(int e) { return reinterpret_cast<Id>(std::uintptr_t(200 + e)); }
Id buffer_id(int b) { return reinterpret_cast<Id>(std::uintptr_t(300 + b)); }

bool has(Mask mask, int b) { return (mask >> b & 1) != 0; }

// One order of steps: the world and the ledger beside it.
class Run {
 public:
  explicit Run(const Program& program) : program_(program) {
    ledger_.track_failures(true);
  }
  ~Run() { LedgerInspector::dismantle(ledger_); }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  void apply(const Step& step) {
    world_.settled_now = 0;
    switch (step.kind) {
      case Kind::kCommit:
        return commit(step.which);
      case Kind::kGpu:
        return gpu(step.which);
      case Kind::kHandlers:
        return handlers(step.which);
      case Kind::kRaise:
        ledger_.raised(ledger_.failure_of(event_id(step.which),
                                          std::uint64_t(step.value)));
        world_.raised = 1;
        world_.committed_at_raise = world_.committed;
        return;
      case Kind::kCpuSets:
        ledger_.signalled_by_cpu(event_id(step.which),
                                 std::uint64_t(step.value), nullptr);
        return reach(step.which, step.value, kByCpu);
    }
  }

  // What may happen next. What is to happen in any case comes first; a CPU sets
  // only what would be waited for for ever.
  // A GPU that is `eager` goes on at once.
  std::vector<Step> next(bool eager) const {
    std::vector<Step> steps;
    const Program& p = program_;
    for (int q = 0; q < p.queues; ++q)
      if (can_run(q)) steps.push_back({Kind::kGpu, q, 0});
    if (eager && !steps.empty()) return {steps.front()};
    for (int b = 0; b < p.count(); ++b)
      if (has(world_.done, b) && !has(world_.handled, b))
        steps.push_back({Kind::kHandlers, b, 0});
    for (int b = 0; b < p.count(); ++b)
      if (!has(world_.committed, b) &&
          (p.before(b) == kNone || has(world_.committed, p.before(b))))
        steps.push_back({Kind::kCommit, b, 0});
    if (steps.empty()) add_cpu(&steps);
    if (p.failing != kNone && world_.raised == 0) add_raises(&steps);
    return steps;
  }

  bool is_quiet() const {
    for (int q = 0; q < program_.queues; ++q)
      if (can_run(q)) return false;
    return world_.done == world_.handled;
  }
  // Nothing is to be held back: all handlers have run that can. A failed buffer
  // whose wait was left out is held back by what it should have waited for.
  bool must_settle() const {
    bool has_left_out = false;
    if (program_.failing != kNone)
      for (std::size_t i = program_.fails_at;
           i < program_.ops[program_.failing].size(); ++i)
        has_left_out |= program_.ops[program_.failing][i].waits;
    return is_quiet() && (!has_left_out || is_over());
  }
  bool is_over() const {
    return std::popcount(world_.handled) == program_.count();
  }

  // "" or what is wrong.
  std::string check() const;

  std::string key() const {
    std::string text(reinterpret_cast<const char*>(&world_), sizeof world_);
    return text + LedgerInspector::digest(ledger_);
  }

 private:
  void commit(int b) {
    Ledger::Encoder here{};
    for (const Op& op : program_.ops[b]) {
      auto value = std::uint64_t(op.value);
      auto event = mlx_safe::objc::Owned::retaining(event_id(op.event));
      if (op.waits)
        ledger_.wait_encoded(buffer_id(b), std::move(event), value, here);
      else
        ledger_.signal_encoded(buffer_id(b), std::move(event), value, here);
    }
    ledger_.committed(buffer_id(b), queue_id(program_.queue_of(b)), {});
    world_.committed |= Mask{1} << b;
  }

  int at(int q) const { return q * program_.per_queue + world_.at_buffer[q]; }

  bool can_run(int q) const {
    if (world_.at_buffer[q] == program_.per_queue) return false;
    int b = at(q);
    if (!has(world_.committed, b)) return false;
    std::size_t i = world_.at_op[q];
    if (i == program_.ops[b].size() || program_.is_left_out(b, i)) return true;
    const Op& op = program_.ops[b][i];
    return !op.waits || world_.real[op.event] >= op.value;
  }

  void gpu(int q) {
    int b = at(q);
    std::size_t i = world_.at_op[q];
    if (i == program_.ops[b].size() || program_.is_left_out(b, i)) {
      world_.done |= Mask{1} << b;
      ++world_.at_buffer[q];
      world_.at_op[q] = 0;
      return;
    }
    const Op& op = program_.ops[b][i];
    if (!op.waits) reach(op.event, op.value, b);
    ++world_.at_op[q];
  }

  void reach(int event, int value, int who) {
    for (int v = world_.real[event] + 1; v <= value; ++v)
      world_.bringer[event][v] =
          static_cast<std::int8_t>(signaller(event, v, who));
    if (world_.real[event] < value)
      world_.real[event] = static_cast<std::uint8_t>(value);
  }
  // A failed buffer's signal may come by a later one of its queue (R3).
  int signaller(int event, int value, int who) const {
    for (int b = who; who != kByCpu && b != kNone; b = program_.before(b))
      for (const Op& op : program_.ops[b])
        if (!op.waits && op.event == event && op.value >= value) who = b;
    return who;
  }

  // The buffer's last handler, as completion.cpp has it.
  void handlers(int b) {
    FailureRef own;
    if (b == program_.failing) {
      own = std::make_shared<Failure>("f", mlx_safe::objc::Owned());
      for (Signal& signal : ledger_.find(buffer_id(b))->signals)
        signal.reached = world_.real[event_of(signal)];
    }
    Mask before = settled();
    BufferRef record = ledger_.completed(buffer_id(b), own);
    world_.handled |= Mask{1} << b;
    for (const Signal& signal : record->signals)
      reach(event_of(signal), static_cast<int>(signal.value), b);
    world_.settled_now = settled() & ~before;
    if (world_.raised == 0) return;
    for (int one = 0; one < program_.count(); ++one)
      if (has(world_.settled_now, one))
        world_.committed_at_settling[one] = world_.committed;
  }
  static int event_of(const Signal& signal) {
    return static_cast<int>(
               reinterpret_cast<std::uintptr_t>(signal.event.get())) -
           200;
  }

  // A CPU sets what no buffer signals.
  void add_cpu(std::vector<Step>* steps) const {
    for (int q = 0; q < program_.queues; ++q) {
      if (world_.at_buffer[q] == program_.per_queue) continue;
      const Op& op = program_.ops[at(q)][world_.at_op[q]];
      if (!is_signalled(op.event, op.value))
        steps->push_back({Kind::kCpuSets, op.event, op.value});
    }
  }
  bool is_signalled(int event, int value) const {
    for (const std::vector<Op>& ops : program_.ops)
      for (const Op& op : ops)
        if (!op.waits && op.event == event && op.value >= value) return true;
    return false;
  }

  void add_raises(std::vector<Step>* steps) const {
    for (int e = 0; e < program_.queues; ++e)
      for (int v = 1; v <= world_.real[e]; ++v)
        if (is_open(e, v) &&
            ledger_.failure_of(event_id(e), std::uint64_t(v)) != nullptr)
          return steps->push_back({Kind::kRaise, e, v});
  }

  bool is_open(int e, int v) const {
    return !ledger_.is_closed(event_id(e), std::uint64_t(v), world_.real[e]);
  }

  // ---- what the model knows ------------------------------------------------

  // What the ledger has settled.
  Mask settled() const {
    Mask found = 0;
    for (int b = 0; b < program_.count(); ++b)
      if (has(world_.handled, b) && ledger_.find(buffer_id(b)) == nullptr)
        found |= Mask{1} << b;
    return found;
  }

  // Whether handlers have run of all that the results of `b` rest on (R1).
  bool is_sound(int b) const {
    if (b == kNone) return true;
    // That was looked at when it settled.
    if (has(settled() & ~world_.settled_now, b)) return true;
    if (!has(world_.handled, b) || !is_sound(program_.before(b))) return false;
    for (std::size_t i = 0; i < program_.ops[b].size(); ++i) {
      const Op& op = program_.ops[b][i];
      if (op.waits && !program_.is_left_out(b, i) &&
          !is_brought(op.event, op.value, true))
        return false;
    }
    return true;
  }
  // The same of a value that has come (R2). `at_commit`: as far as is known of
  // what other buffers wait for.
  bool is_brought(int event, int value, bool at_commit = false) const {
    int who = world_.bringer[event][value];
    if (who == kByCpu) return true;
    if (at_commit && passes_over(who, event, value) &&
        !has(world_.handled, who))
      return true;
    return is_early(who, event) && (at_commit || !is_withheld(who, event))
               ? is_sound(program_.before(who))
               : is_sound(who);
  }
  // Whether the signal is followed by a wait in its own buffer.
  bool is_early(int who, int event) const {
    bool signalled = false;
    for (const Op& op : program_.ops[who]) {
      if (op.waits && signalled) return true;
      if (!op.waits && op.event == event) signalled = true;
    }
    return false;
  }
  bool is_withheld(int who, int event) const {
    for (std::size_t i = 0; i < program_.ops[who].size(); ++i) {
      const Op& op = program_.ops[who][i];
      if (!op.waits && op.event == event) return program_.is_left_out(who, i);
    }
    return false;
  }
  bool passes_over(int who, int event, int value) const {
    for (const Op& op : program_.ops[who])
      if (!op.waits && op.event == event) return op.value != value;
    return true;
  }

  // Whether the results of `b` depend on the failure: `at_least`, as the rules
  // promise; otherwise, at most.
  bool is_spoilt(int b, bool at_least, Mask seen = 0) const {
    if (b == kNone || has(seen, b)) return false;
    seen |= Mask{1} << b;
    if (b == program_.failing && has(world_.handled, b)) return true;
    int before = program_.before(b);
    if (is_spoilt(before, at_least, seen) && goes_on(before, b, at_least))
      return true;
    for (std::size_t i = 0; i < program_.ops[b].size(); ++i) {
      const Op& op = program_.ops[b][i];
      if (op.waits && !program_.is_left_out(b, i) &&
          !(at_least && is_limit(op.event, op.value)) &&
          world_.bringer[op.event][op.value] != kNone &&
          is_spoilt_value(op.event, op.value, at_least, seen))
        return true;
    }
    return false;
  }
  // Known limits (docs/metal.md). A buffer has waited for a value that a signal
  // passes over. Or it has for a withheld signal that is followed by a wait in
  // its own buffer, and came by a later one.
  bool is_limit(int event, int value) const {
    int who = world_.bringer[event][value];
    return who >= 0 && (passes_over(who, event, value) ||
                        (is_early(who, event) && is_withheld(who, event)));
  }
  // R5 and R6.
  bool goes_on(int before, int b, bool at_least) const {
    if (world_.raised == 0 || has(world_.committed_at_raise, b)) return true;
    return !at_least && has(world_.committed_at_settling[before], b);
  }
  bool is_spoilt_value(int event, int value, bool at_least,
                       Mask seen = 0) const {
    int who = world_.bringer[event][value];
    if (who == kByCpu) return false;
    if (who == program_.failing && has(world_.handled, who) &&
        (!at_least || (!passes_over(who, event, value) &&
                       (is_withheld(who, event) || !is_early(who, event)))))
      return true;  // R4
    if (at_least && passes_over(who, event, value)) return false;
    if (at_least && is_early(who, event)) {
      int before = program_.before(who);
      return is_spoilt(before, true, seen) && goes_on(before, who, true);
    }
    return is_spoilt(who, at_least, seen);
  }

  std::string check_value(int e, int v) const;
  std::string check_shown(int e) const;
  std::string check_queue(int q) const;

  const Program& program_;
  World world_;
  Ledger ledger_;
};

std::string Run::check_value(int e, int v) const {
  std::string what =
      " of event " + std::to_string(e) + ", value " + std::to_string(v);
  FailureRef failure = ledger_.failure_of(event_id(e), std::uint64_t(v));
  if (!is_open(e, v)) {
    if (must_settle() && world_.bringer[e][v] != kByCpu)
      return "R1: a wait is held back for nothing" + what;
    return "";
  }
  // One that raises may end earlier.
  if (!is_brought(e, v) && !failure) return "R1: a wait ends too early" + what;
  if (is_spoilt_value(e, v, true) && !failure)
    return "R4, R5, R7: the failure is lost" + what;
  if (failure && !is_spoilt_value(e, v, false) &&
      world_.bringer[e][v] != kByCpu)
    return "R6: a failure where there is none" + what;
  return "";
}

std::string Run::check_shown(int e) const {
  std::string what = " of event " + std::to_string(e);
  Id event = event_id(e);
  int real = world_.real[e];
  auto settled =
      static_cast<int>(ledger_.settled_value(event, std::uint64_t(real)));
  auto visible = static_cast<int>(ledger_.visible(event, std::uint64_t(real)));
  if (settled > real || visible > settled)
    return "R10: more is read than there is" + what;
  bool all_open = true;
  for (int v = 1; v <= real; ++v) {
    int who = world_.bringer[e][v];
    if (v <= settled && who >= 0 && !passes_over(who, e, v) &&
        !is_brought(e, v))
      return "R10: a value is read too early" + what;
    if (v <= visible && is_spoilt_value(e, v, true))
      return "R10: a failed value is read" + what;
    all_open = all_open && is_open(e, v);
  }
  if (all_open && settled != real)
    return "R10: a value is not read that has settled" + what;
  Mask settled_buffers = this->settled();
  bool any = false;
  for (int v = 1; v <= kValuesMax; ++v)
    any = any || ledger_.failure_of(event, std::uint64_t(v)) != nullptr;
  if (!any && visible != settled) return "R10: a good value is not read" + what;
  for (int v = 0; v < kValuesMax; ++v) {
    bool beyond = false;
    for (int b = 0; b < program_.count(); ++b)
      for (const Op& op : program_.ops[b])
        beyond =
            beyond || (!op.waits && op.event == e && op.value > v &&
                       has(world_.committed, b) && !has(settled_buffers, b));
    if (beyond != ledger_.is_pending_beyond(event, std::uint64_t(v)))
      return "R11: what is in flight is not known" + what;
  }
  return "";
}

std::string Run::check_queue(int q) const {
  std::string what = " of queue " + std::to_string(q);
  FailureRef stays = ledger_.unraised_on(queue_id(q));
  Mask settled = this->settled();
  bool spoilt_least = false, spoilt_most = false;
  for (int i = 0; i < program_.per_queue; ++i) {
    int b = q * program_.per_queue + i;
    if (!has(settled, b)) break;
    spoilt_least = spoilt_least || is_spoilt(b, true);
    spoilt_most = spoilt_most || is_spoilt(b, false);
  }
  if (world_.raised != 0 && stays) return "R6: a raised failure stays" + what;
  if (world_.raised == 0 && spoilt_least && !stays)
    return "R5: a failure does not stay" + what;
  if (stays && !spoilt_most) return "R5: a failure stays elsewhere" + what;
  return "";
}

std::string Run::check() const {
  LedgerInspector::check(ledger_);
  Mask settled = this->settled();
  for (int b = 0; b < program_.count(); ++b) {
    std::string what = " of buffer " + std::to_string(b);
    if (has(world_.settled_now, b) && !is_sound(b))
      return "R1: settled too early" + what;
    if (!has(settled, b) && is_sound(b) && must_settle())
      return "R1: it does not settle" + what;
  }
  for (int e = 0; e < program_.queues; ++e) {
    for (int v = 1; v <= world_.real[e]; ++v)
      if (std::string wrong = check_value(e, v); !wrong.empty()) return wrong;
    if (std::string wrong = check_shown(e); !wrong.empty()) return wrong;
    if (std::string wrong = check_queue(e); !wrong.empty()) return wrong;
  }
  if (is_over() && !ledger_.buffers().empty()) return "a record is left";
  if (is_over() && program_.failing == kNone && ledger_.event_count() != 0)
    return "an event's record is left";
  return "";
}

// ---- every order of one program ---------------------------------------------

std::string text_of(const Program& p) {
  std::string text;
  for (int b = 0; b < p.count(); ++b) {
    text += p.before(b) == kNone
                ? "  queue " + std::to_string(p.queue_of(b)) + ":"
                : ",";
    text += " buffer " + std::to_string(b);
    for (std::size_t i = 0; i <= p.ops[b].size(); ++i) {
      if (b == p.failing && i == p.fails_at) text += " FAILS";
      if (i == p.ops[b].size()) break;
      const Op& op = p.ops[b][i];
      text += (op.waits ? " wait " : " signal ") + std::to_string(op.event) +
              "=" + std::to_string(op.value);
    }
    if ((b + 1) % p.per_queue == 0) text += "\n";
  }
  return text;
}

class Explorer {
 public:
  Explorer(const Program& program, bool eager)
      : program_(program), eager_(eager) {}

  std::uint64_t orders() {
    Run run(program_);
    return visit(run);
  }
  std::uint64_t states() const { return seen_.size(); }

 private:
  std::uint64_t visit(Run& run) {
    if (path_.size() > 100) fail("it goes on for ever");
    std::string key = run.key();
    if (auto it = seen_.find(key); it != seen_.end()) return it->second;
    if (std::string wrong = run.check(); !wrong.empty()) fail(wrong);
    std::vector<Step> steps = run.next(eager_);
    std::uint64_t orders = steps.empty() ? 1 : 0;
    for (const Step& step : steps) {
      path_.push_back(step);
      if (&step == &steps.back()) {
        run.apply(step);
        orders += visit(run);
      } else {
        Run again(program_);
        for (const Step& before : path_) again.apply(before);
        orders += visit(again);
      }
      path_.pop_back();
    }
    return seen_[key] = orders;
  }

  [[noreturn]] void fail(const std::string& wrong) {
    constexpr const char* kNames[] = {"commit buffer", "GPU, queue",
                                      "handlers of buffer", "raise, event",
                                      "CPU sets event"};
    std::printf("%s\n%s", wrong.c_str(), text_of(program_).c_str());
    for (const Step& step : path_) {
      std::printf("  %s %d", kNames[static_cast<int>(step.kind)], step.which);
      if (step.value != 0) std::printf(", value %d", step.value);
      std::printf("\n");
    }
    std::exit(1);
  }

  const Program& program_;
  const bool eager_;
  std::vector<Step> path_;
  std::unordered_map<std::string, std::uint64_t> seen_;
};

// ---- every program ----------------------------------------------------------

// What one buffer does: values of its own event count from the last one that
// its queue has signalled, those of another's from 0.
struct Part {
  bool waits;
  int other;  // queues further on; 0: its own
  int value;
};
using Parts = std::vector<Part>;

std::vector<Parts> parts_of(int queues) {
  Part signal{false, 0, 1}, far{false, 0, 2};
  std::vector<Parts> all{{}, {signal}, {far}};
  for (int other = 1; other < queues; ++other)
    for (int value = 1; value <= 2; ++value) {
      Part wait{true, other, value};
      all.push_back({wait, signal});
      all.push_back({signal, wait});
      if (value == 1) all.push_back({wait});
      if (value == 1) all.push_back({wait, far});
    }
  return all;
}

// False: the same as another with its queues changed round, or it waits for
// what is never signalled. The first value of a queue may be: a CPU sets it
// then.
bool make_program(const std::vector<Parts>& parts, std::uint64_t number,
                  Program* out) {
  std::uint64_t half = 1;
  for (int i = 0; i < out->per_queue; ++i) half *= parts.size();
  if (out->queues == 2 && number % half > number / half) return false;
  int signalled[kQueuesMax] = {};
  for (int b = 0; b < out->count(); ++b) {
    int q = out->queue_of(b);
    out->ops[b].clear();
    for (const Part& part : parts[number % parts.size()]) {
      // A value is passed over only where none is signalled before it.
      if (part.value == 2 && !part.waits && signalled[q] != 0) return false;
      if (!part.waits) signalled[q] += part.value;
      int event = (q + part.other) % out->queues;
      out->ops[b].push_back(
          {part.waits, event, part.waits ? part.value : signalled[q]});
    }
    number /= parts.size();
  }
  for (int b = 0; b < out->count(); ++b)
    for (const Op& op : out->ops[b])
      if (op.waits && op.value > 1 && op.value > signalled[op.event])
        return false;
  return true;
}

struct Total {
  std::uint64_t programs = 0, orders = 0, states = 0;

  void explore(const Program& program, bool eager) {
    Explorer explorer(program, eager);
    ++programs;
    orders += explorer.orders();
    states += explorer.states();
  }
};

// Whether a good GPU comes to the end: otherwise two queues wait for each
// other.
bool comes_to_end(const Program& program) {
  Run run(program);
  for (std::vector<Step> steps = run.next(true); !steps.empty();
       steps = run.next(true))
    run.apply(steps.front());
  return run.is_over();
}

// Good, and with each buffer failing: before it begins, and after an op.
void explore_failures(Program program, bool eager, Total* total) {
  program.failing = kNone;
  if (!comes_to_end(program)) return;
  total->explore(program, eager);
  for (int b = 0; b < program.count(); ++b)
    for (std::size_t at = 0; at <= program.ops[b].size(); ++at) {
      program.failing = b;
      program.fails_at = at;
      total->explore(program, eager);
    }
}

using Clock = std::chrono::steady_clock;

// All of them, or what there is time for, spread over them.
void explore_all(int queues, int per_queue, bool eager, double seconds) {
  std::vector<Parts> parts = parts_of(queues);
  Program program;
  program.queues = queues;
  program.per_queue = per_queue;
  std::uint64_t count = 1;
  for (int b = 0; b < program.count(); ++b) count *= parts.size();
  constexpr std::uint64_t kStride = 1'000'003;  // prime
  Total total;
  auto begin = Clock::now();
  auto spent = [&] {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  std::uint64_t looked_at = 0;
  while (looked_at < count && (seconds < 0 || spent() < seconds)) {
    std::uint64_t number = looked_at++ * kStride % count;
    if (make_program(parts, number, &program))
      explore_failures(program, eager, &total);
  }
  std::printf(
      "%d queues x %d buffers, GPU %s: %llu programs with their failures, %llu "
      "orders "
      "(%llu states) in %.1f s; %llu of %llu looked at\n",
      queues, per_queue, eager ? "at once" : "at any time",
      static_cast<unsigned long long>(total.programs),
      static_cast<unsigned long long>(total.orders),
      static_cast<unsigned long long>(total.states), spent(),
      static_cast<unsigned long long>(looked_at),
      static_cast<unsigned long long>(count));
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = argc > 1 ? std::atof(argv[1]) : 2;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  explore_all(2, 2, true, -1);
  explore_all(2, 2, false, seconds);
  explore_all(2, 3, true, seconds);
  explore_all(3, 2, true, seconds);
}
