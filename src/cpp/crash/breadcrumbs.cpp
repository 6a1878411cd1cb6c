#include "crash/breadcrumbs.h"

#include "crash/async_system.h"

namespace mlx_safe {
namespace {

constinit Breadcrumbs g_breadcrumbs;
constinit CommandBuffers g_command_buffers;

}  // namespace

Breadcrumbs& breadcrumbs() noexcept { return g_breadcrumbs; }

CommandBuffers& command_buffers() noexcept { return g_command_buffers; }

void breadcrumb(const char* kind, const char* text, Fields& fields) noexcept {
  Breadcrumb& crumb = fields.crumb_;
  crumb.fields[fields.json_.used()] = '\0';
  crumb.time_ns = now_ns();
  crumb.thread = remembered_thread_id();
  copy_text(crumb.kind, sizeof crumb.kind, kind);
  copy_text(crumb.text, sizeof crumb.text, text);
  g_breadcrumbs.store(g_breadcrumbs.claim(), crumb);
}

void breadcrumb(const char* kind, const char* text) noexcept {
  Fields none;
  breadcrumb(kind, text, none);
}

}  // namespace mlx_safe
