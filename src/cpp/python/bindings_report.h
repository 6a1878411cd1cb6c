// Breadcrumbs, reports and signals, as Python sees them.
#pragma once

#include <nanobind/nanobind.h>

namespace mlx_safe {

// Breadcrumbs, reports, the run file and signals, as Python sees them.
void bind_reports(nanobind::module_& m);

}  // namespace mlx_safe
