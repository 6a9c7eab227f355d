"""What else a machine did while it was measured. The machines are stand-ins."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planting import tune_here

from autofuse.cache_db import TunedDatabase
from autofuse.ops import get_op
from autofuse.tuner import bench, disturbance
from autofuse.tuner.budgets import Effort
from autofuse.tuner.disturbance import Watch, watch
from autofuse.tuner.job import Bucket, BucketDone, Event, tune_buckets
from autofuse.tuner.measure import Runner, Timing

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CORE = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


class Machine:
    """A ``/proc/stat`` with one core of ours and one of somebody else's, and a process that works."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file = folder / "stat"
        self._ours, self._idle, self._own_s = 0, 0, 0.0
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")
        monkeypatch.setattr(disturbance, "_STAT", self._file)
        monkeypatch.setattr(disturbance.time, "process_time", lambda: self._own_s)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {CORE})
        self.work()

    def work(self, own: int = 0, others: int = 0, idle: int = 0) -> None:
        """So many ticks of our core go to each."""
        self._own_s += own * self._tick_s
        self._ours, self._idle = self._ours + own + others, self._idle + idle
        lines = (f"cpu  9 9 9 9 9 9 9 9 9 9\ncpu{CORE} {self._ours} 0 0 {self._idle} 0 0 0 0 0 0\n", "cpu99 9 0 0 9\n")
        self._file.write_text("".join(lines))


@pytest.mark.parametrize(
    ("ticks", "found"),
    [
        ({"own": 90, "idle": 10}, ()),
        ({"own": 50, "others": 5, "idle": 45}, ()),
        ({"own": 50, "others": 20, "idle": 30}, ("other work on the CPU",)),
        ({}, ()),
    ],
)
def test_other_processes_on_our_cores_are_noticed(
    ticks: dict[str, int], found: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch)
    looking = watch(CPU)
    machine.work(others=1000)  # before it begins
    looking.begin()
    machine.work(**ticks)
    assert looking.end() == found


@pytest.mark.parametrize("content", [None, "", "cpu0 x y z\n"])
def test_a_system_that_does_not_say_is_not_busy(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disturbance, "_STAT", tmp_path / "stat")
    if content is not None:
        (tmp_path / "stat").write_text(content)
    looking = watch(CPU)
    looking.begin()
    assert looking.end() == ()


class Nvml:
    """NVIDIA's management library, as its Python binding has it."""

    def __init__(self, reasons: Sequence[int] = (0, 0), pids: Sequence[int] = (), busy: Sequence[int] = ()) -> None:
        self._reasons = iter(reasons)
        self._pids = pids
        self._busy = busy

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:  # noqa: N802
        return next(self._reasons)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid) for pid in self._pids]

    def nvmlDeviceGetProcessUtilization(self, handle: str, since_us: int) -> list[Any]:  # noqa: N802
        assert since_us > 1_600_000_000_000_000
        return [SimpleNamespace(pid=pid, smUtil=50) for pid in self._busy]


def watched(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    looking = watch(GPU)
    looking.begin()
    return looking.end()


HERE, OTHER = os.getpid(), 1
OTHERS_RAN = ("kernels of other processes on the GPU",)


@pytest.mark.parametrize(
    ("nvml", "found"),
    [
        (Nvml(), ()),
        (Nvml((0x04, 0x04)), ()),  # a limit of power: how fast this GPU is
        (Nvml((0x20, 0)), ("the GPU was too hot",)),
        (Nvml((0, 0x40 | 0x08)), ("the GPU slowed down (hardware)", "the GPU was too hot")),
        (Nvml(pids=[HERE, OTHER], busy=[HERE]), ()),  # it is there, but does nothing
        (Nvml(pids=[HERE, OTHER], busy=[HERE, OTHER]), OTHERS_RAN),
        (Nvml(pids=[7, 8], busy=[7, 8]), ()),  # numbers of another namespace: we may be one of them
    ],
)
def test_a_gpu_that_slows_down_or_is_shared_is_noticed(
    nvml: Nvml, found: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watched(nvml, monkeypatch) == found


def test_a_gpu_without_the_library_or_whose_driver_says_no_is_not_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Nvml):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith(("nvmlDeviceGetC", "nvmlDeviceGetP")):
                raise RuntimeError("not supported")
            return super().__getattribute__(name)

    assert watched(None, monkeypatch) == ()  # an import of None fails
    assert watched(Refusing(), monkeypatch) == ()


class _Busy(Watch):
    def begin(self) -> None:
        pass

    def end(self) -> tuple[str, ...]:
        return ("other work on the CPU",)


@pytest.mark.parametrize(
    ("wide", "reasons"), [(1.0, "other work on the CPU"), (2.0, "unsteady times; other work on the CPU")]
)
def test_a_winner_that_was_measured_meanwhile_is_marked(
    wide: float, reasons: str, tiny: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(prepared: Sequence[Runner], rounds: int, seed: int = 0) -> list[Timing]:
        return [Timing((1.0, wide) * (rounds // 2))] * (len(prepared) - 1) + [Timing((1.0,) * rounds)]

    tune_here(monkeypatch)
    monkeypatch.setattr(bench, "watch", lambda device, own: _Busy())
    monkeypatch.setattr(bench, "interleave", pretend)
    op = get_op("mla_dual_rms_norm")
    problem = op.make_problem(dtype="bf16", q_lora_rank=112, kv_lora_rank=40, cast_before_weight=True)
    events: list[Event] = []
    with TunedDatabase() as database:
        (winner,) = tune_buckets([Bucket(problem, 4)], CPU, database, replace(tiny, attempts=2), on_event=events.append)
        fields = database.provenance(winner.provenance)
    assert fields["disturbances"] == reasons
    assert fields["torch"] == torch.__version__
    assert isinstance(events[-1], BucketDone)
    assert "; ".join(events[-1].disturbances) == reasons
