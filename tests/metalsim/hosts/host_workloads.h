// The workloads, and the main program of both hosts.
#pragma once

#include <stdexcept>

#include "host_graph.h"
#include "host_report.h"

namespace host {

// Only for what hangs.
constexpr uint64_t kIdleLimitMs = 120'000;

constexpr Stream kGpu{0, true}, kOtherGpu{1, true}, kCpu{2, false};
constexpr Stream kThirdGpu{3, true}, kOtherCpu{4, false};

template <class Regime>
class Workloads {
 public:
  using G = Graph<Regime>;
  using Ptr = typename G::Ptr;

  // False: no such workload.
  static bool run(const std::string& name) {
    make_streams(name);
    if (name == "basic") return each_round(&basic);
    if (name == "midgraph") return each_round(&midgraph);
    if (name == "two_queues") return each_round(&two_queues);
    if (name == "gpu_cpu_gpu") return each_round(&gpu_cpu_gpu);
    if (name == "fences") return each_round(&fences);
    if (name == "sync") return each_round(&sync);
    if (name == "decode") return decode();
    if (name == "tls") return each_round(&tls);
    if (name == "held_up") return each_round(&held_up);
    return false;
  }

  // After a single fault, work that has nothing to do with it must go well.
  static bool independent_work() {
    uint64_t before = epoch();
    try {
      Ptr node = G::chain(kGpu, G::leaf(9), 5);
      G::eval({node});
      return node->cell->value == node->expected && epoch() == before;
    } catch (const std::exception& e) {
      return false;
    }
  }

  // What a server does once it knows of a fault. In the newer MLX an error
  // may still be stored in a stream; synchronizing brings it out.
  static void recover() {
    if (!Regime::kObserve || !options().trace.empty()) return;
    for (Stream stream : {kGpu, kOtherGpu, kThirdGpu}) {
      try {
        Regime::synchronize(stream);
      } catch (const std::exception&) {
      }
    }
  }

 private:
  using Results = std::vector<Ptr>;

  // A stream has its queue and first command buffer from the beginning; in 0.30
  // from its first use.
  static void make_streams(const std::string& name) {
    if (is_before_0_31()) return;
    Regime::encoder(kGpu);
    bool two = name == "two_queues" || name == "fences" || name == "sync" ||
               name == "held_up";
    if (two) Regime::encoder(kOtherGpu);
    if (name == "held_up") Regime::encoder(kThirdGpu);
  }

  // ---- judging -------------------------------------------------------------

  static void note_exception(const std::exception& e) {
    Report& r = report();
    if (std::strstr(e.what(), "[METAL]") == nullptr) {
      std::fprintf(stderr, "unexpected exception: %s\n", e.what());
      ++r.other_exceptions;
      return;
    }
    ++r.told;
    switch (*doing) {
      case 'e':
        ++r.told_in_encode;
        break;
      case 'w':
        ++r.told_in_wait;
        break;
      default:
        ++r.told_in_sync;
    }
  }

  // True if these results, which nobody complained of, may be used. Garbage
  // among them was reported as good, unless the epoch says otherwise.
  static bool accept(const Results& results, uint64_t epoch_before) {
    Report& r = report();
    if (Regime::kObserve && epoch() != epoch_before) {
      ++r.told;
      ++r.told_by_epoch;
      return false;
    }
    for (auto& node : results) {
      ++(node->cell->value == node->expected ? r.good : r.silent_garbage);
    }
    return true;
  }

  template <class Body>
  static bool attempt(Body body) {
    ++report().rounds;
    uint64_t before = epoch();
    try {
      if (accept(body(), before)) return true;
    } catch (const std::exception& e) {
      note_exception(e);
    }
    recover();
    return false;
  }

  static bool each_round(Results (*body)(int)) {
    auto* hold_handlers = METALSIM(metalsim_hold_handlers);
    for (int round = 0; round < options().rounds; ++round) {
      // Late as they may be, and as long as it takes to judge the round.
      bool hold = options().hold_first && round == 0;
      if (hold) hold_handlers(1);
      attempt([=] { return body(round); });
      if (!hold) continue;
      hold_handlers(0);
      METALSIM(metalsim_wait_idle)(kIdleLimitMs);
    }
    return true;
  }

  static void synchronize(Stream stream) {
    doing = "synchronize";
    Regime::synchronize(stream);
  }

  static Ptr start(int round) {
    return G::leaf(static_cast<uint64_t>(round) + 100);
  }

  // ---- one round of each ---------------------------------------------------

  static Results basic(int round) {
    Ptr node = G::chain(kGpu, start(round), 3);
    G::eval({node});
    return {node};
  }

  // Several buffers without any event, then one with.
  static Results midgraph(int round) {
    Ptr half = G::chain(kGpu, start(round), options().ops_per_buffer * 2);
    Ptr node = G::chain(kGpu, half, options().ops_per_buffer * 2);
    if (round % 2 == 0) {
      G::eval({node});
      return {half, node};
    }
    G::async_eval({node});
    G::item(node);
    return {half, node};
  }

