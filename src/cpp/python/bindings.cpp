// The Python face of the native core: no logic here.
#include <dlfcn.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <string>

#include "crash/fault_log.h"
#include "crash/report.h"
#include "crash/report_context.h"
#include "crash/terminate.h"
#include "metal/hooks.h"
#include "python/bindings_report.h"
#include "python/triggers.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mlx_safe;

namespace {

nb::str lossy(const char* text) {
  // Cut or foreign bytes must not make the reading of a fault fail.
  PyObject* s = PyUnicode_DecodeUTF8(
      text, static_cast<Py_ssize_t>(std::strlen(text)), "replace");
  if (s == nullptr) throw nb::python_error();
  return nb::steal<nb::str>(s);
}

// A dict of the record; None: it is gone; False: not yet written.
nb::object read_fault(std::uint64_t number) {
  FaultRecord fault;
  switch (fault_log().read(number, &fault)) {
    case ReadResult::kPending:
      return nb::bool_(false);
    case ReadResult::kLost:
      return nb::none();
    case ReadResult::kOk:
      break;
  }
  nb::dict d;
  d["number"] = fault.number;
  d["code"] = fault.code;
  d["message"] = lossy(fault.message);
  d["source"] = fault.source;
  d["time_ns"] = fault.time_ns;
  d["thread"] = fault.thread;
  d["buffer"] = fault.buffer;
  d["queue"] = fault.queue;
  d["label"] = lossy(fault.label);
  d["gpu_start_s"] = fault.gpu_start_s;
  d["gpu_end_s"] = fault.gpu_end_s;
  return d;
}

void install_terminate(bool drain, double drain_seconds) {
  TerminateOptions options;
  options.policy = drain ? TerminatePolicy::kDrain : TerminatePolicy::kReport;
  options.drain_seconds = drain_seconds;
  // PyGILState_Check is not in the stable ABI, so it cannot be linked.
  options.holds_gil =
      reinterpret_cast<int (*)()>(::dlsym(RTLD_DEFAULT, "PyGILState_Check"));
  options.release_gil = [] { return static_cast<void*>(PyEval_SaveThread()); };
  terminate_install(options);
}

nb::dict metal_status_dict(const metal::HookStatus& found) {
  nb::dict d;
  d["active"] = found.active;
  d["verified"] = found.verified;
  d["runtime"] = found.runtime.empty() ? nb::object(nb::none())
                                       : nb::object(nb::cast(found.runtime));
  d["hooked"] = nb::cast(found.hooked);
  d["reasons"] = nb::cast(found.reasons);
  return d;
}

nb::dict metal_install(bool intercept) {
  metal::HookStatus found;
  {
    // A wait of the verification must not hold up other Python threads.
    nb::gil_scoped_release release;
    found = metal::install(intercept ? metal::Mode::kIntercept
                                     : metal::Mode::kObserve);
  }
  return metal_status_dict(found);
}

nb::dict metal_counters() {
  metal::HookCounters c = metal::counters();
  nb::dict d;
  d["buffers"] = c.buffers;
  d["completed"] = c.completed;
  d["failed"] = c.failed;
  d["swallowed"] = c.swallowed;
  d["thrown"] = c.thrown;
  d["gate_limit"] = c.gate_limit;
  d["buffer_records"] = c.buffer_records;
  d["event_records"] = c.event_records;
  return d;
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "The native core of mlx_safe. An implementation detail.";
  nb::set_leak_warnings(false);  // module-level objects outlive the interpreter

  m.def("epoch", [] { return fault_log().epoch(); });
  m.def("dropped", [] { return fault_log().dropped(); });
  m.def("read_fault", &read_fault, "number"_a);
  m.def("notify_fd", [] { return fault_log().notify_fd(); });
  m.def("drain_notifications", [] { fault_log().drain_notifications(); });
  m.def(
      "code_in_message",
      [](const std::string& text) { return code_in_message(text.c_str()); },
      "message"_a);

  m.def("terminate_install", &install_terminate, "drain"_a, "drain_seconds"_a);
  m.def("terminate_uninstall", &terminate_uninstall);
  m.def("terminate_installed", &terminate_installed);
  m.def("terminate_reached", &terminate_reached);
  m.def("terminate_drainers", &terminate_drainers, "more"_a);
  m.def("terminate_reported", &terminate_reported,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("terminate_drained", &terminate_drained,
        nb::call_guard<nb::gil_scoped_release>());

  m.def("metal_install", &metal_install, "intercept"_a);
  m.def("metal_uninstall", &metal::uninstall,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("metal_status", [] { return metal_status_dict(metal::status()); });
  m.def("metal_counters", &metal_counters);
  m.def("metal_wait_for_skipped", &metal::wait_for_skipped,
        nb::call_guard<nb::gil_scoped_release>());

  m.def("after_fork_in_child", [] {
    metal::after_fork_in_child();
    fault_log().after_fork_in_child();
    terminate_after_fork_in_child();
    report_context_after_fork_in_child();
    report_after_fork_in_child();
  });

  bind_reports(m);

  m.def("testing_record_fault", &testing_record_fault, "code"_a, "message"_a,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("testing_throw_on_foreign_thread", &testing_throw_on_foreign_thread,
        "message"_a);
  m.def("testing_run_command_buffer", &testing_run_command_buffer,
        nb::call_guard<nb::gil_scoped_release>());
}
