"""An export as JSON lines.

The first line is a header with the format's version. Each further line is one row of the database with its table under
``table``: the provenance that the others name, then trials, baselines and winners, in the order of their keys.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn

from autofuse.cache_db.foreign import Measured, check_measured, check_text
from autofuse.cache_db.records import Baseline, Trial, Winner
from autofuse.cache_db.rows import TABLE_OF, from_row, key_of, to_row
from autofuse.cache_db.store import Provenance, provenance_id
from autofuse.errors import BadInput

__all__ = ["KIND_OF", "Content", "malformed", "read_lines", "write_lines"]

FORMAT = "autofuse-tuned"
FORMAT_VERSION = 1

_LONGEST_LINE = 1 << 18  # bytes
_KINDS: tuple[type[Measured], ...] = (Trial, Baseline, Winner)
KIND_OF: Mapping[str, type[Measured]] = {TABLE_OF[kind]: kind for kind in _KINDS}
"""Table → the records that travel in it. Captured sites stay where they were seen."""


@dataclass
class Content:
    """What travels: provenance by id, and records."""

    provenance: dict[str, Provenance] = field(default_factory=dict)
    records: list[Measured] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        counts = Counter(TABLE_OF[type(record)] for record in self.records)
        return {table: counts[table] for table in KIND_OF}


def write_lines(content: Content, path: Path) -> None:
    """Writes a new file; equal content gives equal bytes. Raises OSError."""
    with path.open("x", encoding="utf-8", newline="\n") as file:
        for row in _lines(content):
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _lines(content: Content) -> Iterator[dict[str, object]]:
    yield {"format": FORMAT, "version": FORMAT_VERSION}
    for id, fields in content.provenance.items():
        yield {"table": "provenance", "id": id, "fields": dict(sorted(fields.items()))}
    for record in content.records:
        row = to_row(record)
        del row["standing"]  # what it is here says nothing there
        if row.get("error") == math.inf:
            row["error"] = "inf"  # JSON has no infinity
        yield {"table": TABLE_OF[type(record)], **row}


def read_lines(path: Path) -> Content:
    """Reads and checks every line. Raises BadInput, naming the line."""
    content, seen = Content(), dict[tuple[object, ...], int]()
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_bounded(file), 1):
                if len(line) > _LONGEST_LINE:
                    raise BadInput(f"the line is longer than {_LONGEST_LINE} bytes")
                row = json.loads(line.decode(), parse_constant=_no_constant)
                if not isinstance(row, dict):
                    raise BadInput("not an object with a table")
                if number == 1:
                    _check_header(row)
                    continue
                record = _read_row(content.provenance, row)
                if record is None:
                    continue
                content.records.append(record)
                first = seen.setdefault((type(record), *key_of(record).values()), number)
                if first != number:
                    raise BadInput(f"the same key as line {first}")
        if number == 0:
            raise BadInput("the file is empty")
        _check_provenance(content)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}; check the file") from None
    except (BadInput, ValueError, RecursionError) as error:
        raise malformed(f"{path}, line {number}", error) from None
    return content


def _bounded(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, none of them read further than to one byte more than is allowed."""
    return iter(lambda: file.readline(_LONGEST_LINE + 1), b"")


def _check_header(row: Mapping[str, object]) -> None:
    if row.get("format") != FORMAT:
        raise BadInput("not the header of an autofuse export")
    if row.get("version") != FORMAT_VERSION:
        raise BadInput(f"format version {row.get('version')!r} is not {FORMAT_VERSION}; upgrade autofuse")


def _read_row(provenance: dict[str, Provenance], row: dict[str, object]) -> Measured | None:
    table = row.pop("table", None)
    if table == "provenance":
        fields = row.get("fields")
        if row.keys() != {"id", "fields"} or not isinstance(fields, dict):
            raise BadInput("provenance must have an id and fields")
        check_text([*fields, *fields.values()])
        if provenance_id(fields) != row["id"]:
            raise BadInput(f"provenance {row['id']!r} is not the id of its fields")
        provenance[provenance_id(fields)] = fields
        return None
    kind = KIND_OF.get(table) if isinstance(table, str) else None
    if kind is None:
        raise BadInput(f"unknown table {table!r}")
    if row.get("error") == "inf":
        row["error"] = math.inf
    check_text(row.values())
    return check_measured(from_row(kind, {**row, "standing": "candidate"}))


def _no_constant(text: str) -> NoReturn:
    raise BadInput(f"{text} is not a number")


def _check_provenance(content: Content) -> None:
    for record in content.records:
        if record.provenance and record.provenance not in content.provenance:
            raise BadInput(f"a row names the provenance {record.provenance!r}, which the file does not hold")


def malformed(place: str, error: Exception) -> BadInput:
    """``place`` is the file, and the line where there are lines."""
    what = error if isinstance(error, BadInput) else f"not valid JSON ({error})"
    return BadInput(f"cannot import {place}: {what}; nothing was imported; export it again or mend it")