  // Two GPU streams that wait for each other at every step.
  static Results two_queues(int round) {
    Ptr one = start(round), two = start(round + 1);
    for (int step = 0; step < 4; ++step) {
      Ptr next = G::op(kGpu, {one, two});
      two = G::op(kOtherGpu, {two, one});
      one = next;
    }
    if (round % 2 == 0) {
      G::eval({one, two});
      return {one, two};
    }
    G::async_eval({one});
    G::async_eval({two});
    Ptr sum = G::op(kGpu, {two, one});
    G::item(sum);
    G::item(two);
    return {sum, two};
  }

  static Results gpu_cpu_gpu(int round) {
    Ptr first = G::chain(kGpu, start(round), 3);
    if (round % 2 == 1) G::async_eval({first});
    Ptr middle = G::chain(kCpu, first, 2);
    if (round % 4 == 3) G::async_eval({middle});
    Ptr last = G::op(kGpu, {middle, first});
    G::eval({last});
    return {last};
  }

  // One command buffer that signals a fence and then waits for a thread
  // which waits for that fence, again and again.
  static Results fences(int round) {
    Ptr node = start(round);
    for (int turn = 0; turn < 3; ++turn) {
      Ptr on_gpu = G::chain(kGpu, node, 2);
      Ptr on_cpu = G::op(kCpu, {on_gpu});
      Ptr on_other = G::op(kOtherGpu, {on_gpu, on_cpu});
      node = G::op(kGpu, {on_other, on_cpu});
    }
    G::eval({node});
    return {node};
  }

  static Results sync(int round) {
    Ptr one = G::chain(kGpu, start(round), options().ops_per_buffer + 4);
    Ptr two = G::chain(kOtherGpu, start(round), 3);
    G::async_eval({one});
    G::async_eval({two});
    synchronize(kGpu);
    synchronize(kOtherGpu);
    G::item(one);
    G::item(two);
    return {one, two};
  }

  // More than one command buffer of operations.
  static Ptr many(Stream stream, Ptr from) {
    return G::chain(stream, from, options().ops_per_buffer + 2);
  }

  // An operation that takes long to encode, as one does whose kernel is
  // compiled first: what was committed before it has run by then.
  static Ptr slow_op(Stream stream, std::vector<Ptr> inputs) {
    Ptr node = G::op(stream, std::move(inputs));
    node->kernel->encode_us = 20'000;
    return node;
  }

  // The first stream's signal is encoded and not committed, and what waits for
  // it on another stream is committed. A CPU stream waits for that, when a
  // failure of what was committed before is found.
  static Results held_up(int round) {
    Ptr one = G::op(kGpu, {many(kGpu, start(round))});
    Ptr two = G::op(kOtherGpu, {one});
    std::vector<Ptr> after;  // commits what it comes after, with its signals
    if (round % 3 == 1) {    // through committed buffers of two more streams
      after.push_back(many(kOtherGpu, two));
      two = G::op(kThirdGpu, {two});
      after.push_back(many(kThirdGpu, two));
    }
    Ptr middle = G::chain(kCpu, two, 2);
    after.push_back(many(kOtherGpu, two));
    if (round % 3 == 2) {  // from one CPU stream to another, over a GPU's
      Ptr back = G::op(kOtherGpu, {middle, after.back()});
      middle = G::op(kOtherCpu, {back, middle});
      after.push_back(many(kOtherGpu, back));
    }
    // The CPU's before what comes after.
    std::vector<Ptr> inputs{middle, one};
    inputs.insert(inputs.end(), after.begin(), after.end());
    Ptr last = slow_op(kGpu, inputs);
    G::eval({last});
    return {last};
  }

  // Threads with streams of their own. The encoders are thread-local and made
  // before anything else of the thread, so they go last, with work left in
  // them; the results are read afterwards, by this thread.
  static Results tls(int round) {
    constexpr int kThreads = 3;
    std::vector<Results> made(kThreads);
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([round, i, &made] {
        mark_thread(true);
        made[static_cast<size_t>(i)] = thread_work(round, i);
      });
    }
    for (auto& thread : threads) thread.join();
    Results all;
    for (auto& results : made) {
      for (auto& node : results) {
        G::item(node);
        all.push_back(node);
      }
    }
    return all;
  }

  static Results thread_work(int round, int number) {
    Stream own{10 + number, true};
    try {
      Ptr node = G::chain(own, start(round), 4);
      G::async_eval({node});
      Ptr more = G::chain(own, node, 2);
      if (number == 0) G::eval({more});
      // Encoded and never committed, except by the encoder's destructor.
      Regime::eval_gpu(own, G::op(own, {node})->kernel);
      return {number == 0 ? more : node};
    } catch (const std::exception& e) {
      note_exception(e);
      return {};
    }
  }

