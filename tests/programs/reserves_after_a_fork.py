"""The room for a report, of a process and of its forked child."""

import os

import mlx_safe

mlx_safe.install(signals=True)
mlx_safe.breadcrumb("about to die", attempt=1)


def reserves():
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
            found += [(name, os.fstat(int(fd)))] if ".reserve-" in name else []
        except OSError:
            pass  # that of the listing itself
    return found


pid = os.fork()
((name, held),) = reserves()
assert f"/.reserve-{os.getpid()} " in name and held.st_size >= 1 << 17, (name, held)
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
