"""Where inputs lie in memory: rings of inputs at other addresses, as many as there is memory for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autofuse.ops import get_op
from autofuse.tuner.bench import Bench
from autofuse.tuner.budgets import Effort
from autofuse.tuner.measure import Ring, example_ring

CPU = torch.device("cpu")
TOKENS = 3
NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="fp32", q_lora_rank=64, kv_lora_rank=32, cast_before_weight=True)


@pytest.fixture
def bench(tiny: Effort) -> Bench:
    opened = Bench(CPU, tiny)
    opened.open(PROBLEM, TOKENS, NORMS.source_hash("cpu"))
    return opened


def test_rings_are_made_once_and_lie_apart(bench: Bench) -> None:
    rings = bench._rings(3)
    assert [id(ring) for ring in bench._rings(2)] == [id(ring) for ring in rings[:2]]
    addresses = [
        {arg.data_ptr() for args in ring.sets for arg in args if isinstance(arg, torch.Tensor)} for ring in rings
    ]
    assert not addresses[0] & addresses[1] | addresses[1] & addresses[2] | addresses[0] & addresses[2]


def test_a_full_memory_leaves_fewer_rings(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Ring] = []

    def until_full(*args: Any) -> Ring:
        if made:
            raise torch.OutOfMemoryError("full")
        made.append(example_ring(*args))
        return made[0]

    monkeypatch.setattr("autofuse.tuner.bench.example_ring", until_full)
    assert len(bench._rings(5)) == 2
    assert len(bench._rings(5)) == 2


def test_rounds_on_a_cpu_are_of_one_ring_and_as_many_as_asked_for(bench: Bench) -> None:
    config = NORMS.default_config("cpu", PROBLEM, TOKENS)
    done = bench.interleave([config], 7, seed=0, places=3)
    assert [len(timing.rounds_us) for timing in done.timings] == [7]
    assert len(bench._rings(1)) == 1
    assert bench._opened().rings == bench._rings(1)
