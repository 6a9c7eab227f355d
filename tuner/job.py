"""The tuning job: buckets in, winners in the database out.

No candidate ever runs in this process, and nothing here uses a GPU: what has to be done on the device, the bench does
in a process of its own.
"""

from __future__ import annotations

import hashlib
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from autofuse.cache_db import Baseline, Trial, TunedDatabase, Winner
from autofuse.cache_db.store import Provenance
from autofuse.errors import AutofuseError, CompileError, TargetUnavailable
from autofuse.ops import Config, FusedOp, get_op
from autofuse.targets import Artifact, Target, target_of, toolchain
from autofuse.tuner.bench import EAGER
from autofuse.tuner.budgets import FINAL_SHARE, Effort
from autofuse.tuner.compile_ahead import CompilePool, compile_pool
from autofuse.tuner.failures import CandidateFailed, Subject
from autofuse.tuner.isolation import IsolatedBench
from autofuse.tuner.known import DIED, DIED_AGAIN, imported, known_of, searched
from autofuse.tuner.measure import Gain, Timing, gain
from autofuse.tuner.queue import Bucket, BucketQueue, Share
from autofuse.tuner.search import grid_size, search_for
from autofuse.tuner.stand_in import way_of_timing
from autofuse.tuner.ties import choose

__all__ = [
    "Bucket",
    "BucketDone",
    "BucketStarted",
    "Event",
    "TrialDone",
    "provenance_of",
    "tune_buckets",
    "tune_shares",
]

logger = logging.getLogger("autofuse.tuner")


@dataclass(frozen=True)
class BucketStarted:
    """A bucket's search begins; ``trials`` is the most it will measure, 0 where nothing is left to do."""

    bucket: Bucket
    trials: int


@dataclass(frozen=True)
class TrialDone:
    """A config was measured, or failed."""

    bucket: Bucket
    trial: Trial


@dataclass(frozen=True)
class BucketDone:
    """A bucket is finished.

    Attributes:
        winner: None where no config was right.
        measured: False if all was known.
        bandwidth_share: of the memory's bandwidth, what the winner reaches if it moves each byte once; None where that
            was not measured.
        disturbances: what else went on while the winner's time and gain were measured, in words for a person.
    """

    bucket: Bucket
    winner: Winner | None
    measured: bool
    bandwidth_share: float | None = field(default=None, compare=False)
    disturbances: tuple[str, ...] = ()


Event = BucketStarted | TrialDone | BucketDone


def tune_buckets(
    buckets: Sequence[Bucket],
    device: torch.device,
    database: TunedDatabase,
    effort: Effort,
    *,
    retune: bool = False,
    seed: int = 0,
    budget_s: float | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Winner]:
    """Tunes each bucket on ``device``; what the database knows of the present kernel sources is not measured again.

    Candidates run in a worker process that owns the device; whatever they do to it, they become failed trials and the
    job goes on. An op of one's own needs a module that the worker can import (see ``OpRegistry.add``).

    Every trial is in the database as soon as it is measured: an interrupted job goes on where it was. A config is a
    failure there from before it runs, so that one that takes the whole machine down is known. If this process dies
    meanwhile, which need not be the config's fault, the next job tries the config once more, and no third time. Other
    failures are tried again where the provenance (driver, toolkit, compiler…) is another one.

    Args:
        retune: measure everything anew.
        seed: of the search.
        budget_s: how long all of it may take, in equal shares; None for as long as it takes. A search that is cut short
            still gives a winner, of what it measured; the next job goes on with it. Buckets that no time is left for
            are not begun. What runs when the time is over is finished.
        on_event: called as the work goes on.

    Returns: the winners, of buckets that have one.
    Raises: BadInput, TargetUnavailable, DatabaseError. A config that fails is a row, not an error; if not one of a
        bucket compiles, that is the compiler's fault rather than theirs: TargetUnavailable, and no row.
    """
    queue = BucketQueue(buckets, budget_s)
    return tune_shares(queue.take, device, database, effort, retune=retune, seed=seed, on_event=on_event)


