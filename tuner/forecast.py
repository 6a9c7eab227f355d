"""What a job would do, and how long it would take, before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from statistics import mean

import torch

from autofuse.cache_db import Baseline, Trial, TunedDatabase, Winner
from autofuse.cache_db.records import parse_time
from autofuse.cache_db.store import Provenance
from autofuse.ops import get_op
from autofuse.targets import Target, target_of
from autofuse.tuner.budgets import GUESSED_PACE, LONGEST_PAUSE_S, Effort, Pace
from autofuse.tuner.devices import lanes
from autofuse.tuner.job import provenance_of
from autofuse.tuner.known import imported, known_of
from autofuse.tuner.queue import Bucket
from autofuse.tuner.search import search_for

__all__ = ["Forecast", "Outlook", "forecast", "paces"]


@dataclass(frozen=True)
class Outlook:
    """What a job would do with one bucket.

    Attributes:
        state: ``tuned`` (nothing is left to do), ``begun`` (some configs are measured), ``stale`` (tuned with another
            version of the kernel, or timed in another way), ``again`` (it is to be measured anew) or ``new``.
        known: configs that the database knows.
        trials: configs that would be measured, at most.
        seconds: from its begin to its end.
    """

    bucket: Bucket
    state: str
    known: int
    trials: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What a job would do.

    Attributes:
        outlooks: of each bucket, in the job's order.
        seconds: that all would take, on the devices there are.
        basis: what the seconds are taken from, as part of a sentence.
    """

    outlooks: tuple[Outlook, ...]
    seconds: float
    basis: str


def forecast(
    buckets: Sequence[Bucket],
    devices: Sequence[torch.device],
    database: TunedDatabase,
    effort: Effort,
    *,
    retune: bool = False,
    budget_s: float | None = None,
) -> Forecast:
    """What tuning ``buckets`` on equal ``devices`` would do. Writes nothing, and runs nothing on a device.

    Times are the pace of what was recorded on this target: of the same op where there are such trials, else of all. It
    is taken to have been recorded with as many buckets at a time as there would be.
    """
    target = target_of(devices[0])
    provenance = provenance_of(devices[0])
    known_paces = paces(database, target)
    on_target = _mean(known_paces.values())
    outlooks, guessed = [], set()
    for bucket in buckets:
        pace = known_paces.get(bucket.problem.op) or on_target
        if pace is None:
            guessed.add(bucket.problem.op)
        state, known, trials = _outlook(bucket, target, database, effort, provenance, retune)
        rate = pace or GUESSED_PACE[target.kind]
        # A bucket whose configs are all known lacks only its last measurement.
        seconds = 0.0 if state == "tuned" else rate.bucket_s + trials * rate.trial_s
        outlooks.append(Outlook(bucket, state, known, trials, seconds))
    each = [outlook.seconds for outlook in outlooks]
    seconds = max(sum(each) / len(lanes(devices, len(each))), *each) if each else 0.0
    if not any(each):
        basis = "nothing is left to measure"
    elif on_target is None:
        basis = f"guessed: nothing was measured on {target} yet"
    elif elsewhere := {outlook.bucket.problem.op for outlook in outlooks if outlook.seconds} - known_paces.keys():
        basis = f"from trials on {target}; of {', '.join(sorted(elsewhere))} from those of other ops"
    else:
        basis = f"from trials of the same ops on {target}"
    if budget_s is not None and budget_s < seconds:
        seconds, basis = budget_s, f"as --budget allows; all of it would take {seconds:.0f} s, {basis}"
    return Forecast(tuple(outlooks), seconds, basis)


def paces(database: TunedDatabase, target: Target) -> Mapping[str, Pace]:
    """Op → pace, of the ops that anything was measured of on ``target``.

    Trials are recorded as they are made, so the time between two of a bucket is that of the later one, and the time
    from the last to the winner that of the last measurement. More than LONGEST_PAUSE_S was an interruption.
    """
    rows: dict[tuple[str, str, int], list[datetime]] = {}
    for trial in database.every(Trial, target):
        if trial.measured_at:
            key = (trial.problem.op, str(trial.problem), trial.tokens)
            rows.setdefault(key, []).append(parse_time(trial.measured_at))
    finished: dict[tuple[str, str, int], datetime] = {}
    last: list[Winner | Baseline] = [*database.every(Winner, target), *database.every(Baseline, target)]
    for record in last:
        if record.measured_at:
            key, at = (record.problem.op, str(record.problem), record.tokens), parse_time(record.measured_at)
            finished[key] = max(at, finished.get(key, at))
    trial_gaps: dict[str, list[float]] = {}
    final_gaps: dict[str, list[float]] = {}
    for key, times in rows.items():
        times.sort()
        gaps = [(later - earlier).total_seconds() for earlier, later in pairwise(times)]
        trial_gaps.setdefault(key[0], []).extend(gap for gap in gaps if gap <= LONGEST_PAUSE_S)
        if key in finished and 0 <= (gap := (finished[key] - times[-1]).total_seconds()) <= LONGEST_PAUSE_S:
            final_gaps.setdefault(key[0], []).append(gap)
    guess = GUESSED_PACE[target.kind]
    found = {}
    for op, gaps in trial_gaps.items():
        if gaps:
            bucket_s = mean(final_gaps[op]) + guess.open_s if final_gaps.get(op) else guess.bucket_s
            found[op] = Pace(mean(gaps), bucket_s, guess.open_s)
    return found


def _mean(known: Iterable[Pace]) -> Pace | None:
    every = list(known)
    if not every:
        return None
    return Pace(*(mean(getattr(pace, name) for pace in every) for name in ("trial_s", "bucket_s", "open_s")))


def _outlook(
    bucket: Bucket, target: Target, database: TunedDatabase, effort: Effort, provenance: Provenance, retune: bool
) -> tuple[str, int, int]:
    """State, configs known, configs to measure."""
    op = get_op(bucket.problem.op)
    before = known_of(database, target, bucket, provenance)
    first = imported(database, target, bucket, effort)
    if not retune and before.is_done(effort, op.source_hashes(target.kind), first):
        return "tuned", len(before.trials), 0
    known = {} if retune else before.trials
    times = {config: None if trial.failed else trial.time_us for config, trial in known.items()}
    kernels = op.kernel_sources(target.kind)
    total = search_for(kernels, bucket.problem, bucket.tokens, times, first, effort, seed=0, wanted=first).total
    if retune and (before.trials or before.winner):
        return "again", len(before.trials), total
    if before.fresh and total == 0:
        return "tuned", len(known), 0
    if known:
        return "begun", len(known), total
    return "stale" if before.winner else "new", 0, total
