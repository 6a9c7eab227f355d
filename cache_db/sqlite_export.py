"""An export as a SQLite file with the database's own schema."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from autofuse.cache_db.faults import explain_sqlite_error
from autofuse.cache_db.files import BUSY_TIMEOUT_S, check_readable, connect, read_untouched
from autofuse.cache_db.foreign import LONGEST_TEXT, check_measured, check_objects, check_text
from autofuse.cache_db.lines import Content, malformed
from autofuse.cache_db.records import Baseline, Trial, Winner
from autofuse.cache_db.rows import KEY_OF, TABLE_OF, from_row
from autofuse.cache_db.schema import check_known, columns_in, objects
from autofuse.cache_db.store import TunedDatabase, provenance_id
from autofuse.errors import BadInput, DatabaseError

__all__ = ["read_sqlite", "write_sqlite"]

MeasuredT = TypeVar("MeasuredT", Trial, Baseline, Winner)

_LONGEST_READ_S = 60.0
_STEPS = 10_000  # of SQLite's machine between two looks at the clock


def write_sqlite(content: Content, path: Path) -> None:
    """Writes a new file; equal content gives equal bytes. Raises DatabaseError."""
    with TunedDatabase(path) as database, database.transaction():
        for known in content.provenance.values():
            database.record_provenance(known)
        for record in content.records:
            database.record(replace(record, standing="own"))  # what it is here says nothing there
    try:
        with closing(connect(path, "rw", BUSY_TIMEOUT_S)) as connection:
            # An export is one file, whole without a log beside it; when its tables were made is not its content.
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("UPDATE _sqlite_migrations SET applied_at = ''")
            connection.execute("VACUUM")
    except sqlite3.Error as error:
        raise explain_sqlite_error(path, error) from error


def read_sqlite(path: Path) -> Content:
    """Reads and checks every row of a database or an export, of this schema or an older one, changing nothing.

    Raises BadInput, DatabaseError.
    """
    check_readable(path)
    deadline = time.monotonic() + _LONGEST_READ_S
    try:
        return read_untouched(path, lambda connection: _read(connection, path, deadline))
    except sqlite3.Error as error:
        raise DatabaseError(f"cannot import: {explain_sqlite_error(path, error)}") from error
    except DatabaseError as error:
        raise DatabaseError(f"cannot import: {error}") from error
    except (BadInput, ValueError, TypeError, RecursionError) as error:
        raise malformed(str(path), error) from None


def _read(connection: sqlite3.Connection, path: Path, deadline: float) -> Content:
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.set_progress_handler(_until(deadline), _STEPS)
    check_objects(connection, objects())
    check_known(connection, path)
    content = Content()
    content.records += _records(connection, Trial)
    content.records += _records(connection, Baseline)
    content.records += _records(connection, Winner)
    _check_lengths(connection, "provenance", ["fields"])
    for id in sorted({record.provenance for record in content.records} - {""}):
        content.provenance[id] = _provenance(connection, id)
    return content


def _records(connection: sqlite3.Connection, kind: type[MeasuredT]) -> list[MeasuredT]:
    table = TABLE_OF[kind]
    present = set(columns_in(connection, table))
    names = [field.name for field in fields(kind) if field.name in present]
    _check_lengths(connection, table, sorted(present))
    where = "WHERE standing <> 'candidate'" if "standing" in present else ""
    records: list[MeasuredT] = []
    query = f"SELECT {', '.join(names)} FROM {table} {where} ORDER BY {', '.join(KEY_OF[kind])}"
    for values in connection.execute(query):
        check_text(values)
        row = {**dict(zip(names, values, strict=True)), "standing": "candidate"}
        record = from_row(kind, row)
        check_measured(record)
        records.append(record)
    return records


def _provenance(connection: sqlite3.Connection, id: str) -> dict[str, str | int | float | None]:
    found = connection.execute("SELECT fields FROM provenance WHERE id = ?", [id]).fetchone()
    if found is None:
        raise BadInput(f"a row names the provenance {id!r}, which the file does not hold")
    known = json.loads(found[0])
    if not isinstance(known, dict) or provenance_id(known) != id:
        raise BadInput(f"provenance {id!r} is not the id of its fields")
    check_text([*known, *known.values()])
    return known


def _check_lengths(connection: sqlite3.Connection, table: str, columns: list[str]) -> None:
    """Before a value is read: SQLite knows its length without reading all of it."""
    longest = ", ".join(f"coalesce(max(length({name})), 0)" for name in columns)
    for name, length in zip(columns, connection.execute(f"SELECT {longest} FROM {table}").fetchone(), strict=True):
        if length > LONGEST_TEXT:
            raise BadInput(f"a {table}.{name} of {length} characters is longer than any that autofuse writes")


def _until(deadline: float) -> Callable[[], int]:
    return lambda: int(time.monotonic() > deadline)  # a number above 0 interrupts the statement
