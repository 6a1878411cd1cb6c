"""An exception of a destructor, and one that ends the main thread; the log is JSON."""

from mlx_safe.server import logs

# Not in a line of the source, which Python 3.13 shows of a program of `-c`, too.
SAID = "-".join(("xylophone", "manatee"))


class Fails:
    def __del__(self):
        raise ValueError(SAID)


logs.set_up("INFO", "json")
Fails()
raise LookupError(SAID)
