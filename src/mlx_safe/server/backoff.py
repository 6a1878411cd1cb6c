"""Faults of the GPU in a row: wait longer before each try, then refuse new work."""

from __future__ import annotations

import time

__all__ = ["REFUSE_FOR_S", "Backoff"]

# In a row: without a token between them and not a minute apart. From here on wait
# before the next try, and from there on refuse new work for a while. Other failures do
# not count: a client can cause them at will.
BACK_OFF_AFTER = 2
BACK_OFF_MAX_S = 1.0
REFUSE_AFTER = 12
REFUSE_FOR_S = 10.0
IN_A_ROW_S = 60.0


class Backoff:
    """Counts them. Used by the generation thread only.

    Attributes:
        faults_in_a_row: how many there were.
    """

    def __init__(self) -> None:
        self.faults_in_a_row = 0
        self._tokens = -1
        self._last_at = 0.0

    def fault(self, tokens: int) -> bool:
        """There was one, after so many tokens in all; waits if it must.

        Returns True when new work must be refused for `REFUSE_FOR_S`.
        """
        now = time.monotonic()
        if tokens != self._tokens or now - self._last_at > IN_A_ROW_S:
            self.faults_in_a_row = 0
        self.faults_in_a_row += 1
        self._tokens, self._last_at = tokens, now
        beyond = self.faults_in_a_row - BACK_OFF_AFTER
        if beyond > 0:
            time.sleep(min(0.05 * 2**beyond, BACK_OFF_MAX_S))
        return self.faults_in_a_row >= REFUSE_AFTER

    @property
    def is_told(self) -> bool:
        """Whether the log says how many: at `REFUSE_AFTER`, then at twice as many.

        A card that always fails would fill it. `/metrics` counts them all.
        """
        times, rest = divmod(self.faults_in_a_row, REFUSE_AFTER)
        return not rest and times.bit_count() == 1
