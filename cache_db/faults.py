"""What can be wrong with a database file, each in one line: which file, what is wrong, what to do."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from autofuse.errors import DatabaseError

__all__ = [
    "ELSEWHERE",
    "RESTORE",
    "AbsentDatabaseError",
    "DamagedDatabaseError",
    "explain_os_error",
    "explain_sqlite_error",
    "fault",
]


class AbsentDatabaseError(DatabaseError):
    """There is no file at the path that was to be read."""


class DamagedDatabaseError(DatabaseError):
    """A file that may hold rows which can still be saved."""


ELSEWHERE = "set AUTOFUSE_DB to another file"
RESTORE = f"`autofuse doctor --repair` saves what can be read, or restore it from an export, or {ELSEWHERE}"

_NOT_OURS = f"move it away or {ELSEWHERE}; if it was one, `autofuse doctor --repair` saves what can be read"

# SQLite's own texts for its result codes, which are part of its interface; Python 3.10 hands on nothing else.
_SQLITE_FAULTS: tuple[tuple[str, str, str], ...] = (
    ("file is not a database", "is not a SQLite database", _NOT_OURS),
    ("malformed", "is damaged or cut short", RESTORE),
    ("locked", "is locked by another process", "try again when that has finished"),
    (
        "readonly database",
        "cannot be written: the file, its folder or the file system is read-only",
        f"make it writable or {ELSEWHERE}",
    ),
    (
        "database or disk is full",
        "cannot be written: the disk is full",
        "free some space and run again; everything recorded before is kept",
    ),
    (
        "unable to open database file",
        "cannot be opened",
        f"check that the file and its folder permit it, or {ELSEWHERE}",
    ),
    ("disk I/O error", "cannot be read or written: the disk reports an error", f"check the disk or {ELSEWHERE}"),
    ("no such table", "lacks a table of autofuse", RESTORE),
    ("no such column", "lacks a column of autofuse", RESTORE),
    ("has no column", "lacks a column of autofuse", RESTORE),
    (
        "FOREIGN KEY constraint failed",
        "does not hold the provenance that a new row names",
        "call record_provenance on this database first",
    ),
)


def fault(path: Path, what: str, remedy: str) -> DatabaseError:
    """``what`` continues "database <path> …"; ``remedy`` says what to do."""
    kind = DamagedDatabaseError if remedy in (RESTORE, _NOT_OURS) else DatabaseError
    return kind(f"database {path} {what}; {remedy}")


def explain_sqlite_error(path: Path, error: sqlite3.Error | UnicodeDecodeError) -> DatabaseError:
    text = "malformed" if isinstance(error, UnicodeDecodeError) else str(error)
    for fragment, what, remedy in _SQLITE_FAULTS:
        if fragment in text:
            return fault(path, what, remedy)
    return fault(path, f"cannot be used: {text}", f"check the file or {ELSEWHERE}")


def explain_os_error(path: Path, error: OSError) -> DatabaseError:
    """For errors of the file system before SQLite is asked."""
    if isinstance(error, FileNotFoundError):
        return AbsentDatabaseError(f"database {path} does not exist; run `autofuse tune` to make it, or {ELSEWHERE}")
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError):
        return fault(path, f"cannot be reached: {reason}", f"ask for permission or {ELSEWHERE}")
    return fault(path, f"cannot be used: {reason}", ELSEWHERE)