def tune_shares(
    take: Callable[[], Share | None],
    device: torch.device,
    database: TunedDatabase,
    effort: Effort,
    *,
    retune: bool = False,
    seed: int = 0,
    on_event: Callable[[Event], None] = lambda event: None,
    compilers: int | None = None,
    turns: Path | None = None,
) -> list[Winner]:
    """Tunes what it takes on ``device``, until nothing is left: ``tune_buckets`` for one of several processes.

    Args:
        take: gives the next bucket and its time; None at the end.
        compilers: how many candidates compile at a time; as many as there are cores, unless given.
        turns: the file of the ``Turns`` that others take on the device as well; None where nobody does.
    """
    target = target_of(device)
    provenance = database.record_provenance(provenance_of(device))
    winners = []
    with compile_pool(target.kind, target.arch, compilers) as pool, IsolatedBench(device, effort, turns) as bench:
        tell = _with_bandwidth(bench, on_event)
        while share := take():
            tuning = _BucketTuning(share.bucket, target, database, effort, provenance, pool, bench, tell)
            if winner := tuning.run(retune=retune, seed=seed, budget_s=share.budget_s):
                winners.append(winner)
    return winners


def _with_bandwidth(bench: IsolatedBench, on_event: Callable[[Event], None]) -> Callable[[Event], None]:
    """``on_event``, told besides which share of the bandwidth a winner reaches. It is measured once, on first use."""
    found: list[float | None] = []

    def tell(event: Event) -> None:
        if isinstance(event, BucketDone) and event.measured and event.winner is not None:
            if not found:
                found.append(_bandwidth(bench))
            if bytes_per_us := found[0]:
                moved = get_op(event.bucket.problem.op).bytes_moved(event.bucket.problem, event.bucket.tokens)
                event = replace(event, bandwidth_share=moved / bytes_per_us / event.winner.time_us)
        on_event(event)

    return tell


def _bandwidth(bench: IsolatedBench) -> float | None:
    try:
        return bench.bandwidth()
    except (CandidateFailed, AutofuseError, MemoryError, RuntimeError) as error:  # a line for a person lacks a number
        logger.info("the bandwidth cannot be measured: %s", error)
        return None


def provenance_of(device: torch.device) -> dict[str, str | int | float | None]:
    """What else than the config could change a timing on ``device``."""
    kind = target_of(device).kind
    return {
        "host": platform.node(),
        "torch": torch.__version__,
        "autofuse": _autofuse_version(),
        **way_of_timing(kind),
        **toolchain(kind).provenance(device),
    }


