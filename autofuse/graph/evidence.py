"""What the database holds beside the winners that answer: what explains a site that none answers for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from autofuse.cache_db import AbsentDatabaseError, Captured, Trial, TunedDatabase, Winner
from autofuse.cache_db.files import lower_paths
from autofuse.cache_db.layer import winners_for
from autofuse.errors import DatabaseError
from autofuse.graph.notice import warn_once
from autofuse.graph.ranks import Shared, SharedDatabase
from autofuse.ops.buckets import within_reach
from autofuse.ops.problem import Config, Problem
from autofuse.targets import Target

__all__ = ["ANY_TOKENS", "Evidence", "Key", "describe_range", "differences", "nearest_row", "read_shared", "read_tuned"]

ANY_TOKENS = 1 << 31
"""The most tokens a call is taken to have where its graph sets no bound."""

_INDUCTOR = {"compile", "graph"}
"""The baselines that are Inductor's code: what a site would run if it were not fused."""

_TARGET = ("vendor", "arch", "device_name")

_T = TypeVar("_T")

# How far a row is from what was asked for: another device weighs more than other widths, these more than another T.
_OTHER_KIND, _OTHER_ARCH, _OTHER_DEVICE, _OTHER_WORD, _OTHER_SOURCE, _OTHER_TOKENS = 32.0, 8.0, 4.0, 2.0, 0.5, 0.25


@dataclass(frozen=True)
class Key:
    """What is looked up for a site: all that a row must agree with to answer.

    Attributes:
        tokens_low, tokens_high: the range of T, equal if it is static.
        source_hashes: of the present sources of its kernels, one for each language.

    Example:
        >>> str(Key(Target("cpu", "x86-64-v4", "EPYC"), Problem("op", (("width", 512),)), 1, 64, ("a1b2",)))
        'op(width=512) at T=1…64 on cpu:x86-64-v4:EPYC, kernel source a1b2'
    """

    target: Target
    problem: Problem
    tokens_low: int
    tokens_high: int
    source_hashes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.problem} at T={self.tokens} on {self.target}, kernel source {self.source}"

    @property
    def source(self) -> str:
        """The hash, or what there is to choose from."""
        return " or ".join(self.source_hashes)

    @property
    def captured(self) -> Captured:
        """The note by which ``autofuse tune --captured`` finds it."""
        return Captured(self.target, self.problem, self.tokens_low, self.tokens_high)

    @property
    def tokens(self) -> str:
        """``16``, ``2…64`` or ``2…∞``."""
        return describe_range(self.tokens_low, self.tokens_high)


class Evidence:
    """Rows of databases that are not winners which answer, read when they are asked for, and once.

    Where a database cannot be read, it has none: whoever read the winners has warned of that already.

    Args:
        paths: the databases, the uppermost first.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._winners: dict[str, Sequence[Winner]] = {}
        self._trials: dict[tuple[Target, Problem], Sequence[Trial]] = {}
        self._baselines: dict[tuple[Path, Target, Problem, int], Sequence[str]] = {}

    def nearest(self, key: Key) -> str:
        """The row that is nearest to ``key``, and what it differs in, as a sentence; "" without a database."""
        op = key.problem.op
        if op not in self._winners:
            self._winners[op] = _rows(self._paths, lambda database: database.winners(op=op))
        found = nearest_row(self._winners[op], key)
        if found is None:
            return "; ".join(f"{path} has no row of {op}" for path in self._paths)
        row, differ = found
        place = f"{row.problem} at T={row.tokens} on {row.target}"
        return f"the nearest row is {place}; it differs in {', '.join(differ) or 'nothing'}"

    def failures(self, key: Key) -> str:
        """That all configs measured for ``key`` failed, and how, as a sentence; "" if none was measured or one is
        right.
        """
        present = self._present_trials(key)
        if not present or any(trial.status == "ok" for trial in present):
            return ""
        counts = ", ".join(f"{count} {status}" for status, count in Counter(t.status for t in present).most_common())
        return f"it was tuned, but no config works ({counts}): `autofuse show --failures` says why"

    def failed(self, key: Key, config: Config) -> Trial | None:
        """A trial of ``key``'s problem and present source in which ``config`` failed, at whatever T; None without."""
        trials = self._present_trials(key)
        return next((trial for trial in trials if trial.failed and trial.config == config), None)

    def _present_trials(self, key: Key) -> Sequence[Trial]:
        pair = (key.target, key.problem)
        if pair not in self._trials:
            self._trials[pair] = _rows(
                self._paths, lambda database: database.every(Trial, key.target, None, key.problem)
            )
        return [trial for trial in self._trials[pair] if trial.source_hash in key.source_hashes]

    def only_eager(
        self, winners: Iterable[Winner], path: Path, compared: frozenset[tuple[str, int]] | None = None
    ) -> Winner | None:
        """The first of ``winners`` that was compared with eager PyTorch alone, because Inductor's code was not
        measured; None if there is none.

        Args:
            path: the database that the winners are from: their baselines are beside them.
            compared: (problem, tokens) of the others that are not Inductor's, where another rank has looked.
        """
        for winner in winners:
            if winner.baseline in _INDUCTOR:
                continue
            if compared is not None:
                if (str(winner.problem), winner.tokens) not in compared:
                    return winner
                continue
            bucket = (winner.target, winner.problem, winner.tokens)
            key = (path, *bucket)
            if key not in self._baselines:
                self._baselines[key] = _rows([path], lambda database, bucket=bucket: [*database.baselines(*bucket)])  # type: ignore[misc]
            if not _INDUCTOR.intersection(self._baselines[key]):
                return winner
        return None


