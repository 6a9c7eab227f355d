"""The kernel that the tuner launches between calls: it fills a GPU, and its own time is no call's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autofuse.cache_db import TIMED
from autofuse.errors import BadInput, TargetUnavailable
from autofuse.ops import Config, get_op
from autofuse.runtime.dispatch import registry
from autofuse.targets import Target, kind_of_arch, toolchain
from autofuse.tuner.bench import EAGER, Bench
from autofuse.tuner.budgets import Effort
from autofuse.tuner.compile_matrix import GPU_ARCHES
from autofuse.tuner.job import provenance_of
from autofuse.tuner.measure import Beside, Ring, Runner, Timing, _CudaRunner, example_ring, launches_each, runner
from autofuse.tuner.stand_in import StandIn, spec_of, stand_in

GPU = torch.device("cuda", 0)
DRIVER_BYTES = 1024  # of a block's shared memory, on NVIDIA


def test_on_a_cpu_nothing_stands_in() -> None:
    assert stand_in(torch.device("cpu"), Effort()) is None


@pytest.mark.parametrize("arch", [arch for arch in GPU_ARCHES if arch.startswith("sm_")])
@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_its_blocks_fill_a_multiprocessors_shared_memory(arch: str, blocks: int) -> None:
    whole = (toolchain("cuda").most_shared_bytes(arch) or 0) + DRIVER_BYTES
    taken = blocks * (spec_of(arch, blocks).shared_bytes + 4 + DRIVER_BYTES)  # 4: its own variable
    assert whole - 2048 < taken <= whole


@pytest.mark.parametrize("arch", GPU_ARCHES)
def test_it_compiles_for_gpus_that_are_not_here(arch: str) -> None:
    chain = toolchain(kind_of_arch(arch))
    try:
        chain.check_arch(arch)
    except (BadInput, TargetUnavailable) as missing:
        pytest.skip(str(missing))
    resources = chain.compile(spec_of(arch, 4), arch).resources
    assert (resources.spill_bytes, resources.shared_bytes) == (0, 4)


class _OfThree(Beside):
    us = 3.0

    def __call__(self) -> None: ...

    def hold(self) -> None: ...


class _Replayed(_CudaRunner):
    """Replays take what they are told to."""

    def __init__(self, sets: int, beside: Beside | None, replay_us: float) -> None:
        self._beside, self._beside_each = beside, launches_each(sets)
        self.calls_each = sets
        self._replay_us = replay_us
        self._lengthen(4 * replay_us)

    def _time_us(self) -> float:
        return self.repeats * self._replay_us


@pytest.mark.parametrize(("sets", "launches"), [(3, 2), (4, 3), (5, 4), (6, 4), (7, 5), (9, 6)])
def test_its_own_time_is_no_calls(sets: int, launches: int) -> None:
    """Calls of 2 µs, and launches of 3 µs."""
    beside = _OfThree()
    prepared = _Replayed(sets, beside, replay_us=2.0 * sets + 3.0 * launches)
    assert prepared.repeats > 1
    assert (prepared.round_us(), prepared.first_us) == pytest.approx((2.0, 2.0))
    beside.us = 1.5  # calibrated anew
    assert prepared.round_us() == pytest.approx(2.0 + 1.5 * launches / sets)
    assert _Replayed(sets, None, replay_us=2.0 * sets).round_us() == pytest.approx(2.0)


def test_rings_have_whole_turns_of_calls_behind_it_and_not() -> None:
    norms = get_op("mla_dual_rms_norm")
    problem = norms.make_problem(dtype="fp32", q_lora_rank=64, kv_lora_rank=32, cast_before_weight=True)
    bytes_each = norms.bytes_moved(problem, 2)
    for most, wanted, sets in ((255, 1, 3), (255, 4, 6), (255, 6, 6), (4, 100, 6), (255, 1000, 255)):
        effort = Effort(ring_bytes=wanted * bytes_each, ring_sets=most)
        assert len(example_ring(norms, problem, 2, torch.device("cpu"), effort).sets) == sets


class _Pretended(Beside):
    """Stands in on a device that needs none, and says when it was calibrated."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def __call__(self) -> None: ...

    def hold(self) -> None: ...

    def calibrate(self) -> None:
        self._log.append("calibrated")


