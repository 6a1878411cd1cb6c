#include "breadcrumbs.h"

#include "async_system.h"

namespace mlx_safe {
namespace {

constinit Breadcrumbs g_breadcrumbs;
constinit CommandBuffers g_command_buffers;

}  // namespace

Breadcrumbs& breadcrumbs() noexcept { return g_breadcrumbs; }

CommandBuffers& command_buffers() noexcept { return g_command_buffers; }

void breadcrumb(const char* kind, const char* text,
                const char* fields) noexcept {
  Breadcrumb crumb;
  crumb.time_ns = now_ns();
  crumb.thread = remembered_thread_id();
  copy_text(crumb.kind, sizeof crumb.kind, kind);
  copy_text(crumb.text, sizeof crumb.text, text);
  copy_text(crumb.fields, sizeof crumb.fields, fields);
  g_breadcrumbs.store(g_breadcrumbs.claim(), crumb);
}

}  // namespace mlx_safe