  // ---- a decode loop -------------------------------------------------------

  struct Step {
    Ptr token, cache;
    uint64_t epoch_before;
  };

  // Starts a step that depends on the one before, as generation does.
  static Step begin_step(const Ptr& token, const Ptr& cache) {
    uint64_t before = epoch();
    int layers = options().ops_per_buffer;
    Ptr next_cache = G::chain(kGpu, G::op(kGpu, {cache, token}), layers);
    Ptr next_token = G::chain(kGpu, next_cache, layers / 2);
    Step step{next_token, next_cache, before};
    G::async_eval({step.token, step.cache});
    return step;
  }

  static bool finish_step(const Step& step) {
    G::item(step.token);
    return accept({step.token, step.cache}, step.epoch_before);
  }

  // One step is always in flight while the one before is read. Whoever is
  // told of a fault drops both, and everything that came from them.
  static bool decode() {
    int left = options().rounds;
    while (left > 0) {
      try {
        Step running = begin_step(start(left), start(left));
        while (left-- > 0) {
          ++report().rounds;
          Step next = begin_step(running.token, running.cache);
          if (!finish_step(running)) break;
          running = next;
        }
        if (left <= 0) finish_step(running);
      } catch (const std::exception& e) {
        note_exception(e);
      }
      recover();
    }
    return true;
  }
};

// ---- main ------------------------------------------------------------------

inline void shape_runtime() {
  const Options& o = options();
  METALSIM(metalsim_set_debug_layer)(o.debug_layer);
  METALSIM(metalsim_set_family)(o.family);
  METALSIM(metalsim_set_handler_delay_us)(o.late_us);
  if (o.seed != 0) {
    METALSIM(metalsim_set_random_delays)(o.seed, 200, o.late_us + 200);
  }
}

inline void plan_faults() {
  const Options& o = options();
  METALSIM(metalsim_get_totals)(&report().before);
  if (o.fail_nth == 0) return;
  metalsim_plan plan{};
  plan.nth = o.fail_nth;
  plan.code = o.code;
  plan.persistent = o.persistent;
  plan.after_commands = o.after_commands;
  METALSIM(metalsim_plan_add)(&plan);
}

// The settings that make the workload what its name says.
inline void tune_workload() {
  Options& o = options();
  bool small = o.workload == "midgraph" || o.workload == "sync" ||
               o.workload == "decode" || o.workload == "held_up";
  if (small && o.ops_per_buffer == 40) o.ops_per_buffer = 8;
}

// What is sent from now on, with a GPU so slow that everything is waited for.
inline bool start_trace() {
  const std::string& path = options().trace;
  if (path.empty()) return true;
  METALSIM(metalsim_set_gpu_delay_us)(20'000);
  return METALSIM(metalsim_trace)(path.c_str()) == 0;
}

// 0 if the run was what --expect says; without it, if there is a report.
inline int judge() {
  const Report& r = report();
  const HandlerCounts& h = handler_counts();
  bool sound = r.idle && r.silent_garbage == 0 && r.other_exceptions == 0 &&
               h.out_of_order == 0 && h.called_twice == 0 &&
               h.registered == h.called;
  if (options().expect == "sound") return sound ? 0 : 1;
  if (options().expect == "clean") return sound && r.told == 0 ? 0 : 1;
  if (options().expect == "told") return sound && r.told > 0 ? 0 : 1;
  return 0;
}

template <class Regime>
int main_program(int argc, char** argv) {
  if (!read_options(argc, argv)) return 2;
  tune_workload();
  limit_time(Regime::kName);
  shape_runtime();
  if (!load_hooks(Regime::kMode)) return 4;
  plan_faults();
  if (!start_trace()) return 2;
  if (!Workloads<Regime>::run(options().workload)) {
    std::fprintf(stderr, "no workload %s\n", options().workload.c_str());
    return 2;
  }
  Report& r = report();
  r.idle = METALSIM(metalsim_wait_idle)(kIdleLimitMs) != 0;
  METALSIM(metalsim_get_totals)(&r.after);
  METALSIM(metalsim_trace)(nullptr);
  if (!options().persistent && options().code != 4) {
    if (hooks() && epoch() != 0) Workloads<Regime>::recover();
    r.independent = Workloads<Regime>::independent_work() ? "true" : "false";
    r.idle = r.idle && METALSIM(metalsim_wait_idle)(kIdleLimitMs);
  }
  uint64_t last_epoch = epoch();
  if (hooks()) hooks().uninstall();
  r.modified_methods = METALSIM(metalsim_modified_methods)();
  static uint64_t kept_epoch;
  kept_epoch = last_epoch;
  if (hooks()) hooks().epoch = +[] { return kept_epoch; };
  print_report(Regime::kName);
  return judge();
}

}  // namespace host
