"""Five faults, of which the first is reported."""

import time

import mlx_safe
from mlx_safe import _reports, testing

_reports.FAULT_REPORT_EVERY_S *= 1000  # however slow this machine is
for _ in range(5):
    testing.record_fault(2)
deadline = time.monotonic() + 200
while True:
    status = mlx_safe.status()
    if status.reports_written + status.reports_suppressed == 5:
        break
    assert time.monotonic() < deadline, status.as_dict()
    time.sleep(0.01)
assert (status.reports_written, status.reports_suppressed) == (1, 4)
