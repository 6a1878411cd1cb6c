#include "python/bindings_report.h"

#include <cxxabi.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <signal.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include "crash/breadcrumbs.h"
#include "crash/report.h"
#include "crash/report_context.h"
#include "crash/signals.h"
#include "python/system_memory.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mlx_safe {
namespace {

constexpr int kDepthMax = 8;

// The object's text, valid as long as it is; null when it has none in UTF-8.
const char* utf8(nb::handle text) {
  const char* found = PyUnicode_AsUTF8AndSize(text.ptr(), nullptr);
  if (found == nullptr) PyErr_Clear();
  return found;
}

void render_float(JsonWriter& json, double value) {
  char* text = PyOS_double_to_string(value, 'r', 0, Py_DTSF_ADD_DOT_0, nullptr);
  if (text == nullptr) PyErr_Clear();
  bool finite = value - value == 0;
  json.json(finite ? text : nullptr);
  PyMem_Free(text);
}

void render_integer(JsonWriter& json, nb::handle value) {
  int overflow = 0;
  long long number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow != 0) return json.text("<int of over 64 bits>");
  json.integer(number);
}

// What is none of JSON's types becomes the name of its type: a report must not
// call into the program's objects.
void render(JsonWriter& json, nb::handle value, int depth = 0) {
  if (value.is_none()) return json.json(nullptr);
  if (PyBool_Check(value.ptr())) return json.boolean(value.ptr() == Py_True);
  if (PyLong_Check(value.ptr())) return render_integer(json, value);
  if (PyFloat_Check(value.ptr()))
    return render_float(json, PyFloat_AsDouble(value.ptr()));
  if (PyUnicode_Check(value.ptr())) return json.text(utf8(value));
  if (depth < kDepthMax && PyDict_Check(value.ptr())) {
    json.begin_object();
    for (auto [key, member] : nb::borrow<nb::dict>(value)) {
      const char* name = PyUnicode_Check(key.ptr()) ? utf8(key) : nullptr;
      if (name == nullptr) continue;
      json.key(name);
      render(json, member, depth + 1);
    }
    return json.end_object();
  }
  if (depth < kDepthMax &&
      (PyList_Check(value.ptr()) || PyTuple_Check(value.ptr()))) {
    json.begin_array();
    for (nb::handle member : nb::borrow<nb::sequence>(value)) {
      json.item();
      render(json, member, depth + 1);
    }
    return json.end_array();
  }
  nb::str name = nb::inst_name(value);
  json.text(utf8(name));
}

// As `utf8`, but what is not UTF-8 (names of files, say) becomes "?". `held` is
// what the text belongs to then.
const char* utf8_or_similar(nb::str text, nb::object& held) {
  if (const char* found = utf8(text)) return found;
  held = nb::steal(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "replace"));
  if (!held.is_valid()) nb::raise_python_error();
  return PyBytes_AsString(held.ptr());
}

void record_breadcrumb(const char* kind, nb::str said, nb::dict values) {
  nb::object held;
  const char* text = utf8_or_similar(said, held);
  if (values.size() == 0) return breadcrumb(kind, text);
  Fields fields;
  for (auto [key, value] : values) {
    const char* name = utf8(key);
    if (name == nullptr) continue;
    fields.add(name, [&](JsonWriter& json) { render(json, value, kDepthMax); });
  }
  breadcrumb(kind, text, fields);
}

// False: too long.
bool set_context(nb::dict context) {
  constexpr std::size_t kCapacity = 32 * 1024;
  auto text = std::make_unique<char[]>(kCapacity);
  JsonWriter json(text.get(), kCapacity - 1);
  render(json, context);
  if (!json.flush()) return false;
  text[json.used()] = '\0';
  return set_report_context(text.get());
}

void (*g_faulthandler)(int) = nullptr;

