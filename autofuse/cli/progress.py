"""The progress of tuning, on standard error: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from autofuse.cli.output import console, gain, microseconds
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import Bucket, BucketDone, BucketStarted, Event, TrialDone

__all__ = ["progress"]

_LINE_EVERY_S = 5.0
_FINAL_STEPS = 10  # the baselines' compilation and the last measurement take about as long as so many trials


@contextmanager
def progress(buckets: int, effort: Effort) -> Iterator[Callable[[Event | None], None]]:
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


class _Count:
    """How many steps of how many are done. What buckets to come will cost is guessed from the last."""

    def __init__(self, buckets: int, guess: int) -> None:
        self._to_come = buckets
        self._guess = guess
        self._before = 0  # steps of the buckets that are finished
        self.trials = 0  # of the present bucket
        self.failed = 0
        self.of = 0
        self.best_us: float | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, BucketStarted):
            self._to_come -= 1
            self.trials, self.failed, self.of, self.best_us = 0, 0, event.trials, None
            self._guess = event.trials or self._guess
        elif isinstance(event, TrialDone):
            self.trials += 1
            self.failed += event.trial.failed
            time_us = event.trial.time_us
            if time_us is not None and (self.best_us is None or time_us < self.best_us):
                self.best_us = time_us
        elif event.measured:
            self._before += self.trials + _FINAL_STEPS
            self.trials = self.of = 0

    @property
    def done(self) -> int:
        return self._before + self.trials

    @property
    def total(self) -> int:
        present = self.of + _FINAL_STEPS if self.of else 0
        return max(self._before + present + self._to_come * (self._guess + _FINAL_STEPS), self.done, 1)

    def describe(self) -> str:
        best = f", best {microseconds(self.best_us)} µs" if self.best_us is not None else ""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.trials}/{self.of} configs{best}{failed}"


class _Bar:
    def __init__(self, bar: Progress, buckets: int, guess: int) -> None:
        self._bar = bar
        self._count = _Count(buckets, guess)
        self._task = bar.add_task("starting", total=self._count.total)

    def show(self, event: Event | None) -> None:
        if event is None:
            self._bar.stop()
            return
        self._count.take(event)
        if isinstance(event, BucketDone):
            self._bar.console.print(_outcome(event), markup=False, soft_wrap=True)
        text = f"{event.bucket.problem.op} T={event.bucket.tokens}: {self._count.describe()}"
        self._bar.update(self._task, completed=self._count.done, total=self._count.total, description=text)


class _Lines:
    def __init__(self, buckets: int, guess: int) -> None:
        self._count = _Count(buckets, guess)
        self._begin = self._last = time.monotonic()

    def show(self, event: Event | None) -> None:
        if event is None:
            return
        self._count.take(event)
        now = time.monotonic()
        if isinstance(event, BucketStarted) and event.trials:
            typer.echo(f"{_name(event.bucket)}: up to {event.trials} configs to measure", err=True)
        elif isinstance(event, BucketDone):
            typer.echo(_outcome(event), err=True)
        elif isinstance(event, TrialDone) and now - self._last >= _LINE_EVERY_S:
            left = (now - self._begin) / self._count.done * (self._count.total - self._count.done)
            typer.echo(f"  {self._count.describe()}, about {left:.0f} s left", err=True)
        else:
            return
        self._last = now


def _name(bucket: Bucket) -> str:
    return f"{bucket.problem} T={bucket.tokens}"


def _outcome(event: BucketDone) -> str:
    winner = event.winner
    if winner is None:
        return f"{_name(event.bucket)}: no config works"
    known = "" if event.measured else " (tuned already)"
    disturbed = f" (measured with {', '.join(event.disturbances)})" if event.disturbances else ""
    return (
        f"{_name(event.bucket)}: {microseconds(winner.time_us)} µs, "
        f"{gain(winner)} over {winner.baseline}, {winner.config}{known}{disturbed}"
    )
