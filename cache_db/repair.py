"""Saving what a damaged database still holds."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from autofuse.cache_db.faults import explain_os_error, fault
from autofuse.cache_db.files import beside, check_readable
from autofuse.cache_db.pages import SQLiteValue, leaf_rows, read_pages
from autofuse.cache_db.records import Captured, Winner
from autofuse.cache_db.rows import KINDS, TABLE_OF, Record, from_row, key_of
from autofuse.cache_db.schema import columns_of
from autofuse.cache_db.store import FormerWinner, Provenance, TunedDatabase, provenance_id
from autofuse.errors import BadInput

__all__ = ["RepairSummary", "repair"]


@dataclass(frozen=True)
class RepairSummary:
    """Where the salvaged rows are, and how many: table → rows."""

    path: Path
    salvaged: Mapping[str, int]


def repair(path: Path) -> RepairSummary:
    """Writes every row of ``path`` that is still whole into a new file beside it; ``path`` stays as it is.

    It reads the file's pages itself, so it works where SQLite refuses the file. Every row is checked as an imported
    one is; of two with one key the one measured later counts. A row whose provenance is lost is kept without it.

    Raises DatabaseError where nothing can be read or written.
    """
    check_readable(path)
    try:
        pages = read_pages(path, beside(path, "-wal"))
    except OSError as error:
        raise explain_os_error(path, error) from None
    held = _sorted_out(leaf_rows(pages))
    if not held.records:
        raise fault(path, "holds no row that can be read", "move it away and run `autofuse tune` again")
    destination = _free_name(path)
    with TunedDatabase(destination) as database, database.transaction():
        for known in held.provenance.values():
            database.record_provenance(known)
        for record in held.records.values():
            if not isinstance(record, Captured) and record.provenance not in held.provenance:
                record = replace(record, provenance="")
            database.record(record)
        for former in held.history:
            if former.winner.provenance not in held.provenance:
                former = replace(former, winner=replace(former.winner, provenance=""))
            database.record_former(former)
    counts = Counter(TABLE_OF[type(record)] for record in held.records.values())
    return RepairSummary(destination, {table: counts[table] for table in TABLE_OF.values()})


@dataclass
class _Held:
    provenance: dict[str, Provenance] = field(default_factory=dict)
    records: dict[tuple[object, ...], Record] = field(default_factory=dict)
    history: list[FormerWinner] = field(default_factory=list)


def _sorted_out(rows: Iterator[Sequence[SQLiteValue]]) -> _Held:
    held = _Held()
    for row in rows:
        if (found := _as_provenance(row)) is not None:
            held.provenance[provenance_id(found)] = found
        elif (former := _as_former(row)) is not None:
            held.history.append(former)
        elif (record := _as_record(row)) is not None:
            key = (type(record), *key_of(record).values())
            if key not in held.records or _time(held.records[key]) <= _time(record):
                held.records[key] = record
    return held


def _as_provenance(row: Sequence[SQLiteValue]) -> Provenance | None:
    columns = columns_of("provenance")
    if len(row) != len(columns):
        return None
    named = dict(zip(columns, row, strict=True))
    with suppress(ValueError, RecursionError, BadInput):
        found = json.loads(str(named["fields"]))
        if isinstance(found, dict) and provenance_id(found) == named["id"]:
            return found
    return None


def _as_record(row: Sequence[SQLiteValue]) -> Record | None:
    """The record that ``row`` is, of whichever kind: no row passes the checks of two."""
    for kind in KINDS:
        columns = columns_of(TABLE_OF[kind])
        # SQLite does not write the columns that a migration appended into the rows that were there before.
        appended = {"standing": "own"} if kind is not Captured else {}
        if len(row) in (len(columns), len(columns) - len(appended)):
            with suppress(BadInput, ValueError, TypeError):
                return from_row(kind, {**appended, **dict(zip(columns, row, strict=False))})
    return None


def _as_former(row: Sequence[SQLiteValue]) -> FormerWinner | None:
    columns = columns_of("history")
    if len(row) != len(columns):
        return None
    values = dict(zip(columns, row, strict=True))
    del values["seq"]
    with suppress(BadInput, ValueError, TypeError):
        return FormerWinner(str(values.pop("replaced_at")), from_row(Winner, values))
    return None


def _time(record: Record) -> str:
    return record.seen_at if isinstance(record, Captured) else record.measured_at


def _free_name(path: Path) -> Path:
    for number in range(1, 1000):
        name = path.with_name(f"{path.stem}.repaired{'' if number == 1 else f'-{number}'}{path.suffix}")
        if not os.path.lexists(name):
            return name
    raise fault(path, "was repaired a thousand times", f"remove some of {path.stem}.repaired*")
