"""Turns on a device that several processes tune on: one runs there, while the others compile, search, or wait.

The turn is a lock of the system's on a file: a process that dies, however it dies, has let go of it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

__all__ = ["Turns"]


class Turns:
    """A process's part in them: a context manager around whatever runs on the device. May be entered again within.

    Args:
        path: the file that all who share the device open; None for a device of one's own.
        on_wait: called with True before this process waits for its turn, and with False once it has it.

    Attributes:
        waited_s: how long this process has waited for its turns, all in all.
    """

    def __init__(self, path: Path | None, on_wait: Callable[[bool], None] = lambda waits: None) -> None:
        self._file = None if path is None else path.open("a+", encoding="ascii")
        self._on_wait = on_wait
        self._depth = 0
        self.waited_s = 0.0
        if self._file is not None:
            self._file.write(f"{os.getpid()}\n")  # one write, at the end: none is lost
            self._file.flush()

    def __enter__(self) -> None:
        if self._depth == 0 and self._file is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._on_wait(True)
                begin = time.perf_counter()
                fcntl.flock(self._file, fcntl.LOCK_EX)
                self.waited_s += time.perf_counter() - begin
                self._on_wait(False)
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0 and self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    @property
    def shared(self) -> bool:
        """Whether there are others."""
        return self._file is not None

    def members(self) -> set[int]:
        """The processes that ever shared the device."""
        if self._file is None:
            return {os.getpid()}
        self._file.seek(0)
        return {int(line) for line in self._file.read().split()}
