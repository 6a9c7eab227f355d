"""Records to table rows and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TypeVar

from autofuse.cache_db.records import Baseline, Captured, Trial, Winner, now
from autofuse.errors import BadInput
from autofuse.ops.problem import Config, Problem
from autofuse.targets.base import Target

__all__ = [
    "KEY_OF",
    "KINDS",
    "TABLE_OF",
    "Record",
    "RecordT",
    "Row",
    "from_row",
    "key_of",
    "problem_row",
    "target_row",
    "to_row",
]

Record = Trial | Baseline | Winner | Captured
Row = Mapping[str, object]
RecordT = TypeVar("RecordT", bound=Record)

TABLE_OF: Mapping[type, str] = {Trial: "trials", Baseline: "baselines", Winner: "winners", Captured: "captured"}

KINDS: tuple[type[Record], ...] = (Trial, Baseline, Winner, Captured)

KEY_OF: Mapping[type, tuple[str, ...]] = {
    Trial: ("target", "problem", "tokens", "config", "source_hash"),
    Baseline: ("target", "problem", "tokens", "kind"),
    Winner: ("target", "problem", "tokens"),
    Captured: ("target", "problem", "tokens_low", "tokens_high"),
}

_PARSERS = {"target": Target.parse, "problem": Problem.parse, "config": Config.parse}


def to_row(record: Record) -> dict[str, object]:
    """The record's columns; targets, problems and configs in their canonical form, no provenance as NULL."""
    row: dict[str, object] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        row[field.name] = str(value) if field.name in _PARSERS else value
    if row.get("provenance") == "":
        row["provenance"] = None
    return row


def from_row(kind: type[RecordT], row: Row) -> RecordT:
    """Reads a row back. Raises BadInput where a column is missing, unknown or holds what it cannot hold."""
    names = {field.name for field in fields(kind)}
    for problem, columns in (("misses", names - row.keys()), ("has the unknown", row.keys() - names)):
        if columns:
            raise BadInput(f"{kind.__name__.lower()} {problem} {', '.join(sorted(columns))}")
    values = dict(row)
    for name, parse in _PARSERS.items():
        if name in names:
            values[name] = _parse(parse, name, values[name])
    if "provenance" in names and values["provenance"] is None:
        values["provenance"] = ""
    return kind(**values)  # type: ignore[arg-type]  # the record checks its own values


def key_of(record: Record) -> dict[str, object]:
    """The columns that tell a row from the others of its table."""
    row = to_row(record)
    return {name: row[name] for name in KEY_OF[type(record)]}


def stamped(record: RecordT) -> RecordT:
    """``record`` with the present as its time, unless it has one."""
    clock = "seen_at" if isinstance(record, Captured) else "measured_at"
    return record if getattr(record, clock) else replace(record, **{clock: now()})  # type: ignore[arg-type]


def target_row(target: Target) -> dict[str, object]:
    return {
        "id": str(target),
        "vendor": target.vendor,
        "kind": target.kind,
        "arch": target.arch,
        "device_name": target.device_name,
    }


def problem_row(problem: Problem) -> dict[str, object]:
    return {"id": str(problem), "op": problem.op, "params": json.dumps(dict(problem.params))}


def _parse(parse: object, name: str, text: object) -> object:
    if not isinstance(text, str):
        raise BadInput(f"{name} must be text, not {text!r}")
    value = parse(text)  # type: ignore[operator]
    if str(value) != text:
        raise BadInput(f"{name} {text!r} is not in its canonical form {str(value)!r}")
    return value