def test_all_that_is_timed_comes_behind_it(tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = get_op("mla_dual_rms_norm")
    problem = norms.make_problem(dtype="fp32", q_lora_rank=64, kv_lora_rank=32, cast_before_weight=True)
    config = norms.default_config("cpu", problem, 3)
    log: list[str] = []
    pretended = _Pretended(log)

    def noted(*args: Any, beside: Beside | None, **kwargs: Any) -> Runner:
        assert beside is pretended
        log.append("prepared")
        return runner(*args, **kwargs)

    monkeypatch.setattr("autofuse.tuner.bench.stand_in", lambda device, effort: pretended)
    monkeypatch.setattr("autofuse.tuner.bench.runner", noted)
    bench = Bench(torch.device("cpu"), tiny)
    bench.open(problem, 3, norms.source_hash("cpu"))
    bench.time(config, None)
    assert log == ["calibrated", "prepared"]  # what it takes must be known before
    bench.baselines(compiled=False)
    bench.interleave([config, EAGER], 2, seed=0)
    assert log[2:] == ["prepared", "calibrated"]


def test_a_config_is_loaded_once_however_often_it_is_timed(tiny: Effort, loaded: list[Config]) -> None:
    norms = get_op("mla_dual_rms_norm")
    problem = norms.make_problem(dtype="fp32", q_lora_rank=72, kv_lora_rank=32, cast_before_weight=True)
    config = norms.default_config("cpu", problem, 3)
    bench = Bench(torch.device("cpu"), tiny)
    bench.open(problem, 3, norms.source_hash("cpu"))
    bench.verify(config)
    bench.time(config, None)
    bench.baselines(compiled=False)
    bench.interleave([config, EAGER], 2, seed=0)
    assert len(loaded) == (1 if registry.go_native() else 2)


def test_provenance_says_how_it_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TIMED not in provenance_of(torch.device("cpu"))
    gpu = Target("cuda", "sm_90a", "NVIDIA H200")
    chain = type("Chain", (), {"provenance": lambda self, device: {"driver": "580"}})()
    monkeypatch.setattr("autofuse.tuner.job.target_of", lambda device: gpu)
    monkeypatch.setattr("autofuse.tuner.job.toolchain", lambda kind: chain)
    assert provenance_of(GPU)[TIMED]


@pytest.fixture
def beside(tiny: Effort) -> StandIn:
    made = stand_in(GPU, tiny)
    assert made is not None
    made.calibrate()
    return made


@pytest.mark.gpu
def test_it_takes_time_that_is_measured_again_only_after_a_while(
    beside: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert beside.us > 0.0
    before = beside.us
    monkeypatch.setattr("autofuse.tuner.stand_in.time_alone", lambda *args: Timing((1234.0,)))
    beside.calibrate()
    assert beside.us == before
    monkeypatch.setattr("autofuse.tuner.stand_in._HOLDS_S", 0.0)
    beside.calibrate()
    assert beside.us == 1234.0


@pytest.mark.gpu
@pytest.mark.parametrize("sets", [3, 4, 8])
def test_a_graph_has_it_before_two_of_three_calls(beside: StandIn, tiny: Effort, sets: int) -> None:
    launched: list[str] = []

    class Noted(Beside):
        us = beside.us

        def __call__(self) -> None:
            launched.append("it")
            beside()

        def hold(self) -> None:
            launched.append("held")
            beside.hold()

    ring = Ring.of([(torch.zeros(1024, device=GPU),) for _ in range(sets)], GPU)

    def call(x: torch.Tensor) -> torch.Tensor:
        launched.append("call")
        return torch.neg(x)

    prepared = runner(call, ring, GPU, tiny, beside=Noted(), warm=False)
    once = [each for number in range(sets) for each in (("it", "call") if number % 3 < 2 else ("call",))]
    assert launched[: 2 + len(once)] == ["call", "call", *once]  # two calls come before the capture
    rounds = launched[2 + len(once) :]
    assert set(rounds) == {"held"}  # each of those that told its length
    prepared.round_us()
    assert launched[2 + len(once) :] == [*rounds, "held"]
