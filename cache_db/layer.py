"""One file's winners for one target, read problem by problem.

A database may hold a hundred thousand winners, a graph asks for a few: opening reads no more than the digest.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path

from autofuse.cache_db.faults import RESTORE, explain_sqlite_error, fault
from autofuse.cache_db.files import check_readable, read_untouched
from autofuse.cache_db.records import NO_WINNERS, Winner, winners_digest
from autofuse.cache_db.rows import from_row
from autofuse.cache_db.schema import migration_names
from autofuse.cache_db.store import TunedDatabase
from autofuse.errors import BadInput
from autofuse.ops.problem import Problem
from autofuse.targets.base import Target

__all__ = ["InMemory", "OnDisk", "open_layer", "winners_for"]

_COLUMNS = ", ".join(field.name for field in fields(Winner))

_OTHERS = "SELECT id FROM targets WHERE kind = :kind AND kind <> 'cpu' AND arch = :arch AND id <> :target"
"""``Target.same_arch`` in SQL."""

_DIGESTS = f"""SELECT ids.id, digests.digest,
    EXISTS (SELECT 1 FROM winners WHERE winners.target = ids.id AND standing <> 'candidate')
    FROM (SELECT :target AS id UNION {_OTHERS}) AS ids LEFT JOIN digests ON digests.target = ids.id"""


class InMemory:
    """Winners that are at hand.

    Attributes:
        digest: stands for all that a decision on ``target`` may depend on: its winners, and those of other GPUs of its
            arch; no candidates.
    """

    def __init__(self, winners: Iterable[Winner], target: Target) -> None:
        self._winners = tuple(
            winner
            for winner in winners
            if winner.target == target or (winner.target.same_arch(target) and winner.standing != "candidate")
        )
        groups: dict[Target, list[Winner]] = {}
        for winner in self._winners:
            if winner.standing != "candidate":
                groups.setdefault(winner.target, []).append(winner)
        mine = winners_digest(groups.pop(target, ()))
        self.digest = _with_others(mine, {str(other): winners_digest(theirs) for other, theirs in groups.items()})

    def of(self, problem: Problem | None) -> Sequence[Winner]:
        """A problem's winners, or all, by target, problem and tokens: the target's, candidates too, and those that
        decide on other GPUs of its arch.
        """
        return [winner for winner in self._winners if problem is None or winner.problem == problem]


class OnDisk:
    """Winners in a file of the present schema. Each problem is read as it is when it is first asked for."""

    def __init__(self, path: Path, target: Target, digest: str) -> None:
        self._path, self._target, self.digest = path, target, digest

    def of(self, problem: Problem | None) -> Sequence[Winner]:
        """As InMemory's. Raises DatabaseError."""
        where = f"(target = :target OR (standing <> 'candidate' AND target IN ({_OTHERS})))"
        where += "" if problem is None else " AND problem = :problem"
        query = f"SELECT {_COLUMNS} FROM winners WHERE {where} ORDER BY target, problem, tokens"
        wanted = {**_named(self._target), "problem": None if problem is None else str(problem)}
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
        return InMemory(winners_for(database, target), target)


def winners_for(database: TunedDatabase, target: Target) -> list[Winner]:
    """All that a decision on ``target`` may depend on, candidates too. Raises DatabaseError."""
    others = [other for other in database.targets() if other.same_arch(target)]
    return [winner for each in (target, *others) for winner in database.every(Winner, each, candidates=True)]


def _stored_digest(connection: sqlite3.Connection, target: Target) -> str | None:
    """None unless the file is of the present schema and its digests are those of its winners."""
    applied = connection.execute("SELECT name FROM _sqlite_migrations WHERE migration_set = 'autofuse'")
    if {row[0] for row in applied} != _present():
        return None
    connection.execute(f"SELECT {_COLUMNS} FROM winners LIMIT 0")
    digests: dict[str, str] = {}
    for id, digest, tuned in connection.execute(_DIGESTS, _named(target)):
        if digest is None and tuned:
            return None
        digests[str(id)] = NO_WINNERS if digest is None else str(digest)
    return _with_others(digests.pop(str(target)), digests)


def _with_others(mine: str, others: Mapping[str, str]) -> str:
    """A target's digest, and those of others of its arch if they have winners, in one."""
    known = [f"{target}={digest}" for target, digest in sorted(others.items()) if digest != NO_WINNERS]
    return hashlib.sha256("|".join([mine, *known]).encode()).hexdigest() if known else mine


def _named(target: Target) -> dict[str, str]:
    return {"target": str(target), "kind": target.kind, "arch": target.arch}


@cache
def _present() -> frozenset[str]:
    return frozenset(migration_names())
