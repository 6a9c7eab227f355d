"""Timing: rounds long enough to mean something, in an order that favours nobody. No kernel runs here."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from autofuse.tuner.budgets import Effort
from autofuse.tuner.measure import Ring, Runner, interleave, runner

CPU = torch.device("cpu")


def test_calls_that_are_slow_at_first_do_not_make_rounds_short(tiny: Effort) -> None:
    calls = 0

    def interrupted_at_first(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls <= 5:
            time.sleep(0.001)

    prepared = runner(interrupted_at_first, Ring.of([()], CPU), CPU, replace(tiny, cpu_round_us=3000.0))
    assert prepared.repeats >= 64
    before = calls
    start = time.perf_counter()
    prepared.round_us()
    assert (time.perf_counter() - start) * 1e6 > 500.0
    assert calls - before == prepared.repeats


def test_a_round_of_long_calls_is_one_call(tiny: Effort) -> None:
    prepared = runner(lambda: time.sleep(0.002), Ring.of([()], CPU), CPU, replace(tiny, cpu_round_us=3000.0))
    assert prepared.repeats == 1
    assert prepared.round_us() >= 2000.0


class _Named(Runner):
    """Takes as many microseconds as its number, and says when."""

    def __init__(self, number: int, log: list[int]) -> None:
        self._number = number
        self._log = log

    def _time_us(self) -> float:
        self._log.append(self._number)
        return float(self._number)


def orders(seed: int) -> list[tuple[int, ...]]:
    log: list[int] = []
    timings = interleave([_Named(number, log) for number in range(1, 5)], 20, seed)
    assert [timing.rounds_us for timing in timings] == [(float(number),) * 20 for number in range(1, 5)]
    return [tuple(log[start : start + 4]) for start in range(0, len(log), 4)]


def test_each_round_times_everything_once_in_an_order_of_its_own() -> None:
    rounds = orders(seed=0)
    assert all(sorted(each) == [1, 2, 3, 4] for each in rounds)
    assert len(set(rounds)) > 5


def test_the_same_seed_gives_the_same_orders() -> None:
    assert orders(seed=3) == orders(seed=3) != orders(seed=4)


@pytest.mark.gpu
def test_rounds_on_a_gpu_last_about_as_long_as_wanted(tiny: Effort) -> None:
    device = torch.device("cuda", 0)
    ring = Ring.of([(torch.zeros(1024, device=device),) for _ in range(3)], device)
    prepared = runner(torch.neg, ring, device, replace(tiny, round_us=2000.0))
    assert 500.0 < prepared.round_us() * prepared.repeats * prepared.calls_each < 8000.0