def _rows(paths: Iterable[Path], query: Callable[[TunedDatabase], list[_T]]) -> list[_T]:
    found: list[_T] = []
    for path in paths:
        try:
            with TunedDatabase(path, read_only=True) as database:
                found += query(database)
        except DatabaseError:
            continue
    return found


def read_shared(path: Path, target: Target) -> Shared:
    """What ``path`` and the databases below it hold of ``target`` that other ranks may need; see ``Snapshot.load``."""
    try:
        layers, lower = [_read_shared(path, target)], lower_paths()
    except DatabaseError as error:
        return Shared(fault=str(error))
    for each in lower:
        try:
            layers.append(_read_shared(each, target))
        except DatabaseError as error:
            warn_once(f"a database of AUTOFUSE_DB_PATH is passed over: {error}")
    return Shared((layers[0], *(layer for layer in layers[1:] if layer.present)))


def read_tuned(path: Path, target: Target, problem: Problem) -> Shared:
    """What ``path`` alone holds of ``problem``, after it was tuned for other ranks as well."""
    try:
        return Shared((_read_shared(path, target, problem),))
    except DatabaseError as error:
        return Shared(fault=str(error))


def _read_shared(path: Path, target: Target, problem: Problem | None = None) -> SharedDatabase:
    try:
        with TunedDatabase(path, read_only=True) as database:
            winners = [w for w in winners_for(database, target) if problem is None or w.problem == problem]
            mine = [w for w in winners if w.target == target and w.baseline not in _INDUCTOR]
            kinds = {w: database.baselines(target, w.problem, w.tokens) for w in mine}
    except AbsentDatabaseError:
        return SharedDatabase(path)
    compared = {(str(w.problem), w.tokens) for w, baselines in kinds.items() if _INDUCTOR.intersection(baselines)}
    return SharedDatabase(path, True, tuple(winners), frozenset(compared))


def describe_range(low: int, high: int) -> str:
    """T from ``low`` to ``high``: ``16``, ``2…64`` or ``2…∞``."""
    return str(low) if low == high else f"{low}…{'∞' if high >= ANY_TOKENS else high}"


def nearest_row(rows: Iterable[Winner], key: Key) -> tuple[Winner, list[str]] | None:
    """The row that is nearest to what ``key`` asks for, and what it differs in; None where there are no rows."""
    best = min(rows, key=lambda row: _distance(row, key), default=None)
    return None if best is None else (best, differences(best, key))


def differences(row: Winner, key: Key) -> list[str]:
    """What of a row is not as ``key`` asks for, each as ``what: there, not here``."""
    pairs = [(name, str(getattr(row.target, name)), str(getattr(key.target, name))) for name in _TARGET]
    there, here = dict(row.problem.params), dict(key.problem.params)
    pairs += [(name, str(there.get(name)), str(here.get(name))) for name in {**here, **there}]
    if row.source_hash not in key.source_hashes:
        pairs.append(("kernel source", row.source_hash, key.source))
    found = [f"{name}: {a}, not {b}" for name, a, b in pairs if a != b]
    if not _in_reach(row, key):
        found.append(f"T: {row.tokens}, which does not serve {key.tokens}")
    return found


def _in_reach(row: Winner, key: Key) -> bool:
    return within_reach(row.tokens, row.tokens, key.tokens_low, key.tokens_high)


def _distance(row: Winner, key: Key) -> float:
    there, here = row.target, key.target
    far = _OTHER_KIND * (there.kind != here.kind) + _OTHER_ARCH * (there.arch != here.arch)
    far += _OTHER_DEVICE * (there.device_name != here.device_name) + _OTHER_SOURCE * (
        row.source_hash not in key.source_hashes
    )
    params, asked = dict(row.problem.params), dict(key.problem.params)
    for name in {**asked, **params}:
        a, b = params.get(name), asked.get(name)
        if isinstance(a, int) and isinstance(b, int) and a > 1 and b > 1:
            far += abs(math.log2(a / b))
        else:
            far += _OTHER_WORD * (a != b)
    if _in_reach(row, key):
        return far
    wanted = min(max(row.tokens, key.tokens_low, 1), max(key.tokens_high, 1))
    return far + _OTHER_TOKENS * (1 + abs(math.log2(row.tokens / wanted)))