// Python's stacks in the crash path are written by faulthandler. The function
// that does it (_Py_DumpTracebackThreads) is exported by CPython 3.11 and 3.12
// only. But `faulthandler.register` is public: it puts a signal handler in
// place that writes all stacks to a descriptor. The handler is taken from there
// and called directly; the signal itself gets back what it had. SIGURG, since
// it is ignored by default should one arrive between the two.
void adopt_faulthandler(int fd) {
  struct sigaction before, found;
  if (fd < 0 || ::sigaction(SIGURG, nullptr, &before) != 0) return;
  nb::module_::import_("faulthandler")
      .attr("register")(SIGURG, "file"_a = fd, "all_threads"_a = true,
                        "chain"_a = false);
  ::sigaction(SIGURG, &before, &found);
  // At a second time faulthandler has only noted the descriptor.
  if (g_faulthandler == nullptr && found.sa_handler != before.sa_handler)
    g_faulthandler = found.sa_handler;
  // What it keeps is freed at Python's end; the process ends somewhat later.
  static const bool is_registered =
      Py_AtExit([] { report_set_python_stacks(nullptr); }) == 0;
  if (g_faulthandler != nullptr && is_registered)
    report_set_python_stacks([] { g_faulthandler(SIGURG); });
}

// Paths are bytes: not all of them are text.
void prepare(std::optional<nb::bytes> directory, nb::bytes argv0) {
  adopt_faulthandler(
      report_prepare(directory ? directory->c_str() : nullptr, argv0.c_str()));
}

// The path of the report; None when it could not be written.
std::optional<nb::bytes> write(const std::string& why, nb::str said,
                               std::optional<int> code,
                               const std::string& python_stacks) {
  nb::object held;
  Event event;
  event.why = why.c_str();
  event.exception_message = utf8_or_similar(said, held);
  event.has_code = code.has_value();
  event.code = code.value_or(-1);
  event.python_stacks = python_stacks.c_str();
  char path[2048];
  bool good;
  {
    nb::gil_scoped_release release;
    good = write_report(event, path, sizeof path);
  }
  if (!good) return std::nullopt;
  return nb::bytes(path);
}

// A name of C++ (Itanium ABI) as it is written; None: it is no such name. For
// readers of reports: it allocates.
std::optional<std::string> demangle(const std::string& name) {
  int status = 0;
  std::unique_ptr<char, decltype(&std::free)> found(
      abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), &std::free);
  if (status != 0 || !found) return std::nullopt;
  return found.get();
}

void bind_recording(nb::module_& m) {
  m.def("breadcrumb", &record_breadcrumb, "kind"_a, "text"_a, "fields"_a);
  m.def("set_report_context", &set_context, "context"_a);
  m.def(
      "sample_memory",
      [](std::int64_t active, std::int64_t peak, std::int64_t cache,
         std::int64_t ceiling) {
        SystemMemory found = read_system_memory();
        sample_memory({0, active, peak, cache, found.footprint, ceiling,
                       found.total, found.available});
      },
      "active"_a, "peak"_a, "cache"_a, "ceiling"_a);
  m.def("system_memory", [] {
    SystemMemory found = read_system_memory();
    return nb::make_tuple(found.footprint, found.total, found.available);
  });
  m.def("request_begin", &request_begin, "id"_a, "path"_a);
  m.def("request_progress", &request_progress, "place"_a, "prompt_tokens"_a,
        "prefilled"_a, "tokens"_a);
  m.def("request_end", &request_end, "place"_a);
}

}  // namespace

void bind_reports(nb::module_& m) {
  bind_recording(m);
  m.def("report_directory_max", [] { return kDirectoryMax; });
  m.def("report_prepare", &prepare, "directory"_a.none(), "argv0"_a);
  m.def("report_stop", &report_stop);
  m.def("write_report", &write, "why"_a, "message"_a, "code"_a.none(),
        "python_stacks"_a);
  m.def("write_run_file", &write_run_file,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("remove_run_file", &remove_run_file);
  m.def("report_counts", [] {
    ReportCounts counts = report_counts();
    return nb::make_tuple(counts.written, counts.failed);
  });
  m.def("demangle", &demangle, "name"_a);
  m.def("signals_install", &signals_install);
  m.def("signals_uninstall", &signals_uninstall);
  m.def("signals_installed", &signals_installed);
  m.def("signals_cover_this_thread", &signals_cover_this_thread);
  m.def("signal_is_default", &signal_is_default, "number"_a);
  nb::class_<KeptSignals>(m, "KeptSignals")
      .def(nb::init<>())
      .def("put_back", &KeptSignals::put_back);
  m.def("stop_install", &stop_install, "number"_a);
  m.def("stop_uninstall", &stop_uninstall, "number"_a);
}

}  // namespace mlx_safe
