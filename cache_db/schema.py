"""The tables and views of the database, as migrations, and whether a file has them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from sqlite_utils import Database, Migrations

from autofuse.cache_db.faults import ELSEWHERE, RESTORE, fault

__all__ = ["is_blank", "is_current", "migrate", "migrations"]

migrations = Migrations("autofuse")


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
    if applied - _migration_names():
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


def _migration_names() -> set[str]:
    return {migration.name for migration in migrations.pending(Database(memory=True))}


def _records_migrations(db: Database) -> bool:
    return {"migration_set", "name", "applied_at"} <= _columns(db, Migrations.migrations_table)


def _columns(db: Database, table: str) -> set[str]:
    return {row[1] for row in db.execute(f"PRAGMA table_info({table})")}


@cache
def _expected_columns() -> Mapping[str, set[str]]:
    db = Database(memory=True)
    migrations.apply(db)
    return {table: _columns(db, table) for table in db.table_names()}


def _check_columns(db: Database, path: Path) -> None:
    tables = set(db.table_names())
    for table, columns in _expected_columns().items():
        if table not in tables:
            raise fault(path, f"lacks the table {table}", RESTORE)
        if missing := columns - _columns(db, table):
            raise fault(path, f"lacks the column {table}.{min(missing)}", RESTORE)


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
    db.create_view(
        "winners_view",
        """SELECT w.target, p.op, w.problem, w.tokens, w.config,
            round(w.time_us, 2) AS time_us, round(w.spread_us, 2) AS spread_us,
            w.baseline, round(w.baseline_us, 2) AS baseline_us,
            round(w.gain, 2) AS gain, round(w.gain_low, 2) AS gain_low, round(w.gain_high, 2) AS gain_high,
            CASE WHEN w.gain_low > 1.0 THEN 'yes' ELSE 'no' END AS beats_baseline,
            substr(w.source_hash, 1, 12) AS source, w.measured_at, v.host, v.driver
        FROM winners w JOIN problems p ON p.id = w.problem LEFT JOIN provenance v ON v.id = w.provenance
        ORDER BY w.target, w.problem, w.tokens""",
    )
    db.create_view(
        "trials_view",
        """SELECT t.target, p.op, t.problem, t.tokens, t.config, t.status,
            round(t.time_us, 2) AS time_us, round(t.spread_us, 2) AS spread_us, round(t.error, 3) AS error,
            round(t.compile_s, 2) AS compile_s, t.registers, t.spill_bytes, t.shared_bytes, t.message,
            substr(t.source_hash, 1, 12) AS source, t.measured_at
        FROM trials t JOIN problems p ON p.id = t.problem
        ORDER BY t.target, t.problem, t.tokens, t.time_us IS NULL, t.time_us, t.config""",
    )
    db.create_view(
        "failures_view",
        """SELECT t.status, t.message, p.op, t.target, count(*) AS trials, min(t.config) AS example_config,
            min(t.problem) AS example_problem, max(t.measured_at) AS last_seen_at
        FROM trials t JOIN problems p ON p.id = t.problem
        WHERE t.status <> 'ok'
        GROUP BY t.status, t.message, p.op, t.target
        ORDER BY trials DESC, t.status, t.message""",
    )


@migrations()
def m004_pruned_is_no_failure(db: Database) -> None:
    db.view("failures_view").drop()
    db.create_view(
        "failures_view",
        """SELECT t.status, t.message, p.op, t.target, count(*) AS trials, min(t.config) AS example_config,
            min(t.problem) AS example_problem, max(t.measured_at) AS last_seen_at
        FROM trials t JOIN problems p ON p.id = t.problem
        WHERE t.status NOT IN ('ok', 'pruned')
        GROUP BY t.status, t.message, p.op, t.target
        ORDER BY trials DESC, t.status, t.message""",
    )
