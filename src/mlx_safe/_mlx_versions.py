"""What each version of MLX does with a failed command buffer: the one table.

`install` chooses the regime by it, `status` and ``mlx-safe doctor`` say it, and
docs/metal.md prints it (a test compares). How it is known: MLX's sources, its host
code on the simulated Metal (tests/metalsim), and its released macOS libraries, read
(tests/contract) and executed (tests/machrun).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Raises = Literal["handler", "nothing", "wait"]

__all__ = ["VERSIONS", "Behaviour", "behaviour_of", "parse_version", "table"]


class Behaviour:
    """One row: facts, immutable by convention.

    Attributes:
        since: the first version, three numbers. Each row ends where the next begins.
        raises: where a failed command buffer surfaces without us. ``"handler"``: in
            Metal's completion handler, which ends the process. ``"nothing"``: it may
            be lost. ``"wait"``: in a later wait or encoding, not always the right one.
        can_hang: whether an evaluation over two GPU streams and the CPU may wait for
            ever without us.
        note: the same in one line, with what changes under the hooks.
    """

    __slots__ = ("can_hang", "note", "raises", "since")

    def __init__(
        self,
        since: tuple[int, int, int],
        raises: Raises,
        note: str,
        *,
        can_hang: bool = False,
    ) -> None:
        self.since = since
        self.raises: Raises = raises
        self.can_hang = can_hang
        self.note = note

    @property
    def regime(self) -> Literal["intercept", "observe"]:
        """How the hooks treat it."""
        return "intercept" if self.raises == "handler" else "observe"


VERSIONS = (
    Behaviour(
        (0, 0, 0),
        "handler",
        "a fault ends the process; the hooks make it an exception",
    ),
    Behaviour(
        (0, 32, 0),
        "nothing",
        "MLX loses faults: mx.eval may return with zeros and raise nothing. "
        "mlx_safe.guard() and epoch() notice. A fault that the CPU's stream waits for "
        "ends the process, with the hooks, too. 0.32.4 raises faults",
    ),
    Behaviour(
        (0, 32, 1),
        "wait",
        "after a fault an evaluation over two GPU streams and the CPU can wait for "
        "ever. The hooks end the wait after 1 to 2 s, at most about 10 s. With 0.32.4 "
        "there is no such wait",
        can_hang=True,
    ),
    Behaviour(
        (0, 32, 4),
        "wait",
        "MLX raises the fault, sometimes in a later evaluation; mlx_safe.guard() "
        "raises it in the right one",
    ),
)
# The newest that was looked at: of later ones nothing is known.
NEWEST = (0, 32, 4)
_UNKNOWN = "newer than 0.32.4, the newest that was looked at: taken to be like it"


def parse_version(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.32.0.dev1 is (0, 32, 0)."""
    numbers = []
    for part in version.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    return tuple(numbers)


def behaviour_of(version: str | None) -> Behaviour:
    """The row of a version; of None, and of a newer one, the last."""
    if version is None:
        return VERSIONS[-1]
    numbers = parse_version(version)
    return next((x for x in reversed(VERSIONS) if numbers >= x.since), VERSIONS[0])


def notes_of(version: str | None) -> tuple[str, ...]:
    """What to know of a version, a line each; None: no mlx."""
    if version is None:
        return ()
    notes = [f"MLX {version}: {behaviour_of(version).note}"]
    if parse_version(version) > NEWEST:
        notes.append(f"MLX {version} is {_UNKNOWN}")
    return tuple(notes)


def table() -> str:
    """The table of docs/metal.md, in Markdown."""
    lines = [
        "| MLX | regime | a fault surfaces in | can hang | what to know |",
        "|---|---|---|---|---|",
    ]
    surfaces = {"handler": "the handler", "nothing": "nothing", "wait": "a later wait"}
    for row, following in zip(VERSIONS, (*VERSIONS[1:], None), strict=True):
        hang = "yes" if row.can_hang else "no"
        cells = (_range(row, following), row.regime, surfaces[row.raises], hang)
        lines.append(f"| {' | '.join((*cells, row.note))} |")
    return "\n".join(lines)


def _range(row: Behaviour, following: Behaviour | None) -> str:
    """Which versions a row is for, as people say it."""
    since = ".".join(map(str, row.since))
    if following is None:
        return f"{since} and later"
    until = ".".join(map(str, following.since))
    return f"before {until}" if row is VERSIONS[0] else f"{since}, before {until}"
