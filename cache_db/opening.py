"""How the database is opened: looked at first, and only then made, brought up to date, or written to."""

from __future__ import annotations

import filecmp
import logging
import os
import sqlite3
import time
from contextlib import closing
from itertools import count
from pathlib import Path

from sqlite_utils import Database

from autofuse.cache_db import schema
from autofuse.cache_db.faults import ELSEWHERE, fault
from autofuse.cache_db.files import check_readable, check_writable, connect, read_untouched

__all__ = ["open_copy", "open_file"]

_logger = logging.getLogger("autofuse.cache_db")

_WAL_RETRY_S = 0.02  # SQLite does not wait by itself while another process switches the log on


def open_copy(path: Path, timeout_s: float) -> Database:
    """The content of ``path`` in memory, brought up to date there; nothing in its folder is touched.

    Raises AbsentDatabaseError, DatabaseError, sqlite3.Error.
    """
    check_readable(path)

    def copy(source: sqlite3.Connection) -> sqlite3.Connection:
        _is_current(source, path)
        memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        source.backup(memory)
        return memory

    db = _database(read_untouched(path, copy, timeout_s))
    with db.atomic():
        schema.migrate(db, path)
    return db


def open_file(path: Path, timeout_s: float) -> Database:
    """``path`` for writing, made or brought up to date where need be, with its log on.

    Raises DatabaseError, sqlite3.Error; a file that is another program's, newer or damaged is left as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise fault(path, f"cannot be made: {error.strerror}: {error.filename}", ELSEWHERE) from None
    exists = path.exists()
    if exists:
        check_readable(path)
    check_writable(path)
    current = exists and read_untouched(path, lambda connection: _is_sound(connection, path), timeout_s)
    db = _database(connect(path, "rw" if exists else "rwc", timeout_s))
    try:
        db.execute("PRAGMA synchronous = NORMAL")
        if not current:
            _switch_log_on(db.conn, path, timeout_s)
            # The lock at once: another process may be making the tables just now.
            db.execute("BEGIN IMMEDIATE")
            if not _is_current(db.conn, path):
                if not schema.is_blank(db):
                    _back_up(db, path, timeout_s)
                schema.migrate(db, path)
            db.execute("COMMIT")
    except BaseException:
        db.close()  # which rolls back
        raise
    return db


def _database(connection: sqlite3.Connection) -> Database:
    return Database(connection, execute_plugins=False)


def _is_current(connection: sqlite3.Connection, path: Path) -> bool:
    db = _database(connection)
    return not schema.is_blank(db) and schema.is_current(db, path)


def _is_sound(connection: sqlite3.Connection, path: Path) -> bool:
    current = _is_current(connection, path)
    damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise sqlite3.DatabaseError(f"database disk image is malformed: {damage}")
    return current


def _back_up(db: Database, path: Path, timeout_s: float) -> None:
    """Copies a database that is about to be brought up to date to a file beside it, which it never overwrites.

    The caller holds the lock for writing: what is copied is what is changed. Raises DatabaseError.
    """
    temporary = path.with_name(f".{path.name}.backup.tmp")  # only who holds the lock uses it
    name = f"{path.name}.before-{schema.first_pending(db)}"
    try:
        temporary.unlink(missing_ok=True)
        with closing(connect(path, "ro", timeout_s)) as source, closing(sqlite3.connect(temporary)) as copy:
            source.backup(copy)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        for number in count(1):
            backup = path.with_name(name if number == 1 else f"{name}-{number}")
            if not os.path.lexists(backup):
                os.rename(temporary, backup)
                break
            if filecmp.cmp(temporary, backup, shallow=False):  # of an upgrade that did not come to its end
                temporary.unlink()
                break
    except OSError as error:
        raise fault(path, f"cannot be backed up before its upgrade: {error.strerror}", "make room beside it") from None
    _logger.info("%s is brought up to date; as it was it is kept in %s", path, backup)


def _switch_log_on(connection: sqlite3.Connection, path: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_WAL_RETRY_S)
            continue
        if mode != "wal":
            _logger.warning("%s: no write-ahead log on this file system; readers will wait for writers", path)
        return
