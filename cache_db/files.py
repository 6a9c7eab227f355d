"""Where the database is, and how a file is opened without changing it.

A file is only ever opened through SQLite: closing any other descriptor of it would drop the locks that this process's
own connections hold on it.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from autofuse.cache_db.faults import ELSEWHERE, explain_os_error, explain_sqlite_error, fault

__all__ = [
    "BUSY_TIMEOUT_S",
    "beside",
    "check_readable",
    "check_writable",
    "connect",
    "default_path",
    "lower_paths",
    "permits",
    "read_untouched",
]

BUSY_TIMEOUT_S = 10.0
"""How long to wait for another process's write before giving up."""

_SHIPPED = Path(__file__).with_name("shipped.db")

_CALM_S = 0.01  # how long other processes take to make or remove the files beside the database
_FAILURES = 3  # a read that fails so often while nothing changes has failed
_SMALLEST_PAGE_BYTES = 512  # a SQLite file is whole pages

_logger = logging.getLogger("autofuse.cache_db")
_T = TypeVar("_T")


def default_path() -> Path:
    """``$AUTOFUSE_DB``, else ``$XDG_CACHE_HOME/autofuse/tuned.db``, else ``~/.cache/autofuse/tuned.db``.

    Raises DatabaseError where ``~`` stands for no folder.
    """
    if named := os.environ.get("AUTOFUSE_DB"):
        return _at_home(Path(named))
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # A relative XDG_CACHE_HOME is to be ignored, says the XDG Base Directory Specification.
    folder = Path(cache) if os.path.isabs(cache) else _at_home(Path("~/.cache"))
    return folder / "autofuse" / "tuned.db"


def lower_paths() -> tuple[Path, ...]:
    """The databases below a user's own, the upper ones first: those that ``AUTOFUSE_DB_PATH`` names, separated by
    colons, which a site shares and nobody writes; then the one that came with this installation, if one did.
    """
    named = os.environ.get("AUTOFUSE_DB_PATH", "").split(os.pathsep)
    return (*(_at_home(Path(name)) for name in named if name), *([_SHIPPED] if _SHIPPED.exists() else []))


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise fault(path, f"cannot be found: {path.parts[0]} is no user's home folder here", ELSEWHERE) from None


def check_readable(path: Path) -> None:
    """Raises AbsentDatabaseError, or DatabaseError where ``path`` is no file or may not be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise explain_os_error(path, error) from None
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise fault(path, "is a folder", "name a file in it")
    if not stat.S_ISREG(mode):
        raise fault(path, "is not a regular file", ELSEWHERE)
    if not permits(path, os.R_OK):
        raise fault(path, "cannot be read: permission denied", f"ask for permission or {ELSEWHERE}")
    if 0 < status.st_size < _SMALLEST_PAGE_BYTES:
        # SQLite may take such a file for an empty one and write over it.
        raise explain_sqlite_error(path, sqlite3.DatabaseError("file is not a database"))


def check_writable(path: Path) -> None:
    """Raises DatabaseError where ``path``, if there, or its folder, which holds the log as well, may not be written."""
    for place in (path, path.parent):
        if place.exists() and not permits(place, os.W_OK):
            raise explain_sqlite_error(path, sqlite3.OperationalError("attempt to write a readonly database"))


def permits(path: Path, mode: int) -> bool:
    """``os.access`` for the user that this process acts as."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def connect(
    path: Path, mode: Literal["ro", "rw", "rwc"], timeout_s: float, *, immutable: bool = False
) -> sqlite3.Connection:
    """Opens ``path``; each statement commits at once unless a transaction was begun."""
    uri = f"{path.absolute().as_uri()}?mode={mode}{'&immutable=1' if immutable else ''}"
    return sqlite3.connect(uri, uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False)


def read_untouched(path: Path, read: Callable[[sqlite3.Connection], _T], timeout_s: float = BUSY_TIMEOUT_S) -> _T:
    """``read`` of a connection to ``path`` that sees every commit, yet changes nothing and leaves no file behind.

    An ordinary read-only connection to a database in WAL mode makes the log and its index where they are missing, and
    cannot be opened at all in a read-only folder. Hence: where no log is, the file alone is the database and is read
    as immutable; where a log stays without an index, or a journal that a killed process left, nobody has the database
    open, and a copy of both is read. Either is done again if the files changed meanwhile, since other processes come
    and go.

    Raises sqlite3.Error.
    """
    deadline = time.monotonic() + timeout_s
    failures = 0
    while True:
        before = _stamp(path)
        try:
            last = failures == _FAILURES - 1
            if (before.log and (last or not before.index)) or (before.journal and last):
                # Not at once: a process that opens the database makes the log first and its index next, and one that
                # still writes takes its journal away.
                time.sleep(_CALM_S)
                with _copied(path) as copy, closing(connect(copy, "rw", timeout_s)) as connection:
                    result = read(connection)
            else:
                # With a rollback journal, too, the file alone is not all, and SQLite's locks are needed.
                alone = not before.log and not before.journal
                with closing(connect(path, "ro", timeout_s, immutable=alone)) as connection:
                    result = read(connection)
                if not alone:
                    return result
            if _stamp(path) == before:
                return result
        except sqlite3.Error:
            failures = failures + 1 if _stamp(path) == before else 0
            if failures == _FAILURES or time.monotonic() > deadline:
                raise
        _logger.debug("%s is changing; reading it again", path)
        time.sleep(_CALM_S)


@contextmanager
def _copied(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="autofuse-db-") as folder:
        copy = Path(folder) / "copy.db"
        try:
            shutil.copyfile(path, copy)
            for suffix in ("-wal", "-journal"):
                if beside(path, suffix).exists():
                    shutil.copyfile(beside(path, suffix), beside(copy, suffix))
        except OSError as error:
            raise sqlite3.OperationalError(f"unable to open database file: {error.strerror}") from error
        yield copy


def beside(path: Path, suffix: str) -> Path:
    """The file that SQLite keeps beside a database: its log, the log's index, or its journal."""
    # SQLite follows a symbolic link and keeps its log beside the file itself.
    return Path(f"{os.path.realpath(path)}{suffix}")


@dataclass(frozen=True)
class _Stamp:
    """What tells that a database changed: its file's identity, size and time, and which files are beside it."""

    file: tuple[int, ...]
    log: bool
    index: bool
    journal: bool


def _stamp(path: Path) -> _Stamp:
    file: tuple[int, ...] = ()
    with suppress(OSError):
        status = path.stat()
        file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    real = os.path.realpath(path)
    return _Stamp(file, *(os.path.exists(f"{real}{suffix}") for suffix in ("-wal", "-shm", "-journal")))
