"""One file's winners of one target, read problem by problem.

A database may hold a hundred thousand winners, a graph asks for a few: opening reads no more than the digest.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path

from autofuse.cache_db.faults import RESTORE, explain_sqlite_error, fault
from autofuse.cache_db.files import check_readable, read_untouched
from autofuse.cache_db.records import Winner, winners_digest
from autofuse.cache_db.rows import from_row
from autofuse.cache_db.schema import migration_names
from autofuse.cache_db.store import TunedDatabase
from autofuse.errors import BadInput
from autofuse.ops.problem import Problem
from autofuse.targets.base import Target

__all__ = ["InMemory", "OnDisk", "open_layer"]

_COLUMNS = ", ".join(field.name for field in fields(Winner))


class InMemory:
    """Winners that are at hand. ``digest`` stands for all but candidates."""

    def __init__(self, winners: Iterable[Winner]) -> None:
        self._winners = tuple(winners)
        self.digest = winners_digest(winner for winner in self._winners if winner.standing != "candidate")

    def of(self, problem: Problem | None) -> Sequence[Winner]:
        """A problem's winners, or all, by problem and tokens, candidates too."""
        return [winner for winner in self._winners if problem is None or winner.problem == problem]


class OnDisk:
    """Winners in a file of the present schema. Each problem is read as it is when it is first asked for."""

    def __init__(self, path: Path, target: Target, digest: str) -> None:
        self._path, self._target, self.digest = path, target, digest

    def of(self, problem: Problem | None) -> Sequence[Winner]:
        """As InMemory's. Raises DatabaseError."""
        where = "target = :target" + ("" if problem is None else " AND problem = :problem")
        query = f"SELECT {_COLUMNS} FROM winners WHERE {where} ORDER BY problem, tokens"
        wanted = {"target": str(self._target), "problem": None if problem is None else str(problem)}
        check_readable(self._path)
        try:
            rows = read_untouched(self._path, lambda connection: connection.execute(query, wanted).fetchall())
            names = _COLUMNS.split(", ")
            return [from_row(Winner, dict(zip(names, row, strict=True))) for row in rows]
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise explain_sqlite_error(self._path, error) from error
        except (BadInput, ValueError, TypeError, RecursionError) as error:
            raise fault(self._path, f"holds a row that autofuse did not write: {error}", RESTORE) from None


def open_layer(path: Path, target: Target) -> InMemory | OnDisk:
    """The winners of ``path``. Raises AbsentDatabaseError, DatabaseError."""
    check_readable(path)
    try:
        digest = read_untouched(path, lambda connection: _stored_digest(connection, target))
    except (sqlite3.Error, UnicodeDecodeError):
        digest = None  # which is explained below
    if digest is not None:
        return OnDisk(path, target, digest)
    with TunedDatabase(path, read_only=True) as database:  # of an older schema, edited by hand, or broken
        return InMemory(database.every(Winner, target, candidates=True))


def _stored_digest(connection: sqlite3.Connection, target: Target) -> str | None:
    """None unless the file is of the present schema and its digest is that of its winners."""
    applied = connection.execute("SELECT name FROM _sqlite_migrations WHERE migration_set = 'autofuse'")
    if {row[0] for row in applied} != _present():
        return None
    connection.execute(f"SELECT {_COLUMNS} FROM winners LIMIT 0")
    row = connection.execute("SELECT digest FROM digests WHERE target = ?", [str(target)]).fetchone()
    return None if row is None else str(row[0])


@cache
def _present() -> frozenset[str]:
    return frozenset(migration_names())
