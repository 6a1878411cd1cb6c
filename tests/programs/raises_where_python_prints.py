"""An exception of a destructor, and one that ends the main thread; the log is JSON."""

from mlx_safe.server import logs


class Fails:
    def __del__(self):
        raise ValueError("xylophone-manatee")


logs.set_up("INFO", "json")
Fails()
raise LookupError("xylophone-manatee")
