"""Where inputs lie in memory: rings of inputs at other addresses, as many as there is memory for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from autofuse.errors import LaunchError
from autofuse.ops import get_op
from autofuse.tuner.bench import Bench
from autofuse.tuner.budgets import Effort
from autofuse.tuner.failures import CandidateFailed
from autofuse.tuner.measure import Ring, Runner, example_ring, runner

CPU = torch.device("cpu")
TOKENS = 3
NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="fp32", q_lora_rank=64, kv_lora_rank=32, cast_before_weight=True)
CONFIG = NORMS.default_config("cpu", PROBLEM, TOKENS)


@pytest.fixture
def bench(tiny: Effort) -> Bench:
    opened = Bench(CPU, tiny)
    opened.open(PROBLEM, TOKENS, NORMS.source_hash("cpu"))
    return opened


def test_other_rings_lie_elsewhere(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rings = [bench._opened().ring]

    def noted(call: Any, ring: Ring, *args: Any, **kwargs: Any) -> Runner:
        rings.append(ring)
        return runner(call, ring, *args, **kwargs)

    monkeypatch.setattr("autofuse.tuner.bench.runner", noted)
    assert [len(runners) for runners in bench._elsewhere([CONFIG], 2)] == [1, 1]
    places = [{arg.data_ptr() for args in ring.sets for arg in args if isinstance(arg, torch.Tensor)} for ring in rings]
    assert len(places) == 3
    assert not any(one & other for one, other in itertools.combinations(places, 2))


def test_a_full_memory_leaves_fewer_rings(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Ring] = []

    def until_full(*args: Any) -> Ring:
        if made:
            raise torch.OutOfMemoryError("full")
        made.append(example_ring(*args))
        return made[0]

    monkeypatch.setattr("autofuse.tuner.bench.example_ring", until_full)
    assert len(bench._elsewhere([CONFIG], 5)) == 1


def test_what_does_not_fit_on_another_ring_is_no_configs_fault(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Runner:
        raise torch.OutOfMemoryError("full")

    bench.interleave([CONFIG], 3, seed=0)  # its own ring's runner is kept
    monkeypatch.setattr("autofuse.tuner.bench.runner", full)
    assert bench._elsewhere([CONFIG], 2) == []
    assert bench.interleave([CONFIG], 3, seed=0).timings


def test_what_is_wrong_with_a_config_on_another_ring_is_its_fault(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Runner:
        raise LaunchError("it cannot be launched")

    monkeypatch.setattr("autofuse.tuner.bench.runner", broken)
    with pytest.raises(CandidateFailed, match="it cannot be launched"):
        bench._elsewhere([CONFIG], 2)


def test_rounds_on_a_cpu_are_of_one_ring_and_as_many_as_asked_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_elsewhere", None)
    done = bench.interleave([CONFIG], 7, seed=0, places=3)
    assert [len(timing.rounds_us) for timing in done.timings] == [7]
