"""What a report of the database says, before it is a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autofuse.cache_db import Baseline, FormerWinner, Rival, Trial, TunedDatabase, Winner, is_stale, rival_of
from autofuse.errors import AutofuseError
from autofuse.ops import OPS, Problem
from autofuse.report_page.peers import Peers, Times
from autofuse.report_page.worth import Worth, worths
from autofuse.targets import Target

__all__ = ["Bucket", "Curve", "Failure", "Limit", "Report", "every_tokens", "gather"]

_PEAK_BYTES_PER_S: Mapping[str, float] = {
    "B200": 8.0e12,
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100-SXM4-40GB": 1.555e12,
    "L40S": 0.864e12,
    "RTX 4090": 1.008e12,
    "MI325X": 6.0e12,
    "MI300X": 5.3e12,
}
"""Memory bandwidth by the makers' data sheets; of two names that fit, the one that stands first counts."""


@dataclass(frozen=True)
class Limit:
    """The memory bandwidth of a device in bytes/s, and where the figure is from."""

    bytes_per_s: float
    source: str


@dataclass(frozen=True)
class Bucket:
    """A winner, with what it was compared with.

    Attributes:
        baselines_us: kind of baseline → median time in µs.
        floor_us: the time that the bytes it must move take at the device's bandwidth; None where that is unknown.
        state: what speaks against using it; "" where nothing does.
        rival: the best in another language, where anything was measured in one.
    """

    winner: Winner
    baselines_us: Mapping[str, float]
    floor_us: float | None
    state: str
    rival: Rival | None = None

    @property
    def share(self) -> float | None:
        """Of the speed of light: 1 where the time is no more than the bytes need."""
        return None if self.floor_us is None else self.floor_us / self.winner.time_us


@dataclass(frozen=True)
class Curve:
    """The buckets of one problem on one target, by T.

    Attributes:
        peers: name of another library's kernel → T → its recorded time in µs.
        worths: what each tunable is worth; empty where too few configs were timed.
    """

    target: Target
    problem: Problem
    buckets: tuple[Bucket, ...]
    peers: Times = field(default_factory=dict)
    worths: tuple[Worth, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Trials that failed in the same way."""

    target: Target
    op: str
    status: str
    message: str
    count: int
    example: str


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        trials: how many configs were measured or failed.
        limits: target → its bandwidth, where known.
        history: winners of before, the last replaced first.
    """

    path: str
    trials: int
    curves: tuple[Curve, ...]
    limits: Mapping[Target, Limit]
    failures: tuple[Failure, ...]
    history: tuple[FormerWinner, ...]


def gather(database: TunedDatabase, state_of: Callable[[Winner], str], peers: Sequence[Peers] = ()) -> Report:
    """Reads what there is to report. Raises DatabaseError.

    Args:
        state_of: what speaks against using a winner; "" where nothing does.
        peers: what was recorded of other libraries; shown where device and problem are the same.
    """
    winners = database.every(Winner, candidates=True)
    baselines: dict[tuple[object, ...], dict[str, float]] = {}
    for one in database.every(Baseline):
        baselines.setdefault((one.target, one.problem, one.tokens), {})[one.kind] = one.time_us
    limits = _limits(winners)
    groups: dict[tuple[Target, Problem], list[Bucket]] = {}
    for winner in winners:
        limit, moved = limits.get(winner.target), _bytes_moved(winner)
        floor = None if limit is None or moved is None else moved / limit.bytes_per_s * 1e6
        known = baselines.get((winner.target, winner.problem, winner.tokens), {winner.baseline: winner.baseline_us})
        bucket = Bucket(winner, known, floor, state_of(winner), rival_of(database, winner))
        groups.setdefault((winner.target, winner.problem), []).append(bucket)
    trials = database.every(Trial)
    by_kernel: dict[tuple[object, ...], list[Trial]] = {}
    for trial in trials:
        by_kernel.setdefault((trial.target, trial.problem, trial.source_hash), []).append(trial)
    curves = []
    for (target, problem), buckets in groups.items():
        last = max((bucket.winner for bucket in buckets), key=lambda winner: (not is_stale(winner), winner.measured_at))
        present = by_kernel.get((target, problem, last.source_hash), ())
        curves.append(Curve(target, problem, tuple(buckets), _peers(target, problem, peers), worths(present)))
    failures = Counter((t.target, t.problem.op, t.status, t.message) for t in trials if t.failed)
    examples = {(t.target, t.problem.op, t.status, t.message): str(t.config) for t in trials}
    listed = tuple(Failure(*key, count, examples[key]) for key, count in failures.most_common())
    return Report(str(database.path), len(trials), tuple(curves), limits, listed, tuple(database.history()))


def _peers(target: Target, problem: Problem, peers: Iterable[Peers]) -> Times:
    found: dict[str, Mapping[int, float]] = {}
    for known in peers:
        if known.device == target.device_name:
            found.update(known.times.get(problem, {}))
    return found


def _limits(winners: Iterable[Winner]) -> dict[Target, Limit]:
    """The makers' figure, else the highest rate that a winner of the database reached on that device."""
    limits: dict[Target, Limit] = {}
    reached: dict[Target, float] = {}
    for winner in winners:
        peak = next((rate for name, rate in _PEAK_BYTES_PER_S.items() if name in winner.target.device_name), None)
        if peak is not None:
            limits[winner.target] = Limit(peak, "by its data sheet")
        elif (moved := _bytes_moved(winner)) is not None:
            rate = moved / winner.time_us * 1e6
            reached[winner.target] = max(rate, reached.get(winner.target, 0.0))
    return {
        **{target: Limit(rate, "the most that a winner here reached") for target, rate in reached.items()},
        **limits,
    }


def _bytes_moved(winner: Winner) -> int | None:
    op = OPS.get(winner.problem.op)
    try:
        return None if op is None else op.bytes_moved(winner.problem, winner.tokens)
    except (AutofuseError, KeyError, TypeError, ValueError):  # a problem of another version of the op
        return None


def every_tokens(curves: Sequence[Curve]) -> list[int]:
    """Each T that any of them was tuned at, ascending."""
    return sorted({bucket.winner.tokens for curve in curves for bucket in curve.buckets})
