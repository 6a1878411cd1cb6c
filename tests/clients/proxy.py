"""HAProxy and nginx before two servers, with the settings of proxies/."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clients.stage import HERE
from support.server import Server, eventually, free_port

# Where Debian has nginx; only root looks there.
PATH = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin"
PROXIES = ("haproxy", "nginx")
# How often HAProxy looks after a server, and for how long nginx leaves one alone that
# has failed; docs/clients.md has longer ones.
CHECK_EVERY, DOWN_FOR = "500ms", "1s"
EXAMPLES = HERE.parent.parent / "examples"
# What a system's nginx has besides its own settings: a place for files.
NGINX_PLACES = """daemon off;
pid @DIRECTORY@/pid;
error_log stderr warn;
"""


def program(name: str) -> str | None:
    """Its path; None when it is not installed."""
    return shutil.which(name, path=PATH)


def with_places(example: str, name: str) -> str:
    """The settings of an example, whose ports and files are the tests'."""
    for place, key in (("8080", "@PORT@"), ("8081", "@ONE@"), ("8082", "@TWO@")):
        assert f"127.0.0.1:{place}" in example
        example = example.replace(f"127.0.0.1:{place}", f"127.0.0.1:{key}")
    if name == "nginx":
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path @DIRECTORY@/{kind};\n" for kind in kinds)
        example = example.replace("http {\n", f"http {{\naccess_log off;\n{paths}")
        example = NGINX_PLACES + example
    return example


class Proxy(Server):
    """A proxy in a process of its own, used as if it was a server.

    Args:
        name: one of `PROXIES`.
        servers: two of them; the second one is asked when the first one fails.
        example: the settings are those of examples/, where both are asked, but for
            ports and files.
    """

    def __init__(
        self, name: str, servers: Sequence[Server], *, example: bool = False
    ) -> None:
        self.port = free_port()
        self.headers, self.tls = {}, None
        self.checks = name == "haproxy"
        self._directory = tempfile.TemporaryDirectory(prefix="proxy")
        # Started as root, nginx has a user of its own for its work.
        Path(self._directory.name).chmod(0o711)
        settings_of = EXAMPLES if example else HERE / "proxies"
        template = next(settings_of.glob(f"{name}.*")).read_text()
        if example:
            template = with_places(template, name)
        for key, value in {
            "PORT": self.port,
            "ONE": servers[0].port,
            "TWO": servers[1].port,
            "CHECK": CHECK_EVERY,
            "DOWN": DOWN_FOR,
            "DIRECTORY": self._directory.name,
        }.items():
            template = template.replace(f"@{key}@", str(value))
        settings = Path(self._directory.name, "settings")
        settings.write_text(template)
        found = program(name)
        assert found, f"{name} is not installed"
        arguments = {
            "haproxy": ["-db", "-f", str(settings)],
            "nginx": ["-p", self._directory.name, "-c", str(settings)],
        }
        self.start([found, *arguments[name]])

    def stop(self) -> int:
        status = super().stop()
        with contextlib.suppress(OSError):
            self._directory.cleanup()
        return status

    def wait_ready(self) -> Proxy:
        self.wait_listening()
        assert eventually(lambda: self.get("/health").status == 200), self.log
        return self
