"""In what two files of measurements differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autofuse.cache_db.agreement import Pair, pairs
from autofuse.cache_db.lines import Content
from autofuse.cache_db.records import Winner
from autofuse.cache_db.rows import TABLE_OF, key_of

__all__ = ["Difference", "compare"]


@dataclass(frozen=True)
class Difference:
    """What one file has and the other has not.

    Attributes:
        only_here, only_there: winners of buckets that only one of them has.
        both: the winners of each bucket that both have.
        rows: table → (rows only here, rows only there, rows that differ).
    """

    only_here: Sequence[Winner]
    only_there: Sequence[Winner]
    both: Sequence[Pair]
    rows: dict[str, tuple[int, int, int]]

    @property
    def empty(self) -> bool:
        return not any(any(counts) for counts in self.rows.values())

    @property
    def changed(self) -> list[Pair]:
        """Those of ``both`` that differ in more than when and where they were measured."""
        return [pair for pair in self.both if _facts(pair.a) != _facts(pair.b)]


def compare(here: Content, there: Content) -> Difference:
    """How two files differ. When a row was measured, and by which driver, counts only in ``rows``."""
    ours, theirs = ({(type(r), *key_of(r).values()): r for r in content.records} for content in (here, there))
    rows: dict[str, list[int]] = {table: [0, 0, 0] for table in TABLE_OF.values() if table != "captured"}
    only_here, only_there = [], []
    for key in {**ours, **theirs}:
        mine, other = ours.get(key), theirs.get(key)
        column = 0 if other is None else 1 if mine is None else 2
        record = mine or other
        if record is None or mine == other:
            continue
        rows[TABLE_OF[type(record)]][column] += 1
        if isinstance(mine, Winner) and other is None:
            only_here.append(mine)
        elif isinstance(other, Winner) and mine is None:
            only_there.append(other)
    counts = {table: (a, b, c) for table, (a, b, c) in rows.items()}
    only_here.sort(key=_bucket)
    only_there.sort(key=_bucket)
    return Difference(only_here, only_there, pairs(here, there), counts)


def _bucket(winner: Winner) -> tuple[str, str, int]:
    return str(winner.target), str(winner.problem), winner.tokens


def _facts(winner: Winner) -> tuple[object, ...]:
    return (winner.config, winner.source_hash, winner.time_us, winner.baseline, winner.baseline_us, winner.gain)
