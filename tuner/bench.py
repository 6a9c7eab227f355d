"""The bench: what is done with one bucket's candidates on the device. It stands in the worker process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from autofuse.errors import AutofuseError, LaunchError, UnsupportedCall
from autofuse.ops import Config, FusedOp, Problem, get_op
from autofuse.runtime.dispatch import BoundPlan, bind_plan, registry
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of
from autofuse.tuner.bandwidth import bandwidth
from autofuse.tuner.budgets import Effort
from autofuse.tuner.disturbance import Comparison, watch
from autofuse.tuner.failures import CandidateFailed, Subject, blaming
from autofuse.tuner.guards import GuardedCall
from autofuse.tuner.measure import Ring, Runner, Timing, example_ring, interleave, runner
from autofuse.tuner.racing import Race, race
from autofuse.tuner.stand_in import stand_in
from autofuse.tuner.turns import Turns
from autofuse.tuner.verify import Verification

__all__ = ["COMPILED", "EAGER", "Bench", "Note"]

EAGER = "eager"
COMPILED = "compile"
"""The baselines that there may be on every device; see ``baseline_calls``."""

Note = Callable[[Subject], None]
"""Says what runs from now on."""


class Bench:
    """One device, and one bucket at a time on it.

    A candidate that fails raises CandidateFailed; any other exception is not the candidate's fault.

    Args:
        note: called before each candidate or baseline runs: if it takes the process down, that is how it is known.
        turns: taken for all that runs on the device, where others tune on it.
    """

    def __init__(
        self, device: torch.device, effort: Effort, note: Note = lambda subject: None, turns: Turns | None = None
    ) -> None:
        registry.go_native()  # calls are timed as a compiled graph makes them
        self._device = device
        self._target = target_of(device)
        self._effort = effort
        self._note = note
        self._turns = turns or Turns(None)
        self._subject: Subject = ""
        self._bucket: _Bucket | None = None
        self._stand_in = stand_in(device, effort)
        self._watch = watch(device, self._turns.members)

    def open(self, problem: Problem, tokens: int, source_hash: str) -> None:
        """Prepares for the candidates of a bucket: inputs, and their references.

        Args:
            source_hash: of the kernel's source; of several languages, the hashes joined by ``+``.

        Raises: AutofuseError where the kernels' sources are not those.
        """
        with self._turns:
            self._bucket = None  # its memory is free for the next
            if self._turns.shared and self._device.type == "cuda":
                torch.cuda.empty_cache()  # and for the others
        op = get_op(problem.op)
        if not {*source_hash.split("+")} <= {*op.source_hashes(self._target.kind)}:
            raise AutofuseError(f"the kernel of {op.name} was edited while it was tuned: run the command again")
        with self._turns, torch.no_grad():
            self._bucket = _Bucket(op, problem, tokens, self._device, self._effort)
            self._synchronise()

    def turn(self) -> AbstractContextManager[None]:
        """The device is this bench's in a ``with`` block; what is asked for outside of one takes a turn of its own."""
        return self._turns

    def verify(self, config: Config) -> float:
        """How far the results are from the reference, in units of what is allowed."""
        bucket = self._opened()
        with self._turns, self._running(config):
            # Not through the dispatcher: it refuses indices that do not exist, and a kernel must stand them.
            return bucket.verification.check(GuardedCall(self._bound(config)))

    def time(self, config: Config, best: Config | None) -> Race:
        """How long a call takes, in a race with the best config so far. Run it only after ``verify``."""
        bucket = self._opened()
        with self._turns:
            self._calibrate()
            rival = None if best is None else self._lasting(best)
            with self._running(config):
                prepared = self._prepared(config, bucket.ring)
                outcome = race(prepared, rival, self._effort)
        if not outcome.pruned:
            bucket.runners[config] = prepared
        return outcome

    def baselines(self, compiled: bool) -> list[str]:
        """The kinds of baselines that ``interleave`` takes from now on; without ``compiled`` that is eager alone."""
        bucket = self._opened()
        bucket.baselines = {EAGER: bucket.op.unfused}
        if compiled:
            from autofuse.tuner.baselines import baseline_calls  # here: importing Inductor takes seconds

            with self._running(COMPILED):
                bucket.baselines = baseline_calls(bucket.op, bucket.ring.sets[0], self._turns)
        return list(bucket.baselines)

    def bandwidth(self) -> float:
        """Bytes per µs that the device's memory can do; see ``bandwidth``."""
        with self._turns:
            return bandwidth(self._device)

    def interleave(self, subjects: Sequence[Subject], rounds: int, seed: int, places: int = 1) -> Comparison:
        """Times configs and baselines in turns.

        Args: places: over so many rings of inputs, one after the other, on a GPU. Which of two kernels is the faster
            depends on where in memory their inputs lie: on an H200 by up to 4 %, for few pairs of configs.
        """
        known = self._opened().baselines
        lacking = [subject for subject in subjects if isinstance(subject, str) and subject not in known]
        if lacking:  # in a worker that took another's place; before its turn, as it compiles
            self.baselines(compiled=lacking != [EAGER])
        with self._turns:
            prepared = [[self._lasting(subject) for subject in subjects]]
            if self._device.type != "cpu":
                prepared += self._elsewhere(subjects, min(places, rounds) - 1)
            self._calibrate()
            with self._running(subjects[0]):
                self._watch.begin()
                parts = [
                    interleave(runners, len(range(place, rounds, len(prepared))), seed)
                    for place, runners in enumerate(prepared)
                ]
                timings = [Timing(sum((part.rounds_us for part in each), ())) for each in zip(*parts, strict=True)]
                done = Comparison(tuple(timings), self._watch.end())
            if places > 1:
                prepared.clear()
                torch.cuda.empty_cache()  # what comes next, here or in other lanes, needs the memory
            return done

    def _opened(self) -> _Bucket:
        assert self._bucket is not None, "no bucket is open"
        return self._bucket

    def _lasting(self, subject: Subject) -> Runner:
        """A warm runner that is kept for as long as the bucket is open."""
        bucket = self._opened()
        if subject not in bucket.runners:
            bucket.runners[subject] = self._warm(subject, bucket.ring)
        return bucket.runners[subject]

    def _elsewhere(self, subjects: Sequence[Subject], count: int) -> list[list[Runner]]:
        """Warm runners of all subjects, for each of so many other rings; for fewer where memory is full, which is no
        subject's fault.
        """
        bucket = self._opened()
        elsewhere: list[list[Runner]] = []
        try:
            for _ in range(count):
                with torch.no_grad():
                    ring = example_ring(bucket.op, bucket.problem, bucket.tokens, self._device, self._effort)
                elsewhere.append([self._warm(subject, ring) for subject in subjects])
        except torch.OutOfMemoryError:
            pass
        except CandidateFailed as failed:
            if failed.status != "out_of_memory":
                raise
        return elsewhere

    def _warm(self, subject: Subject, ring: Ring) -> Runner:
        with self._running(subject):
            prepared = self._prepared(subject, ring)
            prepared.warm(self._effort.warmup_rounds)
            return prepared

    def _prepared(self, subject: Subject, ring: Ring) -> Runner:
        """A cold runner. A config runs as in a compiled graph: through PyTorch's dispatcher, with a plan."""
        bucket = self._opened()
        if isinstance(subject, Config):
            bound = self._bound(subject)
            args = ring.sets[0]
            if not bound.binding.accepts(args) or not bound.binding.launchable(args, bound.variants[0].shape.align):
                raise UnsupportedCall(f"{bucket.op.name} would run its reference: the model's arguments do not suit it")
            overload = getattr(torch.ops.autofuse, bucket.op.name).default
            plan = str(self._plan(subject))

            def call(*args: Any) -> Any:
                return overload(*args, plan)

        else:
            if subject not in bucket.baselines:
                raise LaunchError(f"{bucket.op.name} cannot be compiled any more")
            call = bucket.baselines[subject]
        prepared = runner(call, ring, self._device, self._effort, warm=False, beside=self._stand_in)
        return _NotedRunner(prepared, subject, self._take_note)

    def _calibrate(self) -> None:
        """Before whatever is timed; no candidate runs."""
        if self._stand_in is not None:
            self._take_note("")
            with torch.no_grad():
                self._stand_in.calibrate()

    def _bound(self, config: Config) -> BoundPlan:
        bucket = self._opened()
        if config not in bucket.bound:
            plan = self._plan(config)
            bucket.bound[config] = bound = bind_plan(bucket.op, plan, self._device)
            registry.remember(bound, str(plan))  # or the first native call would load the kernel once more
        return bucket.bound[config]

    def _plan(self, config: Config) -> Plan:
        bucket = self._opened()
        return Plan(self._target.arch, bucket.problem, ((bucket.tokens, config),))

    @contextmanager
    def _running(self, subject: Subject) -> Iterator[None]:
        """What fails in this block is the fault of what was noted last, at first ``subject``."""
        self._take_note(subject)
        try:
            with torch.no_grad(), blaming(subject):
                yield
                self._synchronise()  # a fault on a GPU is reported by whatever waits for it next
        except CandidateFailed as failed:
            failed.subject = self._subject
            raise

    def _take_note(self, subject: Subject) -> None:
        self._subject = subject
        self._note(subject)

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Bucket:
    """What is kept for the candidates of a bucket."""

    def __init__(self, op: FusedOp, problem: Problem, tokens: int, device: torch.device, effort: Effort) -> None:
        self.op = op
        self.problem = problem
        self.tokens = tokens
        self.verification = Verification(op, problem, tokens, device, effort)
        self.verification.prepare()
        self.ring: Ring = example_ring(op, problem, tokens, device, effort)
        self.baselines: dict[str, Callable[..., object]] = {}
        self.bound: dict[Config, BoundPlan] = {}
        self.runners: dict[Subject, Runner] = {}


class _NotedRunner(Runner):
    def __init__(self, inner: Runner, subject: Subject, note: Note) -> None:
        self._inner = inner
        self._subject = subject
        self._note = note
        self.first_us = inner.first_us

    def _time_us(self) -> float:
        return self._inner._time_us()

    def round_us(self) -> float:
        self._note(self._subject)
        return self._inner.round_us()
