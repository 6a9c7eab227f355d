"""The kernel that the tuner launches between calls: it fills a GPU, and its own time is no call's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autofuse.errors import BadInput, TargetUnavailable
from autofuse.targets import kind_of_arch, toolchain
from autofuse.tuner.budgets import Effort
from autofuse.tuner.compile_matrix import GPU_ARCHES
from autofuse.tuner.measure import Beside, Ring, runner
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


class _Noted(Beside):
    def __init__(self, inner: Beside, launched: list[None]) -> None:
        self._inner, self._launched = inner, launched
        self.us = inner.us

    def __call__(self) -> None:
        self._launched.append(None)
        self._inner()


@pytest.fixture
def beside(tiny: Effort) -> StandIn:
    made = stand_in(GPU, replace(tiny, round_us=2000.0))
    assert made is not None
    return made


@pytest.mark.gpu
def test_what_stands_in_takes_a_few_microseconds(beside: StandIn) -> None:
    assert 0.5 < beside.us < 10.0
    before = beside.us
    beside.calibrate()
    assert beside.us == pytest.approx(before, rel=0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("sets", [3, 4, 8])
def test_the_time_of_what_stands_in_is_no_calls(beside: StandIn, tiny: Effort, sets: int) -> None:
    effort = replace(tiny, round_us=10_000.0)
    long = [(torch.zeros(1 << 22, device=GPU), torch.empty(1 << 22, device=GPU)) for _ in range(sets)]
    launched: list[None] = []
    ring = Ring.of(long, GPU)
    alone = runner(lambda source, to: to.copy_(source), ring, GPU, effort)
    behind = runner(lambda source, to: to.copy_(source), ring, GPU, effort, beside=_Noted(beside, launched))
    assert len(launched) == sum(number % 3 < 2 for number in range(sets))
    alone_us, behind_us = (min(each.round_us() for _ in range(5)) for each in (alone, behind))
    assert behind_us == pytest.approx(alone_us, rel=0.1)
    assert beside.us / 2 > 0.1 * alone_us  # or the test would see nothing
