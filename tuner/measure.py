"""Timing: what a call takes, fairly.

On a GPU the calls are captured into one CUDA graph, each with other inputs, so that neither Python nor a warm L2 cache
is measured; its replays are timed with events. Results are dropped at once: as in a model, a call writes where the
allocator has just freed, and all functions that are compared write to the same addresses. On a CPU the calls are timed
as they are. Functions that are compared take turns, so a clock that drifts drifts for all of them, and change their
order from round to round, so that none always runs behind the same one.

Calls that follow one another, back to back, are not what a model makes of them: a kernel may be launched with others
``beside`` it, whose own time is taken off.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from autofuse.ops import FusedOp, Problem
from autofuse.tuner.budgets import Effort

__all__ = ["Beside", "Gain", "Ring", "Runner", "Timing", "example_ring", "gain", "interleave", "runner", "time_alone"]

Call = Callable[..., Any]
_SOME_ROUNDS = 3  # from whose shortest the length of a round is told
_IDLE = 2  # times as long are rounds that begin with an idle GPU: what the host takes to launch them is part of them
_BESIDE, _OF = 2, 3  # so many of so many calls have a kernel before them that is no call


@dataclass(frozen=True)
class Ring:
    """Sets of arguments for consecutive calls.

    Attributes:
        pool: the memory pool that the CUDA graphs over this ring share; None on a CPU.
    """

    sets: Sequence[tuple[Any, ...]]
    pool: Any = None

    @classmethod
    def of(cls, sets: Sequence[tuple[Any, ...]], device: torch.device) -> Ring:
        return cls(sets, torch.cuda.graph_pool_handle() if device.type == "cuda" else None)


@dataclass(frozen=True)
class Timing:
    """Rounds of one function: µs per call."""

    rounds_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        return statistics.median(self.rounds_us)

    @property
    def spread_us(self) -> float:
        """The interquartile range."""
        if len(self.rounds_us) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds_us, n=4)
        return high - low


@dataclass(frozen=True)
class Gain:
    """baseline ÷ candidate: the median over paired rounds, and the 95 % interval of that median."""

    median: float
    low: float
    high: float


def gain(baseline: Timing, candidate: Timing) -> Gain:
    """The gain of paired rounds, with the median's distribution-free interval from order statistics.

    The k-th smallest of n ratios lies below the median with a binomial probability (Hahn & Meeker, "Statistical
    Intervals", 5.2); k is the normal approximation at 95 %.
    """
    ratios = sorted(b / c for b, c in zip(baseline.rounds_us, candidate.rounds_us, strict=True))
    n = len(ratios)
    k = max(int(n / 2 - 0.98 * n**0.5), 0)
    return Gain(statistics.median(ratios), ratios[k], ratios[n - 1 - k])


def example_ring(op: FusedOp, problem: Problem, tokens: int, device: torch.device, effort: Effort) -> Ring:
    """Sets of inputs for consecutive calls, together beyond the last-level cache where ``ring_sets`` allows; as many as
    make whole turns of calls with a kernel before them and without.

    What all layers of a model share is the same in all of them.
    """
    generator = torch.Generator(device).manual_seed(1)
    sets = -(-effort.ring_bytes // max(op.bytes_moved(problem, tokens), 1))
    sets = max(-(-min(sets, effort.ring_sets) // _OF) * _OF, _OF)
    first = op.example_args(problem, tokens, device, generator)
    others = (op.example_args(problem, tokens, device, generator) for _ in range(sets - 1))
    common = [tuple(first[i] if i in op.shared else arg for i, arg in enumerate(args)) for args in others]
    return Ring.of([first, *common], device)


class Beside(ABC):
    """A kernel that is launched between the calls that are timed on a GPU.

    Attributes:
        us: what a launch of it takes, one after the other.
    """

    us = 0.0

    @abstractmethod
    def __call__(self) -> None:
        """Launches it."""

    @abstractmethod
    def hold(self) -> None:
        """Keeps the GPU busy for as long as the host takes to launch a CUDA graph: what is timed begins when that is
        there, not when the host has begun to bring it.
        """


class Runner(ABC):
    """One function, prepared for timing over a ring of inputs.

    Attributes:
        repeats: what a round repeats: calls on a CPU, replays of the CUDA graph on a GPU.
        calls_each: calls in each of these.
        first_us: the shortest of the few rounds that told its length, µs per call.
    """

    repeats = 1
    calls_each = 1
    first_us = 0.0

    @abstractmethod
    def _time_us(self) -> float:
        """Times one round: µs in all."""

    def round_us(self) -> float:
        """Times one round: µs per call."""
        return self._time_us() / (self.repeats * self.calls_each) - self._others_us()

    def warm(self, rounds: int) -> None:
        """Runs rounds that nobody looks at."""
        for _ in range(rounds):
            self.round_us()

    def _lengthen(self, wanted_us: float) -> None:
        """Doubles the repeats until the shortest of a few rounds lasts at least half of ``wanted_us``; how often, the
        rounds before tell. One call is never enough to go by: whatever interrupts it is longer than the call.
        """
        while (shortest_us := min(self._time_us() for _ in range(_SOME_ROUNDS))) < wanted_us / 2:
            # A clock that saw no time pass tells nothing.
            self.repeats <<= max(math.ceil(math.log2(wanted_us / 2 / max(shortest_us, wanted_us / 256))), 1)
        self.first_us = shortest_us / (self.repeats * self.calls_each) - self._others_us()

    def _others_us(self) -> float:
        """Of a round, what is no call's: µs per call."""
        return 0.0


class _CudaRunner(Runner):
    def __init__(
        self, call: Call, ring: Ring, effort: Effort, beside: Beside | None, hold: Callable[[], None] | None
    ) -> None:
        self._beside, self._hold = beside, hold
        self._beside_each = launches_each(len(ring.sets))
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for args in ring.sets[:2]:  # outside the capture: first calls load modules and compile
                call(*args)
            torch.cuda.synchronize()
            # Not ``torch.cuda.graph``: it also empties the allocator's cache, which the next candidate fills again.
            self._graph.capture_begin(pool=ring.pool)
            try:
                for number, args in enumerate(ring.sets):
                    if beside is not None and _has_before(number):
                        beside()
                    call(*args)
            except BaseException:
                with suppress(RuntimeError):  # what went wrong first says more
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self.calls_each = len(ring.sets)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._lengthen(effort.round_us * (_IDLE if hold is None else 1))

    def _time_us(self) -> float:
        if self._hold is not None:
            self._hold()
        self._start.record()
        for _ in range(self.repeats):
            self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e3

    def _others_us(self) -> float:
        return 0.0 if self._beside is None else self._beside.us * self._beside_each


def _has_before(number: int) -> bool:
    """Whether a ring's call of that number has a kernel before it that is not the call before."""
    return number % _OF < _BESIDE


def launches_each(calls: int) -> float:
    """Of that kernel, for each of so many calls."""
    return sum(map(_has_before, range(calls))) / calls


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """For captures, which the default stream does not allow. Graphs that share a pool are captured on one stream."""
    return torch.cuda.Stream(device)


class _CpuRunner(Runner):
    def __init__(self, call: Call, ring: Ring, effort: Effort) -> None:
        self._call = call
        self._ring = ring.sets
        self._next = 0
        self._lengthen(effort.cpu_round_us)

    def _time_us(self) -> float:
        call, ring, count = self._call, self._ring, len(self._ring)
        batch = [ring[(self._next + i) % count] for i in range(self.repeats)]
        self._next = (self._next + self.repeats) % count
        start = time.perf_counter_ns()
        for args in batch:
            call(*args)
        return (time.perf_counter_ns() - start) / 1e3


def runner(
    call: Call,
    ring: Ring,
    device: torch.device,
    effort: Effort,
    *,
    warm: bool = True,
    beside: Beside | None = None,
    hold: Callable[[], None] | None = None,
) -> Runner:
    """Prepares ``call`` for timing; runs it some times. Raises whatever ``call`` raises.

    Args:
        warm: False leaves ``warm`` to the caller.
        beside: on a GPU, is launched before two of three calls.
        hold: on a GPU, is called before each round; see ``Beside.hold``, which it is unless it is given.
    """
    if hold is None and beside is not None:
        hold = beside.hold
    cuda = device.type == "cuda"
    prepared = _CudaRunner(call, ring, effort, beside, hold) if cuda else _CpuRunner(call, ring, effort)
    if warm:
        prepared.warm(effort.warmup_rounds)
    return prepared


def time_alone(prepared: Runner, rounds: int) -> Timing:
    """Times one function."""
    return Timing(tuple(prepared.round_us() for _ in range(rounds)))


def interleave(prepared: Sequence[Runner], rounds: int, seed: int = 0) -> list[Timing]:
    """Times several functions in turns: the n-th rounds of all of them ran side by side, in an order of their own.

    Args: seed: of these orders.
    """
    source, order = random.Random(seed), list(range(len(prepared)))
    table = []
    for _ in range(rounds):
        source.shuffle(order)
        times = {index: prepared[index].round_us() for index in order}
        table.append(times)
    return [Timing(tuple(times[index] for times in table)) for index in range(len(prepared))]
