"""Lines that say how far long work is."""

from __future__ import annotations

import sys
import time

__all__ = ["Progress"]

INTERVAL_S = 10.0


class Progress:
    """Says on standard error, every few seconds, how many of so many steps are done; nothing about short work."""

    def __init__(self, what: str, steps: int) -> None:
        self.what, self.steps, self.done = what, steps, 0
        self._begin = self._said = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        """So many more are done; none, to say only that the work goes on."""
        self.done += steps
        now = time.monotonic()
        if now - self._said >= INTERVAL_S:
            self._said = now
            print(f"  {self.what}: {self.done} of {self.steps}, {now - self._begin:.0f} s", file=sys.stderr, flush=True)
