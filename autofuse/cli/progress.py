"""The progress of tuning, on standard error: one bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from autofuse.cli.output import console, gain, microseconds
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import Bucket, BucketDone, BucketStarted, Event, TrialDone

__all__ = ["Show", "outcome", "progress"]

Show = Callable[[Event | None], None]

_LINE_EVERY_S = 5.0
_FINAL_STEPS = 10  # the baselines' compilation and the last measurement take about as long as so many trials


@contextmanager
def progress(buckets: int, effort: Effort) -> Iterator[Show]:
    """Gives a function to call with each event of tuning ``buckets`` buckets, and with None when it is stopped."""
    out = console(stderr=True)
    guess = min(effort.trials, effort.exhaustive_up_to)
    if not out.is_terminal:
        yield _Lines(buckets, guess).show
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(elapsed_when_finished=False))
    with Progress(*columns, *times, console=out, transient=True) as bar:
        yield _Bar(bar, buckets, guess).show


@dataclass
class _Present:
    """A bucket that is being tuned: trials so far, of them failed, at most to come in all, and the best time."""

    of: int
    trials: int = 0
    failed: int = 0
    best_us: float | None = None

    def __str__(self) -> str:
        best = f", best {microseconds(self.best_us)} µs" if self.best_us is not None else ""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.trials}/{self.of} configs{best}{failed}"


class _Count:
    """How many steps of how many are done, on all devices together. What buckets to come will cost is guessed from the
    last that began.
    """

    def __init__(self, buckets: int, guess: int) -> None:
        self.buckets = buckets
        self.finished = 0
        self._begun = 0
        self._guess = guess
        self._before = 0  # steps of the buckets that are finished
        self._present: dict[Bucket, _Present] = {}

    def take(self, event: Event) -> None:
        if isinstance(event, BucketStarted):
            self._begun += 1
            self._present[event.bucket] = _Present(event.trials)
            self._guess = event.trials or self._guess
        elif isinstance(event, TrialDone):
            present, time_us = self._present[event.bucket], event.trial.time_us
            present.trials += 1
            present.failed += event.trial.failed
            if time_us is not None and (present.best_us is None or time_us < present.best_us):
                present.best_us = time_us
        else:
            present = self._present.pop(event.bucket)
            self.finished += 1
            self._before += present.trials + _FINAL_STEPS if event.measured else 0

    @property
    def done(self) -> int:
        return self._before + sum(present.trials for present in self._present.values())

    @property
    def total(self) -> int:
        present = sum(each.of + _FINAL_STEPS for each in self._present.values() if each.of)
        to_come = max(self.buckets - self._begun, 0) * (self._guess + _FINAL_STEPS)
        return max(self._before + present + to_come, self.done, 1)

    def describe(self, bucket: Bucket) -> str:
        """What is being done in ``bucket``; "" if it is finished."""
        return str(self._present.get(bucket, ""))


class _Bar:
    def __init__(self, bar: Progress, buckets: int, guess: int) -> None:
        self._bar = bar
        self._count = _Count(buckets, guess)
        self._task = bar.add_task("starting", total=self._count.total)

    def show(self, event: Event | None) -> None:
        if event is None:
            self._bar.stop()
            return
        count = self._count
        count.take(event)
        if isinstance(event, BucketDone):
            self._bar.console.print(outcome(event), markup=False, soft_wrap=True)
        what = f"{event.bucket.problem.op} T={event.bucket.tokens}: {count.describe(event.bucket)}".removesuffix(": ")
        text = f"{count.finished}/{count.buckets} tuned; {what}"
        self._bar.update(self._task, completed=count.done, total=count.total, description=text)


class _Lines:
    def __init__(self, buckets: int, guess: int) -> None:
        self._count = _Count(buckets, guess)
        self._last = time.monotonic()
        self._first: float | None = None  # when the first trial was done: what came before tells nothing of the rest

    def show(self, event: Event | None) -> None:
        if event is None:
            return
        count = self._count
        count.take(event)
        now = time.monotonic()
        if self._first is None and count.done:
            self._first = now
        if isinstance(event, BucketStarted) and event.trials:
            typer.echo(f"{_name(event.bucket)}: up to {event.trials} configs to measure", err=True)
        elif isinstance(event, BucketDone):
            typer.echo(outcome(event), err=True)
        elif isinstance(event, TrialDone) and now - self._last >= _LINE_EVERY_S:
            done = f"{count.finished}/{count.buckets} tuned" if count.buckets > 1 else ""
            left = f"about {self._left_s(now):.0f} s left" if count.done > 1 else ""
            typer.echo(f"  {', '.join(filter(None, (count.describe(event.bucket), done, left)))}", err=True)
        else:
            return
        self._last = now

    def _left_s(self, now: float) -> float:
        assert self._first is not None
        return (now - self._first) / (self._count.done - 1) * (self._count.total - self._count.done)


def _name(bucket: Bucket) -> str:
    return f"{bucket.problem} T={bucket.tokens}"


def outcome(event: BucketDone) -> str:
    """One line: the winner, its gain over the better baseline, and its share of the memory's bandwidth."""
    winner = event.winner
    if winner is None:
        return f"{_name(event.bucket)}: no config works"
    share = event.bandwidth_share
    facts = [
        f"{microseconds(winner.time_us)} µs",
        f"{gain(winner)} over {winner.baseline}",
        *([f"{share:.{0 if share >= 0.1 else 1}%} of the bandwidth".replace("%", " %")] if share is not None else []),
        str(winner.config),
    ]
    known = "" if event.measured else " (tuned already)"
    disturbed = f" (measured with {', '.join(event.disturbances)})" if event.disturbances else ""
    return f"{_name(event.bucket)}: {', '.join(facts)}{known}{disturbed}"
