"""Looks for its run file in a forked child and at the very end."""

import atexit
import os


def late():
    _reports.refresh_run_file()
    assert os.listdir(d) == [], os.listdir(d)
    print("late")


atexit.register(late)  # before ours, so it runs after it
import mlx_safe
from mlx_safe import _reports

_reports.RUN_FILE_EVERY_S = 0.0
d = mlx_safe.status().report_dir
(own,) = os.listdir(d)
pid = os.fork()
with mlx_safe.guard():
    pass
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert os.listdir(d) == [own], os.listdir(d)
