"""What may come in from another machine's file, whoever wrote it.

An import holds parameters, never code, and nothing here ever puts its text into a statement or a path. What no
autofuse would have written is refused all the same, by name: a file that tries is not one to trust in the rest.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path

from autofuse.cache_db.kernels import is_stale
from autofuse.cache_db.records import Baseline, Trial, Winner, parse_time
from autofuse.errors import AutofuseError, BadInput
from autofuse.ops import OPS
from autofuse.ops.problem import shortened
from autofuse.targets import KINDS

__all__ = [
    "LONGEST_TEXT",
    "Measured",
    "check_measured",
    "check_objects",
    "check_size",
    "check_text",
    "left_out",
]

LONGEST_TEXT = 16_384
"""Characters of one value; a compiler's last words are the longest that we write."""

_MOST_BYTES = 256 << 20  # of a file: a million rows
_CLOCK_SKEW = timedelta(days=1)  # how far ahead of ours another machine's clock may be
_MANY_TOKENS = 1 << 20  # constraints on configs for too few tokens hold there

_HASH = re.compile(r"[0-9A-Za-z]{1,64}")
_ARCH = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")
_DEVICE = re.compile(r"[A-Za-z0-9][\w ()/@,.:+®™-]*")
_STATEMENT = re.compile(
    r"\b(?:(?:drop|alter|create)\s+(?:\w+\s+)?(?:table|view|trigger|index)|attach\s+(?:database\b|['\"])|delete\s+from"
    r"|insert\s+(?:or\s+\w+\s+)?into|union\s+(?:all\s+)?select|update\s+\w+\s+set|load_extension|pragma\s+\w+)\b",
    re.IGNORECASE,
)

Measured = Trial | Baseline | Winner


def check_size(size: int, place: Path | str) -> None:
    """Raises BadInput for a file of more bytes than any export has. What a sparse file claims to have counts."""
    if size > _MOST_BYTES:
        raise BadInput(
            f"cannot import {place}: it is larger than {_MOST_BYTES >> 20} MiB, as no export is; export one --op, "
            "--gpu or --model at a time, or --winners-only"
        )


def check_text(values: Iterable[object]) -> None:
    """Raises BadInput where a value is longer than any that autofuse writes, is a blob, or is an SQL statement."""
    for value in values:
        if isinstance(value, bytes):
            raise BadInput("a value is a blob, which autofuse never writes")
        if not isinstance(value, str):
            continue
        if len(value) > LONGEST_TEXT:
            raise BadInput(f"a text of {len(value)} characters is longer than any that autofuse writes")
        if _STATEMENT.search(value):
            raise BadInput(f"the text {shortened(value)} is an SQL statement, which autofuse never writes")


def check_measured(record: Measured) -> Measured:
    """``record`` if another machine can have measured it. Raises BadInput."""
    target = record.target
    if target.kind not in KINDS:
        raise BadInput(f"target {shortened(str(target))}: its kind is none of {', '.join(KINDS)}")
    if not _ARCH.fullmatch(target.arch) or not _DEVICE.fullmatch(target.device_name) or ".." in str(target):
        raise BadInput(f"target {shortened(str(target))} is named as no device is")
    if not isinstance(record, Baseline) and not _HASH.fullmatch(record.source_hash):
        raise BadInput(f"source_hash {shortened(record.source_hash)} is no hash of a kernel's source")
    if not record.measured_at:
        raise BadInput("measured_at is empty")
    if parse_time(record.measured_at) > datetime.now(timezone.utc) + _CLOCK_SKEW:
        raise BadInput(f"measured_at {record.measured_at} is in the future; check both machines' clocks")
    return record


def left_out(record: Measured) -> str | None:
    """Why a row is of no use here, because its op, problem or config is not one of this autofuse; None where it is.

    Raises BadInput where it claims to be of a GPU kernel as it is here, and yet the search space has no such config.
    The space of a CPU kernel goes by the machine's cores: of another CPU's configs, some are only of no use here.
    """
    op = OPS.get(record.problem.op)
    if op is None or record.target.kind not in op.kernels:
        return f"{record.problem.op} has no kernel for {record.target.kind} here"
    try:
        known = op.make_problem(**dict(record.problem.params)) == record.problem
    except (AutofuseError, KeyError, TypeError, ValueError):
        known = False
    why = None if known else f"{op.name} has no problem {shortened(str(record.problem))}"
    if known and not isinstance(record, Baseline):
        why = op.kernel_source(record.target.kind, record.config).space.refusal(
            record.config, record.problem, _MANY_TOKENS
        )
        why = why and f"config {shortened(str(record.config))} is outside the search space of {op.name}: {why}"
    if why and record.target.kind != "cpu" and not isinstance(record, Baseline) and not is_stale(record):
        raise BadInput(why)
    return why


def check_objects(connection: sqlite3.Connection, ours: Iterable[tuple[str, str, str]]) -> None:
    """Raises BadInput where a file holds a table, view, trigger or index that autofuse does not make.

    Args:
        ours: (type, name, SQL) of everything that the present schema has; the SQL of triggers must agree, and
            tables must be plain ones. Views are never read.
    """
    known = {(kind, name): sql for kind, name, sql in ours}
    for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master"):
        if (kind, name) not in known:
            raise BadInput(f"it holds the {kind} {shortened(str(name))}, which autofuse does not make")
        if kind == "trigger" and sql != known[kind, name]:
            raise BadInput(f"its trigger {name} is not the one that autofuse makes")
        if kind == "table" and not name.startswith("sqlite_"):
            hidden = [row[1] for row in connection.execute(f'PRAGMA table_xinfo("{name}")') if row[6]]
            if hidden or not str(sql).upper().startswith("CREATE TABLE"):
                raise BadInput(f"its table {name} computes its columns, which autofuse's do not")
