"""The tables and views of the database, as migrations, and whether a file has them."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from sqlite_utils import Database, Migrations

from autofuse.cache_db.faults import ELSEWHERE, RESTORE, fault

__all__ = [
    "check_known",
    "columns_in",
    "columns_of",
    "first_pending",
    "is_blank",
    "is_current",
    "migrate",
    "migration_names",
    "migrations",
    "objects",
]

migrations = Migrations("autofuse")

_TABLES_FROM_THE_FIRST = ("targets", "problems", "provenance", "trials", "baselines", "winners", "captured")


def is_blank(db: Database) -> bool:
    """Whether nothing was ever written to it."""
    return db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0


def is_current(db: Database, path: Path) -> bool:
    """Whether the tables are those of this version; False where migrations are pending. Changes nothing.

    Raises DatabaseError where the file is another program's, was written by a newer autofuse, or lacks tables.
    """
    applied = {migration.name for migration in migrations.applied(db)} if _records_migrations(db) else set()
    if not applied:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        listed = ", ".join(tables[:3]) + (", …" if len(tables) > 3 else "")
        raise fault(path, f"belongs to another program (its tables: {listed or 'none'})", ELSEWHERE)
    if applied - migration_names():
        raise fault(path, "was written by a newer autofuse", f"upgrade autofuse or {ELSEWHERE}")
    if migrations.pending(db):
        return False
    _check_columns(db, path)
    return True


def migrate(db: Database, path: Path) -> None:
    """Brings a blank or older database to this version. Run it inside a transaction.

    Raises DatabaseError where its tables are not what its migrations made.
    """
    migrations.apply(db)
    _check_columns(db, path)


def check_known(connection: sqlite3.Connection, path: Path) -> None:
    """Raises DatabaseError where a file's schema is neither the present one nor an earlier one of ours."""
    db = Database(connection, execute_plugins=False)
    if not is_blank(db) and is_current(db, path):
        return
    known = set(db.table_names())
    for table in _TABLES_FROM_THE_FIRST:
        if table not in known:
            raise fault(path, f"lacks the table {table}", RESTORE)


@cache
def objects() -> tuple[tuple[str, str, str], ...]:
    """(type, name, SQL) of everything that the present schema has."""
    db = Database(memory=True)
    migrations.apply(db)
    return tuple(map(tuple, db.execute("SELECT type, name, sql FROM sqlite_master").fetchall()))


def columns_in(connection: sqlite3.Connection, table: str) -> tuple[str, ...]:
    """The columns that a table has in some file."""
    return tuple(row[1] for row in connection.execute(f"PRAGMA table_info({table})"))


def migration_names() -> set[str]:
    """Of all migrations to the present schema."""
    return {migration.name for migration in migrations.pending(Database(memory=True))}


def _records_migrations(db: Database) -> bool:
    return {"migration_set", "name", "applied_at"} <= set(_columns(db, Migrations.migrations_table))


def first_pending(db: Database) -> str:
    """The name of the migration that an older database needs first."""
    return str(migrations.pending(db)[0].name)


def columns_of(table: str) -> tuple[str, ...]:
    """The columns of one of our tables, in the order in which a row holds them."""
    return _expected_columns()[table]


def _columns(db: Database, table: str) -> tuple[str, ...]:
    return tuple(row[1] for row in db.execute(f"PRAGMA table_info({table})"))


@cache
def _expected_columns() -> Mapping[str, tuple[str, ...]]:
    db = Database(memory=True)
    migrations.apply(db)
    return {table: _columns(db, table) for table in db.table_names()}


def _check_columns(db: Database, path: Path) -> None:
    tables = set(db.table_names())
    for table, columns in _expected_columns().items():
        if table not in tables:
            raise fault(path, f"lacks the table {table}", RESTORE)
        if missing := set(columns).difference(_columns(db, table)):
            raise fault(path, f"lacks the column {table}.{min(missing)}", RESTORE)


def _view(db: Database, name: str, select: str) -> None:
    db.create_view(name, select, replace=True)


@migrations()
def m001_tables(db: Database) -> None:
    bucket = {"target": str, "problem": str, "tokens": int}
    kernel = {"config": str, "source_hash": str}
    time = {"time_us": float, "spread_us": float}
    origin = {"provenance": str, "measured_at": str}

    def create(name: str, key: str | tuple[str, ...], columns: dict[str, type], nullable: set[str]) -> None:
        parents = {"target": "targets", "problem": "problems", "provenance": "provenance"}
        db.table(name).create(
            columns,
            pk=key,
            not_null=columns.keys() - nullable,
            foreign_keys=[(column, parent, "id") for column, parent in parents.items() if column in columns],
        )

    create("targets", "id", {"id": str, "vendor": str, "kind": str, "arch": str, "device_name": str}, set())
    create("problems", "id", {"id": str, "op": str, "params": str}, set())
    summary = {"host": str, "autofuse": str, "torch": str, "driver": str, "toolkit": str, "compiler": str}
    create("provenance", "id", {"id": str, **summary, "fields": str}, set(summary))
    outcome = {"error": float, "compile_s": float, "registers": int, "spill_bytes": int, "shared_bytes": int}
    create(
        "trials",
        ("target", "problem", "tokens", "config", "source_hash"),
        {**bucket, **kernel, "status": str, "message": str, **time, **outcome, **origin},
        {*time, *outcome, "provenance"},
    )
    create(
        "baselines", ("target", "problem", "tokens", "kind"), {**bucket, "kind": str, **time, **origin}, {"provenance"}
    )
    gain = {"baseline": str, "baseline_us": float, "gain": float, "gain_low": float, "gain_high": float}
    create("winners", ("target", "problem", "tokens"), {**bucket, **kernel, **time, **gain, **origin}, {"provenance"})
    create(
        "captured",
        ("target", "problem", "tokens_low", "tokens_high"),
        {"target": str, "problem": str, "tokens_low": int, "tokens_high": int, "seen_at": str},
        set(),
    )


