"""Breadcrumbs of four threads at a time."""

import threading

import mlx_safe
from mlx_safe import _reports


def leave(name):
    for i in range(1000):
        mlx_safe.breadcrumb(f"{name}", i=i)


threads = [threading.Thread(target=leave, args=(n,)) for n in range(4)]
for t in threads:
    t.start()
for t in threads:
    t.join()
_reports.write("fault", "")