class _BucketTuning:
    """The tuning of one bucket."""

    def __init__(
        self,
        bucket: Bucket,
        target: Target,
        database: TunedDatabase,
        effort: Effort,
        provenance: str,
        pool: CompilePool,
        bench: IsolatedBench,
        on_event: Callable[[Event], None],
    ) -> None:
        self._bucket = bucket
        self._problem, self._tokens = bucket.problem, bucket.tokens
        self._op: FusedOp = get_op(bucket.problem.op)
        self._target = target
        self._database = database
        self._effort = effort
        self._provenance = provenance
        self._pool = pool
        self._bench = bench
        self._on_event = on_event
        self._kernels = self._op.kernel_sources(target.kind)
        self._sources = self._op.source_hashes(target.kind)
        self._disturbances: tuple[str, ...] = ()
        self._searched: Provenance = {}  # what a winner's provenance says of its search
        self._by_code: dict[tuple[object, ...], Trial] = {}  # of what ran

    def run(self, *, retune: bool, seed: int, budget_s: float | None) -> Winner | None:
        stop_search = float("inf") if budget_s is None else time.monotonic() + (1 - FINAL_SHARE) * budget_s
        before = known_of(self._database, self._target, self._bucket, self._database.provenance(self._provenance))
        known = {} if retune else before.trials
        times = {config: None if trial.failed else trial.time_us for config, trial in known.items()}
        first, imported = self._first_configs(), self._imported()
        if not retune and before.is_done(self._effort, self._sources, imported):
            self._on_event(BucketStarted(self._bucket, 0))
            self._on_event(BucketDone(self._bucket, before.winner, measured=False))
            return before.winner
        described = grid_size(self._op, self._problem, self._tokens)
        search = search_for(
            self._kernels, self._problem, self._tokens, times, first, self._effort, seed, imported, described
        )
        self._on_event(BucketStarted(self._bucket, search.total))
        if before.fresh and not retune and search.total == 0:
            self._on_event(BucketDone(self._bucket, before.winner, measured=False))
            return before.winner
        with self._database.transaction():
            for trial in before.outdated:
                self._database.forget_trial(trial)
        self._bench.open(self._problem, self._tokens, "+".join(self._sources))
        measured: set[Config] = set(known)
        best = min((trial for trial in known.values() if trial.status == "ok"), key=_time_us, default=None)
        compiles = any(trial.status != "compile_error" for trial in known.values())
        held: list[Trial] = []  # what does not compile is not recorded before it is known that anything does
        waiting: list[tuple[Config, Future[Artifact]]] = []
        while True:
            while batch := search.ask():
                specs = [self._op.spec(self._target.kind, self._problem, config) for config in batch]
                waiting += zip(batch, self._pool.submit(specs), strict=True)
            cut_short = bool(measured) and time.monotonic() >= stop_search
            if cut_short or not waiting:
                break
            if self._target.kind == "cpu":
                wait([future for _, future in waiting])  # compilers would take cores from what is timed
            config, future = waiting.pop(_compiled_first([future for _, future in waiting]))
            trial = self._measure(config, future, best)
            search.tell(config, None if trial.failed else trial.time_us)
            if trial.status == "ok":
                best = trial if best is None else min(best, trial, key=_time_us)
            held.append(trial)
            compiles = compiles or trial.status != "compile_error"
            while compiles and held:
                done = held.pop(0)
                if done.status == "compile_error":
                    done = self._database.record_trial(done)
                measured.add(done.config)
                self._on_event(TrialDone(self._bucket, done))
        for _, future in waiting:
            future.cancel()
        if held:
            raise TargetUnavailable(f"no config of {self._problem} compiles, the first for: {held[0].message}")
        trials = [trial for trial in self._trials() if trial.config in measured]
        finalists = [trial.config for trial in trials if trial.status == "ok" and not trial.message]  # of twins one
        if cut_short and not finalists:
            return None  # neither done nor known not to work: the next job goes on
        pruned = [trial for trial in trials if trial.status == "pruned"]
        self._searched = {} if cut_short else searched(self._effort, self._sources)
        winner = self._final(finalists) or self._final(self._timed_to_the_end(pruned))
        if winner is None:
            place = f"{self._problem} at T={self._tokens}"
            logger.warning("%s: no config is right and runs; see the failed trials", place)
        self._on_event(BucketDone(self._bucket, winner, measured=True, disturbances=self._disturbances))
        return winner

    def _trials(self) -> list[Trial]:
        return self._database.trials(self._target, self._problem, self._tokens, *self._sources)

    def _first_configs(self) -> list[Config]:
        """The defaults and what is likely fast, what was imported for this bucket, and what won in what is most like
        it: with other sources, at other T, for other problems of the op, on other devices of this kind.
        """

        def unlike(winner: Winner) -> tuple[int, float]:
            params, mine = dict(winner.problem.params), dict(self._problem.params)
            others = sum(params.get(name) != value for name, value in mine.items())
            ratio = max(winner.tokens, self._tokens) / min(winner.tokens, self._tokens)
            return others + (winner.target != self._target), ratio

        winners = [w for w in self._database.winners(op=self._op.name) if w.target.kind == self._target.kind]
        ours = [config for kernel in self._kernels for config in kernel.first_configs(self._problem, self._tokens)]
        configs = dict.fromkeys([*ours, *self._imported(), *(winner.config for winner in sorted(winners, key=unlike))])
        return list(configs)[: len(ours) + self._effort.priors]

    def _imported(self) -> list[Config]:
        return imported(self._database, self._target, self._bucket, self._effort)

    def _timed_to_the_end(self, pruned: Sequence[Trial]) -> list[Config]:
        """The fastest of these that is right and runs, or none. What they lost their races to has failed since."""
        self._by_code.clear()  # so what came of the races does not hold
        for trial in pruned:
            (compiling,) = self._pool.submit([self._op.spec(self._target.kind, self._problem, trial.config)])
            if self._measure(trial.config, compiling, None).status == "ok":
                return [trial.config]
        return []

    def _measure(self, config: Config, compiling: Future[Artifact], best: Trial | None) -> Trial:
        """Compiles, verifies and times one config; whatever goes wrong with it is the trial's outcome.

        The trial is recorded, but for one that does not compile.

        Args: best: the fastest so far, which it races.
        """
        try:
            artifact = compiling.result()
        except CompileError as error:
            return self._trial(config, "compile_error", message=str(error))
        facts: dict[str, Any] = {"compile_s": artifact.seconds, **artifact.resources.as_dict()}
        if settled := self._without_a_run(config, artifact, facts, best):
            return self._database.record_trial(settled)
        with ExitStack() as turn:
            turn.enter_context(self._bench.turn())  # first: while it waits, no config can take the machine down
            with self._presumed_dead(config, facts):
                trial = self._outcome(config, facts, None if best is None else best.config)
                turn.close()
                self._by_code[self._code(config, artifact)] = trial
                return self._database.record_trial(trial)

    def _without_a_run(
        self, config: Config, artifact: Artifact, facts: Mapping[str, Any], best: Trial | None
    ) -> Trial | None:
        """What comes of a config that need not run: its code ran already, it cannot be launched, or it spills registers
        where another one that is right does not. None for all others.

        Of 51 configs that spilled in 40 buckets on an H200, the fastest took 1.34 times as long as its bucket's best.
        """
        if twin := self._by_code.get(self._code(config, artifact)):
            message = twin.message or f"the same code as {twin.config}"
            return replace(twin, config=config, message=message, compile_s=artifact.seconds)
        spec = self._op.spec(self._target.kind, self._problem, config)
        needed = spec.shared_bytes + (artifact.resources.shared_bytes or 0)
        most = toolchain(self._target.kind).most_shared_bytes(self._target.arch)
        if most is not None and needed > most:
            message = f"a block needs {needed} bytes of shared memory; it can have {most}"
            return self._trial(config, "launch_error", message=message, **facts)
        if artifact.resources.spill_bytes and best is not None and not best.spill_bytes:
            message = f"it spills {artifact.resources.spill_bytes} bytes of registers; it was not run"
            return self._trial(config, "pruned", message=message, **facts)
        return None

    def _code(self, config: Config, artifact: Artifact) -> tuple[object, ...]:
        """Equal for configs that run the same code in the same way."""
        spec = self._op.spec(self._target.kind, self._problem, config)
        launch = (spec.block, spec.shared_bytes, spec.programmatic_launch)
        digest = hashlib.sha256(artifact.path.read_bytes()).hexdigest()
        return (digest, *launch, self._op.launch_shape(self._problem, config))

    @contextmanager
    def _presumed_dead(self, config: Config, facts: Mapping[str, Any]) -> Iterator[None]:
        """Records a failure for the case that this process does not live to record another outcome.

        If an exception ends the block, it was not the config's fault: what was recorded before is put back.
        """
        trial = self._trial(config, "launch_error", message=DIED, **facts)
        before = self._database.same_key(trial)
        if before is not None and before.message == DIED:
            trial = replace(trial, message=DIED_AGAIN)
        mine: Trial | None = None
        try:
            mine = self._database.record_trial(trial)
            yield
        except BaseException:
            with suppress(AutofuseError), self._database.transaction():
                if self._database.same_key(trial) != mine:
                    pass  # another tuner's, since
                elif before is None:
                    self._database.forget_trial(trial)
                else:
                    self._database.record_trial(before)
            raise

    def _outcome(self, config: Config, facts: Mapping[str, Any], best: Config | None) -> Trial:
        """Verifies and times a config that compiles."""
        try:
            difference = self._bench.verify(config)
            race = self._bench.time(config, best)
            _check_times(config, race.timing)
        except CandidateFailed as failed:
            return self._trial(config, failed.status, message=str(failed), **facts)
        times = {"time_us": race.timing.median_us, "spread_us": race.timing.spread_us}
        return self._trial(config, "pruned" if race.pruned else "ok", **times, error=difference, **facts)

    def _trial(self, config: Config, status: str, **facts: Any) -> Trial:
        return Trial(
            self._target,
            self._problem,
            self._tokens,
            config,
            self._op.source_hash(self._target.kind, config),
            status,
            provenance=self._provenance,
            **facts,
        )

    def _final(self, configs: Sequence[Config]) -> Winner | None:
        """Chooses one of the best configs, measures it and the baselines in turns, and records these and the winner.

        Args: configs: the fastest first. One that fails now is a failed trial, and the next takes its place.
        """
        left, kinds = list(configs), None
        while left:
            try:
                chosen = self._choose(left[: self._effort.finalists])
                kinds = self._baselines() if kinds is None else kinds
                final = self._judge(chosen, kinds)
            except CandidateFailed as failed:
                if isinstance(failed.subject, Config):
                    left.remove(failed.subject)
                    place = f"{self._problem} at T={self._tokens}"
                    logger.warning("%s: %s failed among the finalists: %s", place, failed.subject, failed)
                    self._database.record_trial(self._trial(failed.subject, failed.status, message=str(failed)))
                else:
                    kinds = [EAGER]
                    self._warn_of_baseline(failed)
                continue
            return self._record(chosen, final)
        return None

    def _choose(self, configs: Sequence[Config]) -> Config:
        if len(configs) == 1:
            return configs[0]
        effort = self._effort
        timings = self._bench.interleave(configs, effort.final_rounds, seed=0, places=effort.places).timings
        for config, timing in zip(configs, timings, strict=True):
            _check_times(config, timing)
        return choose(configs, timings, [kernel.space for kernel in self._kernels], effort.tie, effort.widest_tie)

    def _baselines(self) -> list[str]:
        try:
            return self._bench.baselines(compiled=True)
        except CandidateFailed as failed:
            self._warn_of_baseline(failed)
            return self._bench.baselines(compiled=False)

    def _warn_of_baseline(self, failed: CandidateFailed) -> None:
        """Raises ``failed`` where there is no other baseline to go by."""
        if failed.subject == EAGER:
            raise failed
        logger.warning("%s: no baseline through torch.compile: %s: %s", self._op.name, failed.status, failed)

    def _judge(self, config: Config, kinds: Sequence[str]) -> _Final:
        """The steadiest of some measurements of a config beside the baselines.

        What looked best by luck is measured anew: its time and gain come from other rounds than those that chose it.
        """
        final: _Final | None = None
        subjects: list[Subject] = [*kinds, config]
        for attempt in range(self._effort.attempts):
            done = self._bench.interleave(subjects, self._effort.final_rounds, seed=1 + attempt)
            for subject, timing in zip(subjects, done.timings, strict=True):
                _check_times(subject, timing)
            again = _Final.of(dict(zip(kinds, done.timings, strict=False)), done.timings[-1], done.disturbances)
            if final is None or again.interval < final.interval:
                final = again
            if final.interval <= self._effort.steady_interval:
                break
        assert final is not None
        if final.interval > self._effort.steady_interval:
            final = replace(final, disturbances=("unsteady times", *final.disturbances))
        return final

    def _record(self, config: Config, final: _Final) -> Winner:
        self._disturbances = final.disturbances
        fields = {**self._database.provenance(self._provenance), **self._searched}
        if final.disturbances:
            fields["disturbances"] = "; ".join(final.disturbances)
        provenance = self._database.record_provenance(fields)
        for name, timing in final.baselines.items():
            self._database.record_baseline(
                Baseline(
                    self._target, self._problem, self._tokens, name, timing.median_us, timing.spread_us, provenance
                )
            )
        baseline, timing = final.baselines[final.baseline], final.timing
        return self._database.record_winner(
            Winner(
                self._target,
                self._problem,
                self._tokens,
                config,
                self._op.source_hash(self._target.kind, config),
                timing.median_us,
                timing.spread_us,
                final.baseline,
                baseline.median_us,
                final.gain.median,
                final.gain.low,
                final.gain.high,
                provenance,
            )
        )


