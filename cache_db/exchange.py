"""Carrying measurements from one machine to another.

An export is JSON lines (``lines.py``) or a SQLite file with the database's own schema.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from autofuse.cache_db.faults import explain_sqlite_error
from autofuse.cache_db.files import BUSY_TIMEOUT_S, connect, permits
from autofuse.cache_db.lines import KIND_OF, Content, check_measured, malformed, read_lines, write_lines
from autofuse.cache_db.rows import TABLE_OF
from autofuse.cache_db.store import TunedDatabase, provenance_id
from autofuse.errors import BadInput, DatabaseError
from autofuse.targets.base import Target

__all__ = ["ExportSummary", "ImportSummary", "export_database", "import_into"]


@dataclass(frozen=True)
class ExportSummary:
    """What an export holds: table → rows, and where it is."""

    path: Path
    counts: Mapping[str, int]


@dataclass(frozen=True)
class ImportSummary:
    """What an import did: table → rows that were new, kept as they were here, or replaced by newer ones."""

    new: Mapping[str, int]
    kept: Mapping[str, int]
    replaced: Mapping[str, int]


def export_database(
    source: TunedDatabase,
    destination: Path,
    *,
    op: str | None = None,
    target: Target | None = None,
    overwrite: bool = False,
) -> ExportSummary:
    """Writes what was measured, of one op or target where they are given, to ``destination``: whole or not at all.

    The suffix ``.jsonl`` gives JSON lines, any other a SQLite file.

    Raises BadInput where ``destination`` exists (unless ``overwrite``) or cannot be written; DatabaseError.
    """
    _check_destination(source, destination, overwrite)
    content = _gather(source, op, target)
    temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.tmp")
    try:
        if destination.suffix == ".jsonl":
            write_lines(content, temporary)
        else:
            _write_sqlite(content, temporary)
        os.replace(temporary, destination)
    except OSError as error:
        raise BadInput(f"cannot write {destination}: {error.strerror}; name a file that can be written") from None
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{temporary}{suffix}").unlink(missing_ok=True)
    return ExportSummary(destination, content.counts())


def import_into(database: TunedDatabase, source: Path) -> ImportSummary:
    """Takes over what ``source``, written by ``export_database`` or a database itself, holds: all of it or nothing.

    Every row is checked before the first is written. Of two rows with the same key the one measured later stays, and
    this database's own if they are equally old.

    Raises BadInput, naming file and line, and DatabaseError.
    """
    if not source.is_file():
        raise BadInput(f"cannot import {source}: there is no such file; name one that `autofuse export` wrote")
    if database.path.exists() and os.path.samefile(source, database.path):
        raise BadInput(f"cannot import {source} into itself; name another file")
    content = read_lines(source) if source.suffix == ".jsonl" else _read_sqlite(source)
    new, kept, replaced = Counter[str](), Counter[str](), Counter[str]()
    with database.transaction():
        for fields in content.provenance.values():
            database.record_provenance(fields)
        for record in content.records:
            known = database.same_key(record)
            tally = new if known is None else replaced if record.measured_at > known.measured_at else kept
            tally[TABLE_OF[type(record)]] += 1
            if tally is not kept:
                database.record(record)
    return ImportSummary(*({table: tally[table] for table in KIND_OF} for tally in (new, kept, replaced)))


def _gather(source: TunedDatabase, op: str | None, target: Target | None) -> Content:
    content = Content()
    for kind in KIND_OF.values():
        content.records += source.every(kind, target, op)
    for id in sorted({record.provenance for record in content.records} - {""}):
        content.provenance[id] = source.provenance(id)
    return content


def _check_destination(source: TunedDatabase, destination: Path, overwrite: bool) -> None:
    if not destination.parent.is_dir():
        raise BadInput(f"cannot write {destination}: its folder does not exist; make it first")
    if destination.is_dir():
        raise BadInput(f"cannot write {destination}: it is a folder; name a file in it")
    if not permits(destination.parent, os.W_OK):
        raise BadInput(f"cannot write {destination}: its folder is read-only; name a file in another")
    if not destination.exists():
        return
    if source.path.exists() and os.path.samefile(destination, source.path):
        raise BadInput(f"cannot export {destination} onto itself; name another file")
    if not overwrite:
        raise BadInput(f"cannot write {destination}: it exists; name another file or ask to overwrite it")
    if Path(f"{destination}-wal").exists():
        raise BadInput(f"cannot write {destination}: a database of that name is in use; name another file")


def _write_sqlite(content: Content, path: Path) -> None:
    with TunedDatabase(path) as database, database.transaction():
        for fields in content.provenance.values():
            database.record_provenance(fields)
        for record in content.records:
            database.record(record)
    try:
        with closing(connect(path, "rw", BUSY_TIMEOUT_S)) as connection:
            # An export is one file, whole without a log beside it.
            connection.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.Error as error:
        raise explain_sqlite_error(path, error) from error


def _read_sqlite(path: Path) -> Content:
    try:
        with TunedDatabase(path, read_only=True) as database:
            content = _gather(database, None, None)
        for id, fields in content.provenance.items():
            if provenance_id(fields) != id:
                raise BadInput(f"provenance {id!r} is not the id of its fields")
        for record in content.records:
            check_measured(record)
    except DatabaseError as error:
        raise DatabaseError(f"cannot import: {error}") from error
    except BadInput as error:
        raise malformed(str(path), error) from None
    return content
