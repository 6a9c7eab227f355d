"""How the database is opened: looked at first, and only then made, brought up to date, or written to."""

from __future__ import annotations

import logging
import sqlite3
import time
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