@dataclass(frozen=True)
class _Final:
    """One interleaved measurement of a bucket's chosen config and the baselines; which of these is the fastest."""

    baselines: Mapping[str, Timing]
    baseline: str
    timing: Timing
    gain: Gain
    disturbances: tuple[str, ...]

    @classmethod
    def of(cls, baselines: Mapping[str, Timing], timing: Timing, disturbances: tuple[str, ...]) -> _Final:
        kind = min(baselines, key=lambda name: baselines[name].median_us)
        return cls(baselines, kind, timing, gain(baselines[kind], timing), disturbances)

    @property
    def interval(self) -> float:
        """How wide the gain's interval is: high ÷ low."""
        return self.gain.high / self.gain.low


def _compiled_first(futures: Sequence[Future[Artifact]]) -> int:
    """The place of the first that need not be waited for; the first of all where there is none."""
    return next((place for place, future in enumerate(futures) if future.done()), 0)


def _time_us(trial: Trial) -> float:
    assert trial.time_us is not None
    return trial.time_us


def _check_times(subject: Subject, timing: Timing) -> None:
    """Raises CandidateFailed for a time that no call can take."""
    for time_us in timing.rounds_us:
        if not (math.isfinite(time_us) and time_us > 0):
            raise CandidateFailed(subject, "wrong", f"a call cannot take {time_us} µs")


def _autofuse_version() -> str:
    from autofuse import __version__

    return __version__
