"""Several exports, or databases, as one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from autofuse.cache_db.foreign import Measured
from autofuse.cache_db.kernels import is_stale
from autofuse.cache_db.lines import KIND_OF, Content
from autofuse.cache_db.records import Trial, Winner
from autofuse.cache_db.rows import key_of, to_row

__all__ = ["Settled", "merge_contents"]

_Key = tuple[object, ...]

_REASONS = (
    "it is of another version of the kernel than is here",
    "no trial in these files says that it was verified",
    "it does not say where it was measured",
    "it was measured earlier",
    "its row comes first in the order of their texts",
)
"""Why one of two winners does not stay: one for each place of ``_worth``."""


@dataclass(frozen=True)
class Settled:
    """Two winners of one bucket that differ: the one that stays, None where neither does; the other one; and why."""

    kept: Winner | None
    dropped: Winner
    why: str


def merge_contents(contents: Sequence[Content]) -> tuple[Content, list[Settled]]:
    """All rows of all of them, in the order in which an export has them; of several rows of one key one.

    What they hold decides, not the order in which they are given. Of two rows of one key the better one stays: one of
    the kernel as it is here; then, of winners, one whose config a trial in these files says was verified; then one with
    provenance; then the later one. The lower time never decides. A config that any of them found wrong does not win.
    """
    every = sorted((record for content in contents for record in content.records), key=_text)
    trials = [record for record in every if isinstance(record, Trial)]
    ok, wrong = ({_key(trial) for trial in trials if trial.status == status} for status in ("ok", "wrong"))
    best: dict[_Key, Measured] = {}
    settled: dict[_Key, Settled] = {}
    for record in every:
        if isinstance(record, Winner) and _trial_key(record) in wrong:
            settled[_text(record)] = Settled(None, record, "its config was found wrong")
            continue
        key = _key(record)
        known = best.setdefault(key, record)
        if known == record:
            continue
        mine, other = _worth(record, ok), _worth(known, ok)
        if mine > other:
            best[key] = record
        if isinstance(known, Winner) and isinstance(record, Winner):
            dropped = known if mine > other else record
            place = next(place for place, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
            settled[_text(dropped)] = Settled(None, dropped, _REASONS[place])
    kept = {key: record for key, record in best.items() if isinstance(record, Winner)}
    told = [Settled(kept.get(_key(each.dropped)), each.dropped, each.why) for each in settled.values()]
    told.sort(key=lambda each: (*key_of(each.dropped).values(), _text(each.dropped)))
    return _content(best.values(), contents), told


def _worth(record: Measured, ok: Collection[_Key]) -> tuple[bool, bool, bool, str, _Key]:
    if isinstance(record, Winner):
        verified = _trial_key(record) in ok
    else:  # a trial that found its config wrong says why that does not win
        verified = isinstance(record, Trial) and record.status == "wrong"
    return not is_stale(record), verified, bool(record.provenance), record.measured_at, _text(record)


def _content(records: Iterable[Measured], contents: Sequence[Content]) -> Content:
    order = {kind: place for place, kind in enumerate(KIND_OF.values())}
    merged = Content(records=sorted(records, key=lambda record: (order[type(record)], *key_of(record).values())))
    known = {id: fields for content in contents for id, fields in content.provenance.items()}
    named = {record.provenance for record in merged.records} - {""}
    merged.provenance.update((id, known[id]) for id in sorted(named))
    return merged


def _key(record: Measured) -> _Key:
    return (type(record), *key_of(record).values())


def _trial_key(winner: Winner) -> _Key:
    """The key of the trial that a winner came from."""
    return (Trial, str(winner.target), str(winner.problem), winner.tokens, str(winner.config), winner.source_hash)


def _text(record: Measured) -> _Key:
    return (type(record).__name__, *map(repr, to_row(record).values()))