@migrations()
def m002_indexes(db: Database) -> None:
    db.table("trials").create_index(["problem"])
    db.table("trials").create_index(["status"])
    db.table("winners").create_index(["problem"])


@migrations()
def m003_views(db: Database) -> None:
    """Views hold nothing: each is made by the last migration that changed it."""
    _view(
        db,
        "trials_view",
        """SELECT t.target, p.op, t.problem, t.tokens, t.config, t.status,
            round(t.time_us, 2) AS time_us, round(t.spread_us, 2) AS spread_us, round(t.error, 3) AS error,
            round(t.compile_s, 2) AS compile_s, t.registers, t.spill_bytes, t.shared_bytes, t.message,
            substr(t.source_hash, 1, 12) AS source, t.measured_at
        FROM trials t JOIN problems p ON p.id = t.problem
        ORDER BY t.target, t.problem, t.tokens, t.time_us IS NULL, t.time_us, t.config""",
    )


@migrations()
def m004_pruned_is_no_failure(db: Database) -> None:
    _view(
        db,
        "failures_view",
        """SELECT t.status, t.message, p.op, t.target, count(*) AS trials, min(t.config) AS example_config,
            min(t.problem) AS example_problem, max(t.measured_at) AS last_seen_at
        FROM trials t JOIN problems p ON p.id = t.problem
        WHERE t.status NOT IN ('ok', 'pruned')
        GROUP BY t.status, t.message, p.op, t.target
        ORDER BY trials DESC, t.status, t.message""",
    )


@migrations()
def m005_standing(db: Database) -> None:
    """Where a row comes from, the winners of before, and each target's digest."""
    for table in ("trials", "baselines", "winners"):
        db.table(table).add_column("standing", str, not_null_default="own")
    former = {column.name: {"TEXT": str, "INTEGER": int}.get(column.type, float) for column in db["winners"].columns}
    db.table("history").create(
        {"seq": int, **former, "replaced_at": str},
        pk="seq",
        not_null=former.keys() - {"provenance"} | {"replaced_at"},
        foreign_keys=[("target", "targets", "id"), ("problem", "problems", "id"), ("provenance", "provenance", "id")],
    )
    db.table("history").create_index(["target", "problem", "tokens"])
    db.table("digests").create({"target": str, "digest": str}, pk="target", not_null={"digest"})
    # The store writes a target's digest with its winners. Whoever else changes one makes the stored digest void.
    for event, row in (("INSERT", "NEW"), ("UPDATE", "NEW"), ("DELETE", "OLD")):
        db.execute(
            f"CREATE TRIGGER winners_{event.lower()} AFTER {event} ON winners"
            f" BEGIN DELETE FROM digests WHERE target = {row}.target; END"
        )
    _view(
        db,
        "history_view",
        """SELECT h.target, p.op, h.problem, h.tokens, h.config, round(h.time_us, 2) AS time_us,
            round(h.gain, 2) AS gain, h.standing, substr(h.source_hash, 1, 12) AS source, h.measured_at, h.replaced_at
        FROM history h JOIN problems p ON p.id = h.problem
        ORDER BY h.target, h.problem, h.tokens, h.seq""",
    )


@migrations()
def m006_disputed(db: Database) -> None:
    """A winner may be ``disputed``. An earlier autofuse, which would take that for damage, is to refuse the file."""
    _view(
        db,
        "winners_view",
        """SELECT w.target, p.op, w.problem, w.tokens, w.config, w.standing,
            round(w.time_us, 2) AS time_us, round(w.spread_us, 2) AS spread_us,
            w.baseline, round(w.baseline_us, 2) AS baseline_us,
            round(w.gain, 2) AS gain, round(w.gain_low, 2) AS gain_low, round(w.gain_high, 2) AS gain_high,
            CASE WHEN w.gain_low > 1.0 THEN 'yes' ELSE 'no' END AS beats_baseline,
            substr(w.source_hash, 1, 12) AS source, w.measured_at, v.host, v.driver
        FROM winners w JOIN problems p ON p.id = w.problem LEFT JOIN provenance v ON v.id = w.provenance
        ORDER BY w.target, w.problem, w.tokens""",
    )
    _view(
        db,
        "coverage_view",
        """SELECT w.target, p.op, w.problem, count(*) AS buckets, min(w.tokens) AS tokens_low,
            max(w.tokens) AS tokens_high, sum(w.gain_low > 1.0) AS faster,
            sum(w.standing = 'disputed') AS disputed, round(min(w.gain), 2) AS least_gain,
            round(max(w.gain), 2) AS most_gain, count(DISTINCT w.source_hash) AS sources,
            min(w.measured_at) AS first_measured_at, max(w.measured_at) AS last_measured_at
        FROM winners w JOIN problems p ON p.id = w.problem
        WHERE w.standing <> 'candidate'
        GROUP BY w.target, p.op, w.problem
        ORDER BY w.target, p.op, w.problem""",
    )
