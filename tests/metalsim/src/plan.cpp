// Which buffer fails, how late things are, and every other setting.

#include <mutex>

#include "metal.h"

namespace metalsim {
namespace {

constexpr size_t kMostPlans = 64;

struct Plan {
  metalsim_plan wanted;
  uint64_t seen = 0;
};

struct Plans {
  std::mutex lock;
  std::vector<Plan> list;
  std::atomic<bool> any{false};  // spares commits the lock
};

thread_local uint64_t t_planned_here = 0;

Plans& plans() {
  static auto* instance = new Plans;
  return *instance;
}

bool strikes(const metalsim_plan& wanted, uint64_t number) {
  if (wanted.nth == 0 || number < wanted.nth) return false;
  if (wanted.persistent) return true;
  uint64_t in_a_row = wanted.count ? wanted.count : 1;
  return number - wanted.nth < in_a_row;
}

void apply_plans(const CommandQueue* queue, Fate& fate) {
  Plans& all = plans();
  if (!all.any.load(std::memory_order_acquire)) return;
  std::lock_guard guard(all.lock);
  for (Plan& plan : all.list) {
    const metalsim_plan& wanted = plan.wanted;
    if (wanted.queue != nullptr && wanted.queue != queue) continue;
    bool struck = strikes(wanted, ++plan.seen);
    if (!struck || fate.code != 0) continue;
    ++t_planned_here;
    fate.code = wanted.code;
    fate.after_commands = wanted.after_commands;
    fate.error = {wanted.error_shape, wanted.error_number, wanted.error_text};
    fate.gpu_delay_us += wanted.gpu_delay_us;
    fate.handler_delay_us += wanted.handler_delay_us;
  }
}

// SplitMix64: a good number from any seed, without state.
uint64_t scramble(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

void apply_random_delays(uint64_t serial, Fate& fate) {
  uint64_t seed = settings().random_seed.load(std::memory_order_relaxed);
  if (seed == 0) return;
  uint64_t random = scramble(seed ^ scramble(serial));
  uint64_t gpu = settings().random_gpu_us.load();
  uint64_t handler = settings().random_handler_us.load();
  fate.gpu_delay_us += (random & 0xffffffff) % (gpu + 1);
  fate.handler_delay_us += (random >> 32) % (handler + 1);
}

void reset_settings() {
  Settings& s = settings();
  s.no_device = s.fast = s.run_inline = s.banned = s.rootless = false;
  s.family = s.debug_layers = 0;
  s.handler_delay_us = s.gpu_delay_us = s.pipeline_delay_us = 0;
  s.random_gpu_us = s.random_handler_us = 0;
  s.random_seed = s.gpu_wait_limit_us = 0;
  s.memory_mode = METALSIM_MEMORY_OFF;
  s.working_set = s.ceiling = 0;
}

}  // namespace

Settings& settings() {
  static auto* instance = new Settings;
  return *instance;
}

Fate decide_fate(const CommandQueue* queue, uint64_t serial) {
  Fate fate;
  fate.gpu_delay_us = settings().gpu_delay_us.load();
  fate.handler_delay_us = settings().handler_delay_us.load();
  apply_random_delays(serial, fate);
  apply_plans(queue, fate);
  return fate;
}

}  // namespace metalsim

using namespace metalsim;

int metalsim_plan_add(const metalsim_plan* plan) {
  Plans& all = plans();
  std::lock_guard guard(all.lock);
  if (all.list.size() >= kMostPlans) return -1;
  all.list.push_back({*plan});
  all.any.store(true, std::memory_order_release);
  return static_cast<int>(all.list.size() - 1);
}

void metalsim_plan_clear() {
  Plans& all = plans();
  std::lock_guard guard(all.lock);
  all.list.clear();
  all.any.store(false, std::memory_order_release);
}

void metalsim_plan_fail(uint64_t nth, int code, int persistent,
                        uint32_t handler_delay_us) {
  metalsim_plan plan{};
  plan.nth = nth;
  plan.code = code;
  plan.persistent = persistent;
  plan.handler_delay_us = handler_delay_us;
  metalsim_plan_clear();
  metalsim_plan_add(&plan);
}

uint64_t metalsim_plan_struck_here() { return t_planned_here; }

int metalsim_reset() {
  metalsim_plan_clear();
  settings().abandon_waits = true;
  metalsim_hold_handlers(0);
  metalsim_set_completion_by_queue(0);
  int idle = metalsim_wait_idle(100000);
  settings().abandon_waits = false;
  reset_settings();
  restore_removed_selectors();
  reset_log();
  reset_block_counts();
  return idle ? 0 : -1;
}

void metalsim_set_handler_delay_us(uint32_t us) {
  settings().handler_delay_us = us;
}

void metalsim_set_gpu_delay_us(uint32_t us) { settings().gpu_delay_us = us; }
void metalsim_set_pipeline_delay_us(uint32_t us) {
  settings().pipeline_delay_us = us;
}

void metalsim_set_random_delays(uint64_t seed, uint32_t max_gpu_us,
                                uint32_t max_handler_us) {
  settings().random_gpu_us = max_gpu_us;
  settings().random_handler_us = max_handler_us;
  settings().random_seed = seed;
}

void metalsim_set_gpu_wait_limit_us(uint64_t us) {
  settings().gpu_wait_limit_us = us;
}

void metalsim_set_fast(int fast) { settings().fast = fast != 0; }

void metalsim_set_inline(int run_inline) {
  settings().run_inline = run_inline != 0;
}

void metalsim_set_memory(int mode, uint64_t recommended, uint64_t ceiling) {
  settings().working_set = recommended;
  settings().ceiling = ceiling;
  settings().memory_mode = mode;
}

uint64_t metalsim_resident_bytes() { return resident_bytes().load(); }

void metalsim_set_rootless(int rootless) {
  settings().rootless = rootless != 0;
}

void metalsim_set_no_device(int no_device) {
  settings().no_device = no_device != 0;
}

void metalsim_set_family(int family) {
  settings().family = family == 0 ? 0 : 1;
}

void metalsim_set_debug_layer(int layers) { settings().debug_layers = layers; }
