"""In place of the package, which asks macOS's Security framework: nothing uses TLS."""

from ssl import SSLContext

__all__ = ["SSLContext"]
