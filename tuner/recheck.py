"""Winners measured again, the cheap way: is the config still right, and does the recorded gain still hold?

No search: one config a bucket is verified as a candidate is, and then timed in turns with the unfused code. A tuning
job does the same with its last candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from autofuse.cache_db import Baseline, Captured, Trial, TunedDatabase, Winner, software_changes, timed_alike
from autofuse.cache_db.foreign import left_out
from autofuse.cache_db.store import Provenance
from autofuse.errors import BadInput, CompileError, TargetUnavailable
from autofuse.ops import Config, get_op
from autofuse.targets import target_of
from autofuse.tuner.bench import EAGER
from autofuse.tuner.budgets import Effort
from autofuse.tuner.compile_ahead import compile_pool
from autofuse.tuner.failures import CandidateFailed, Subject
from autofuse.tuner.isolation import IsolatedBench
from autofuse.tuner.job import provenance_of
from autofuse.tuner.known import still_searched
from autofuse.tuner.measure import Gain, Timing, gain

__all__ = ["AGREES_WITHIN", "VERDICTS", "Checked", "agrees", "recheck"]

VERDICTS = ("agrees", "disputed", "failed", "unchecked")

AGREES_WITHIN = 1.05
"""By which factor two 95 % intervals of a gain may miss each other: from one session to the next, clocks, memory layout
and other work shift a gain by more than the rounds of one session differ."""


@dataclass(frozen=True)
class Checked:
    """What came of one winner.

    Attributes:
        before: as it was recorded.
        verdict: ``agrees``: the config is right and the gain is as recorded; ``disputed``: it is right, and the gain is
            another; ``failed``: it does not compile, or run, or is wrong; ``unchecked``: that could not be found out,
            for memory that others hold, a baseline that fails, unsteady times, which would agree with anything, or a
            gain that is another while other work went on.
        now: as it was measured; None unless it was.
        status: one of ``TRIAL_STATUSES``; "" where the config is none of the op's.
        message: what failed.
        disturbances: what else went on meanwhile, in words for a person.
    """

    before: Winner
    verdict: str
    now: Winner | None = None
    status: str = ""
    message: str = ""
    disturbances: tuple[str, ...] = ()


def agrees(recorded: Winner, now: Winner) -> bool:
    """Whether the intervals of both gains meet within AGREES_WITHIN, and both or neither beat the unfused code."""
    low, high = max(recorded.gain_low, now.gain_low), min(recorded.gain_high, now.gain_high)
    return low <= high * AGREES_WITHIN and recorded.beats_baseline == now.beats_baseline


def recheck(
    winners: Sequence[Winner],
    device: torch.device,
    database: TunedDatabase,
    effort: Effort,
    on_checked: Callable[[Checked], None] = lambda checked: None,
) -> list[Checked]:
    """Checks winners of the present kernel sources and of ``device``'s target, and records each outcome at once.

    What agrees and was measured here, with the present driver, toolkit and compiler, stays as it is: it has more rounds
    behind it. What else agrees is recorded as measured here. What is ``disputed`` is recorded with its present figures,
    by which it decides, and as a site that is to be tuned again. What failed becomes a failed trial and is no winner
    any more, nor again: neither a rollback nor an import brings it back; its site is to be tuned again, too.

    Args:
        on_checked: called as the work goes on.

    Raises: BadInput, DatabaseError, TargetUnavailable: the latter also where not one of the configs compiles, which is
        the compiler's fault rather than theirs.
    """
    if not winners:
        return []
    return _Recheck(device, database, effort, on_checked).run(winners)


class _Recheck:
    def __init__(
        self, device: torch.device, database: TunedDatabase, effort: Effort, on_checked: Callable[[Checked], None]
    ) -> None:
        self._device = device
        self._target = target_of(device)
        self._database = database
        self._effort = effort
        self._on_checked = on_checked
        self._provenance = database.record_provenance(provenance_of(device))
        self._done: list[Checked] = []

    def run(self, winners: Sequence[Winner]) -> list[Checked]:
        fit = []
        for winner in winners:
            if why := _none_of_ours(winner):
                self._settle(Checked(winner, "failed", message=why))
            else:
                fit.append(winner)
        specs = [get_op(w.problem.op).spec(self._target.kind, w.problem, w.config) for w in fit]
        held: list[Checked] = []  # what does not compile, until it is known that anything does
        compiles = False
        with (
            compile_pool(self._target.kind, self._target.arch) as pool,
            IsolatedBench(self._device, self._effort) as bench,
        ):
            for winner, compiling in zip(fit, pool.submit(specs), strict=True):
                try:
                    compiling.result()
                except CompileError as error:
                    held.append(Checked(winner, "failed", status="compile_error", message=str(error)))
                else:
                    compiles = True
                    held.append(self._check(bench, winner))
                while compiles and held:
                    self._settle(held.pop(0))
        if held:
            raise TargetUnavailable(f"no winner compiles, the first for: {held[0].message}")
        return self._done

    def _check(self, bench: IsolatedBench, winner: Winner) -> Checked:
        bench.open(winner.problem, winner.tokens, winner.source_hash)
        try:
            error = bench.verify(winner.config)
            measured = _steadiest(bench, winner.config, _baselines(bench), self._effort)
        except CandidateFailed as failed:
            # Memory that others hold is not the config's fault, nor is a baseline that fails.
            known = failed.subject == winner.config and failed.status != "out_of_memory"
            return Checked(winner, "failed" if known else "unchecked", status=failed.status, message=str(failed))
        if measured.width > self._effort.steady_interval:
            message = (
                f"the times are unsteady: the gain's interval is {measured.gain.low:.2f} to {measured.gain.high:.2f}"
            )
            return Checked(winner, "unchecked", message=message, disturbances=measured.disturbances)
        return self._compared(winner, error, measured)

    def _compared(self, winner: Winner, error: float, measured: _Measured) -> Checked:
        """Records the measurement, unless the one before is as good as it was."""
        kind = measured.fastest
        ours, theirs = measured.timing, measured.baselines[kind]
        fields = {**self._database.provenance(self._provenance), **still_searched(self._database, winner)}
        if measured.disturbances:
            fields["disturbances"] = "; ".join(measured.disturbances)
        provenance = self._database.record_provenance(fields)
        now = replace(
            winner,
            time_us=ours.median_us,
            spread_us=ours.spread_us,
            baseline=kind,
            baseline_us=theirs.median_us,
            gain=measured.gain.median,
            gain_low=measured.gain.low,
            gain_high=measured.gain.high,
            provenance=provenance,
            measured_at="",
            standing="own",
        )
        new_figures = self._timed_otherwise(winner) and not measured.disturbances
        if new_figures or agrees(winner, now):
            if winner.standing == "own" and not self._in_doubt(winner):
                return Checked(winner, "agrees", now, disturbances=measured.disturbances)
        elif measured.disturbances:
            return Checked(winner, "unchecked", now, "", "it may be for what went on meanwhile", measured.disturbances)
        else:
            now = replace(now, standing="disputed")
        with self._database.transaction():
            for name, timing in measured.baselines.items():
                times = (timing.median_us, timing.spread_us)
                self._database.record_baseline(
                    Baseline(self._target, winner.problem, winner.tokens, name, *times, provenance)
                )
            trial = self._trial(winner, "ok", time_us=now.time_us, spread_us=now.spread_us, error=error)
            self._database.record_trial(replace(trial, provenance=provenance))
            now = self._database.record_winner(now)
        verdict = "agrees" if now.standing == "own" else "disputed"
        return Checked(winner, verdict, now, disturbances=measured.disturbances)

    def _in_doubt(self, winner: Winner) -> bool:
        """Whether the software has changed since it was measured, or nobody knows."""
        return not winner.provenance or bool(software_changes(*self._then_and_now(winner)))

    def _timed_otherwise(self, winner: Winner) -> bool:
        """Whether its figures are of another way of timing, so that others do not contradict them."""
        return bool(winner.provenance) and not timed_alike(*self._then_and_now(winner))

    def _then_and_now(self, winner: Winner) -> tuple[Provenance, Provenance]:
        return self._database.provenance(winner.provenance), self._database.provenance(self._provenance)

    def _settle(self, checked: Checked) -> None:
        winner = checked.before
        with self._database.transaction():
            if checked.verdict == "failed":
                if checked.status:
                    self._database.record_trial(self._trial(winner, checked.status, message=checked.message))
                self._database.forget_winner(winner)
            if checked.verdict in ("failed", "disputed"):
                self._database.record_captured(Captured(self._target, winner.problem, winner.tokens, winner.tokens))
        self._done.append(checked)
        self._on_checked(checked)

    def _trial(self, winner: Winner, status: str, **facts: Any) -> Trial:
        return Trial(
            self._target,
            winner.problem,
            winner.tokens,
            winner.config,
            winner.source_hash,
            status,
            provenance=self._provenance,
            **facts,
        )


@dataclass(frozen=True)
class _Measured:
    """A config timed in turns with the baselines, by kind."""

    timing: Timing
    baselines: Mapping[str, Timing]
    disturbances: tuple[str, ...]

    @property
    def fastest(self) -> str:
        return min(self.baselines, key=lambda kind: self.baselines[kind].median_us)

    @property
    def gain(self) -> Gain:
        return gain(self.baselines[self.fastest], self.timing)

    @property
    def width(self) -> float:
        return self.gain.high / self.gain.low


def _none_of_ours(winner: Winner) -> str | None:
    """Why this autofuse has no such problem, or no such config; None where it has."""
    try:
        return left_out(winner)
    except BadInput as error:
        return str(error)


def _baselines(bench: IsolatedBench) -> list[str]:
    try:
        return bench.baselines(compiled=True)
    except CandidateFailed as failed:
        if failed.subject == EAGER:
            raise
        return bench.baselines(compiled=False)


def _steadiest(bench: IsolatedBench, config: Config, kinds: Sequence[str], effort: Effort) -> _Measured:
    """Of a few measurements, fewer where one is steady, the one with the narrowest interval of the gain."""
    done: list[_Measured] = []
    subjects: list[Subject] = [*kinds, config]
    for seed in range(1, 1 + effort.attempts):
        together = bench.interleave(subjects, effort.final_rounds, seed)
        *theirs, ours = together.timings
        for subject, timing in zip(subjects, together.timings, strict=True):
            for time_us in timing.rounds_us:
                if not (math.isfinite(time_us) and time_us > 0):
                    raise CandidateFailed(subject, "wrong", f"a call cannot take {time_us} µs")
        done.append(_Measured(ours, dict(zip(kinds, theirs, strict=True)), together.disturbances))
        if done[-1].width <= effort.steady_interval:
            break
    return min(done, key=lambda measured: measured.width)
