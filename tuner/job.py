"""The tuning job: buckets in, winners in the database out."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from autofuse.cache_db import Baseline, Trial, TunedDatabase, Winner
from autofuse.errors import AutofuseError, BadInput, CompileError, LaunchError, TargetUnavailable
from autofuse.ops import Config, FusedOp, Problem, get_op
from autofuse.runtime.dispatch import bind_plan, load_kernel, registry
from autofuse.runtime.plan import Plan
from autofuse.targets import Artifact, Target, target_of, toolchain
from autofuse.tuner.baselines import baseline_calls
from autofuse.tuner.budgets import FINAL_SHARE, Effort
from autofuse.tuner.compile_ahead import CompilePool, compile_pool
from autofuse.tuner.measure import Gain, Ring, Runner, Timing, example_ring, gain, interleave, runner, time_alone
from autofuse.tuner.search import search_for
from autofuse.tuner.verify import WrongResult, verify

__all__ = ["Bucket", "BucketDone", "BucketStarted", "Event", "TrialDone", "tune_buckets"]

logger = logging.getLogger("autofuse.tuner")

_DIED = "the process died while this config ran"


@dataclass(frozen=True)
class Bucket:
    """One thing to tune: a problem at T tokens."""

    problem: Problem
    tokens: int


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
    """A bucket is finished. ``winner`` is None where no config was right; ``measured`` is False if all was known."""

    bucket: Bucket
    winner: Winner | None
    measured: bool


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

    Every trial is in the database as soon as it is measured: an interrupted job goes on where it was. A config is a
    failure there from before it runs, so that one that takes the process down with it is not tried again. Failures
    are tried again where the provenance (driver, toolkit, compiler…) is another one.

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
    target = target_of(device)
    chain = toolchain(target.kind)
    registry.go_native()  # calls are timed as a compiled graph makes them
    provenance = database.record_provenance(
        {
            "host": platform.node(),
            "torch": torch.__version__,
            "autofuse": _autofuse_version(),
            **chain.provenance(device),
        }
    )
    winners = []
    end = None if budget_s is None else time.monotonic() + budget_s
    with compile_pool(target.kind, target.arch) as pool, torch.no_grad():
        for done, bucket in enumerate(buckets):
            if bucket.tokens < 1:
                raise BadInput(f"tokens {bucket.tokens}: a bucket has at least one token")
            share_s = None if end is None else (end - time.monotonic()) / (len(buckets) - done)
            if share_s is not None and share_s <= 0:
                logger.info("the time is over with %d buckets to tune", len(buckets) - done)
                break
            tuning = _BucketTuning(bucket, device, target, database, effort, provenance, pool, on_event)
            if winner := tuning.run(retune=retune, seed=seed, budget_s=share_s):
                winners.append(winner)
    return winners


class _BucketTuning:
    """The tuning of one bucket."""

    def __init__(
        self,
        bucket: Bucket,
        device: torch.device,
        target: Target,
        database: TunedDatabase,
        effort: Effort,
        provenance: str,
        pool: CompilePool,
        on_event: Callable[[Event], None],
    ) -> None:
        self._bucket = bucket
        self._problem, self._tokens = bucket.problem, bucket.tokens
        self._op: FusedOp = get_op(bucket.problem.op)
        self._device = device
        self._target = target
        self._database = database
        self._effort = effort
        self._provenance = provenance
        self._pool = pool
        self._on_event = on_event
        self._source_hash = self._op.source_hash(target.kind)
        self._cached_ring: Ring | None = None

    def run(self, *, retune: bool, seed: int, budget_s: float | None) -> Winner | None:
        stop_search = float("inf") if budget_s is None else time.monotonic() + (1 - FINAL_SHARE) * budget_s
        known = {} if retune else {trial.config: trial for trial in self._trials() if self._holds(trial)}
        space = self._op.kernel_source(self._target.kind).space
        times = {config: trial.time_us if trial.status == "ok" else None for config, trial in known.items()}
        search = search_for(space, self._problem, self._tokens, times, self._first_configs(), self._effort, seed)
        winner = self._database.winner(self._target, self._problem, self._tokens)
        fresh = winner is not None and winner.source_hash == self._source_hash and not retune
        self._on_event(BucketStarted(self._bucket, search.total))
        if fresh and search.total == 0:
            self._on_event(BucketDone(self._bucket, winner, measured=False))
            return winner
        measured: set[Config] = set(known)
        compiles = any(trial.status != "compile_error" for trial in known.values())
        held: list[Trial] = []  # what does not compile is not recorded before it is known that anything does
        cut_short = False
        for batch in search.batches():
            if cut_short := bool(measured) and time.monotonic() >= stop_search:
                break
            specs = [self._op.spec(self._target.kind, self._problem, config) for config in batch]
            for config, future in zip(batch, self._pool.submit(specs), strict=True):
                if cut_short := bool(measured) and time.monotonic() >= stop_search:
                    future.cancel()
                    continue
                trial = self._measure(config, future)
                search.tell(config, trial.time_us if trial.status == "ok" else None)
                held.append(trial)
                compiles = compiles or trial.status != "compile_error"
                while compiles and held:
                    done = held.pop(0)
                    if done.status == "compile_error":
                        done = self._database.record_trial(done)
                    measured.add(done.config)
                    self._on_event(TrialDone(self._bucket, done))
        if held:
            raise TargetUnavailable(f"no config of {self._problem} compiles, the first for: {held[0].message}")
        finalists = [trial.config for trial in self._trials() if trial.status == "ok" and trial.config in measured]
        if cut_short and not finalists:
            return None  # neither done nor known not to work: the next job goes on
        winner = self._final(finalists[: self._effort.finalists])
        self._on_event(BucketDone(self._bucket, winner, measured=True))
        return winner

    def _holds(self, trial: Trial) -> bool:
        """Whether a trial need not be made again: a failure may have been this driver's, or this compiler's."""
        return trial.status == "ok" or trial.provenance == self._provenance

    def _trials(self) -> list[Trial]:
        return self._database.trials(self._target, self._problem, self._tokens, self._source_hash)

    def _first_configs(self) -> list[Config]:
        """The default, and what won in the buckets nearest to this one."""
        others = [
            winner
            for winner in self._database.winners(target=self._target, problem=self._problem)
            if winner.tokens != self._tokens
        ]
        others.sort(key=lambda winner: max(winner.tokens, self._tokens) / min(winner.tokens, self._tokens))
        default = self._op.default_config(self._target.kind, self._problem, self._tokens)
        return [default, *(winner.config for winner in others[:4])]

    def _ring(self) -> Ring:
        if self._cached_ring is None:
            self._cached_ring = example_ring(self._op, self._problem, self._tokens, self._device, self._effort)
        return self._cached_ring

    def _measure(self, config: Config, compiling: Future[Artifact]) -> Trial:
        """Compiles, verifies and times one config; whatever goes wrong with it is the trial's outcome.

        The trial is recorded, but for one that does not compile.
        """
        try:
            artifact = compiling.result()
        except CompileError as error:
            return self._trial(config, "compile_error", message=str(error))
        facts: dict[str, Any] = {"compile_s": artifact.seconds, **artifact.resources.as_dict()}
        with self._presumed_dead(self._trial(config, "launch_error", message=_DIED, **facts)):
            return self._database.record_trial(self._outcome(config, facts))

    @contextmanager
    def _presumed_dead(self, trial: Trial) -> Iterator[None]:
        """Records ``trial`` for the case that the process does not live to record another outcome.

        If an exception ends the block, it was not the config's fault: what was recorded before is put back.
        """
        before = self._database.same_key(trial)
        try:
            self._database.record_trial(trial)
            yield
        except BaseException:
            with suppress(AutofuseError):
                if before is None:
                    self._database.forget_trial(trial)
                else:
                    self._database.record_trial(before)
            raise

    def _outcome(self, config: Config, facts: Mapping[str, Any]) -> Trial:
        """Verifies and times a config that compiles."""
        try:
            # Not through the dispatcher: it refuses indices that do not exist, and a kernel must stand them.
            bound = bind_plan(self._op, self._plan(config), self._device)
            difference = verify(self._op, self._problem, self._tokens, bound, self._device, self._effort)
            timing = time_alone(
                runner(self._load(config), self._ring(), self._device, self._effort), self._effort.trial_rounds
            )
        except WrongResult as wrong:
            return self._trial(config, "wrong", message=str(wrong), **facts)
        except (LaunchError, RuntimeError) as failed:
            return self._trial(config, "launch_error", message=" ".join(str(failed).split()), **facts)
        return self._trial(
            config, "ok", time_us=timing.median_us, spread_us=timing.spread_us, error=difference, **facts
        )

    def _trial(self, config: Config, status: str, **facts: Any) -> Trial:
        return Trial(
            self._target,
            self._problem,
            self._tokens,
            config,
            self._source_hash,
            status,
            provenance=self._provenance,
            **facts,
        )

    def _load(self, config: Config) -> Callable[..., Any]:
        """The config as a compiled graph would run it: through PyTorch's dispatcher, with a plan."""
        load_kernel(self._op, self._problem, config, self._device)  # raises where a call would run the reference
        plan = str(self._plan(config))
        overload = getattr(torch.ops.autofuse, self._op.name).default
        return lambda *args: overload(*args, plan)

    def _plan(self, config: Config) -> Plan:
        return Plan(self._target.arch, self._problem, ((self._tokens, config),))

    def _final(self, configs: Sequence[Config]) -> Winner | None:
        """Chooses one of the best configs, measures it and the baselines in turns, and records these and the winner."""
        if not configs:
            logger.warning(
                "%s at T=%d: no config is right and runs; see the failed trials", self._problem, self._tokens
            )
            return None
        ring, rounds = self._ring(), self._effort.final_rounds

        def prepared(call: Callable[..., Any]) -> Runner:
            return runner(call, ring, self._device, self._effort)

        # What looked best by luck is measured anew: its time and gain come from other rounds than those that chose it.
        candidates = [prepared(self._load(config)) for config in configs]
        chosen = 0
        if len(configs) > 1:
            medians = [timing.median_us for timing in interleave(candidates, rounds)]
            chosen = medians.index(min(medians))
        baselines = baseline_calls(self._op, ring.sets[0])
        judged = [*map(prepared, baselines.values()), candidates[chosen]]
        final: _Final | None = None
        for attempt in range(self._effort.attempts):
            *timings, timing = interleave(judged, rounds, seed=1 + attempt)
            again = _Final.of(dict(zip(baselines, timings, strict=True)), timing)
            if final is None or again.interval < final.interval:
                final = again
            if final.interval <= self._effort.steady_interval:
                break
        assert final is not None
        for name, timing in final.baselines.items():
            self._database.record_baseline(
                Baseline(
                    self._target,
                    self._problem,
                    self._tokens,
                    name,
                    timing.median_us,
                    timing.spread_us,
                    self._provenance,
                )
            )
        baseline, timing = final.baselines[final.baseline], final.timing
        return self._database.record_winner(
            Winner(
                self._target,
                self._problem,
                self._tokens,
                configs[chosen],
                self._source_hash,
                timing.median_us,
                timing.spread_us,
                final.baseline,
                baseline.median_us,
                final.gain.median,
                final.gain.low,
                final.gain.high,
                self._provenance,
            )
        )


@dataclass(frozen=True)
class _Final:
    """One interleaved measurement of a bucket's chosen config and the baselines; which of these is the fastest."""

    baselines: Mapping[str, Timing]
    baseline: str
    timing: Timing
    gain: Gain

    @classmethod
    def of(cls, baselines: Mapping[str, Timing], timing: Timing) -> _Final:
        kind = min(baselines, key=lambda name: baselines[name].median_us)
        return cls(baselines, kind, timing, gain(baselines[kind], timing))

    @property
    def interval(self) -> float:
        """How wide the gain's interval is: high ÷ low."""
        return self.gain.high / self.gain.low


def _autofuse_version() -> str:
    from autofuse import __version__

    return __version__
