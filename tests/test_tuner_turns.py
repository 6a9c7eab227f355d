"""Several processes on one device: one at a time runs there, and waiting for it costs no candidate its time."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from planting import impatient

from autofuse.cache_db import TunedDatabase
from autofuse.errors import TargetUnavailable
from autofuse.ops import Problem, get_op
from autofuse.targets import Target
from autofuse.tuner import devices as devices_module
from autofuse.tuner.budgets import Effort
from autofuse.tuner.devices import lanes, tune_on_devices
from autofuse.tuner.disturbance import _NvidiaWatch
from autofuse.tuner.isolation import IsolatedBench
from autofuse.tuner.job import Bucket, BucketDone, Event, TrialDone
from autofuse.tuner.queue import BucketQueue
from autofuse.tuner.turns import Turns

CPU = torch.device("cpu")
PROBLEM = Problem.parse("mla_dual_rms_norm(dtype=fp32,q_lora_rank=96,kv_lora_rank=64,cast_before_weight=0)")
HOLDER = """
import sys, time
from pathlib import Path
from autofuse.tuner.turns import Turns
with Turns(Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(path: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that has its turn, for so long."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    return process


def test_a_turn_is_waited_for_and_that_is_said(tmp_path: Path) -> None:
    said: list[tuple[bool, float]] = []
    turns = Turns(tmp_path / "turns", lambda waits: said.append((waits, time.monotonic())))
    with turns, turns:  # again within: it has it already
        pass
    assert said == []
    with holder(tmp_path / "turns", 1.0) as other:
        with turns:
            assert [waits for waits, _ in said] == [True, False]
            assert said[1][1] - said[0][1] > 0.5
        assert turns.members() >= {other.pid}


def test_a_turn_is_not_given_away_within(tmp_path: Path) -> None:
    turns = Turns(tmp_path / "turns")
    with turns:
        with turns:
            pass
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path / "turns"), "0"], timeout=3.0)
    with holder(tmp_path / "turns", 0.0):
        pass


def test_who_dies_has_had_its_turn(tmp_path: Path) -> None:
    with holder(tmp_path / "turns", 60.0) as other:
        other.kill()
        start = time.monotonic()
        with Turns(tmp_path / "turns"):
            assert time.monotonic() - start < 30.0


def test_a_device_of_ones_own_needs_no_turns() -> None:
    with Turns(None) as nothing:
        assert nothing is None


def test_waiting_for_a_turn_is_not_the_candidates_time(tiny: Effort, tmp_path: Path) -> None:
    op = get_op(PROBLEM.op)
    config = op.default_config("cpu", PROBLEM, 4)
    with IsolatedBench(CPU, impatient(tiny, 4.0), tmp_path / "turns") as bench:
        bench.open(PROBLEM, 4, op.source_hash("cpu"))
        assert bench.verify(config) <= 1.0
        with holder(tmp_path / "turns", 8.0):
            assert bench.verify(config) <= 1.0


def test_a_turn_that_never_comes_is_nobodys_failure(tiny: Effort, tmp_path: Path) -> None:
    op = get_op(PROBLEM.op)
    impatient_for_turns = replace(tiny, limits=replace(tiny.limits, turn_s=1.0))
    with IsolatedBench(CPU, impatient_for_turns, tmp_path / "turns") as bench:
        bench.open(PROBLEM, 4, op.source_hash("cpu"))
        assert bench.verify(op.default_config("cpu", PROBLEM, 4)) <= 1.0
        with holder(tmp_path / "turns", 60.0) as other:
            with pytest.raises(TargetUnavailable, match="another process of this job had it for 1 s"):
                bench.verify(op.default_config("cpu", PROBLEM, 4))
            other.kill()


def test_a_turn_is_kept_from_request_to_request(tiny: Effort, tmp_path: Path) -> None:
    op = get_op(PROBLEM.op)
    config = op.default_config("cpu", PROBLEM, 4)
    with IsolatedBench(CPU, tiny, tmp_path / "turns") as bench:
        bench.open(PROBLEM, 4, op.source_hash("cpu"))
        mine = Turns(tmp_path / "turns")
        with bench.turn():
            bench.verify(config)
            with pytest.raises(BlockingIOError):
                fcntl.flock(mine._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            bench.time(config, None)
        with mine:
            pass


def test_the_time_to_open_a_bucket_is_without_the_wait(tiny: Effort, tmp_path: Path) -> None:
    op = get_op(PROBLEM.op)
    with IsolatedBench(CPU, tiny, tmp_path / "turns") as bench:
        bench.open(PROBLEM, 4, op.source_hash("cpu"))
        bench.verify(op.default_config("cpu", PROBLEM, 4))
        with holder(tmp_path / "turns", 6.0):
            bench.open(PROBLEM, 8, op.source_hash("cpu"))
            bench.verify(op.default_config("cpu", PROBLEM, 8))
        assert bench._opened_s < 4.0


def test_several_buckets_at_a_time_on_one_device(tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices_module.LANES, "cpu", 2)
    monkeypatch.setattr(devices_module, "LANE_CORES", 0.25)
    wanted = [Bucket(PROBLEM, tokens) for tokens in (2, 4, 6)]
    assert lanes([CPU], 3) == [CPU, CPU]
    assert lanes([CPU], 1) == [CPU]
    events: list[Event] = []
    with TunedDatabase() as database:
        tune_on_devices(wanted, [CPU], database, tiny, on_event=events.append)
        assert [winner.tokens for winner in database.winners()] == [2, 4, 6]
    done_before_second = [type(event) for event in events].index(BucketDone)
    assert len({event.bucket for event in events[:done_before_second] if isinstance(event, TrialDone)}) > 1


def test_no_more_at_a_time_than_there_are_cores_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices_module.LANES, "cpu", 4)
    for cores, each in ((2, 1), (12, 4), (64, 4), (7, 2)):
        monkeypatch.setattr(devices_module, "usable_cores", lambda cores=cores: cores)
        assert lanes([CPU], 100) == [CPU] * each
    monkeypatch.setattr(devices_module, "usable_cores", lambda: 12)
    assert lanes([CPU, CPU], 100) == [CPU] * 4


def test_no_more_at_a_time_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(devices_module, "usable_cores", lambda: 64)
    monkeypatch.setattr(devices_module, "target_of", lambda device: Target("cuda", "sm_90a", "a GPU"))
    for gigabytes, used, each in ((4, 0, 1), (24, 0, 3), (141, 0, 5), (141, 124, 2), (141, None, 5)):
        properties = SimpleNamespace(total_memory=gigabytes << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        if used is None:  # no library to ask
            monkeypatch.delattr(torch.cuda, "device_memory_used")
        else:
            monkeypatch.setattr(torch.cuda, "device_memory_used", lambda device, used=used: used << 30)
        assert lanes([gpu], 100) == [gpu] * each


def test_takers_keep_to_their_problem_while_there_are_others() -> None:
    other = Problem.parse("mla_dual_rms_norm(dtype=bf16,q_lora_rank=96,kv_lora_rank=64,cast_before_weight=0)")
    queue = BucketQueue([Bucket(problem, tokens) for problem in (PROBLEM, other) for tokens in (1, 2, 3)], takers=2)

    def take(taker: str) -> tuple[Problem, int] | None:
        share = queue.take(taker)
        return None if share is None else (share.bucket.problem, share.bucket.tokens)

    assert take("a") == (PROBLEM, 1)
    assert take("b") == (other, 1)
    assert take("a") == (PROBLEM, 2)
    assert take("a") == (PROBLEM, 3)
    assert take("a") == (other, 2)  # rather than nothing
    assert take("b") == (other, 3)
    assert take("b") is None


def test_those_who_take_turns_do_not_disturb_each_other() -> None:
    busy = [SimpleNamespace(pid=pid, smUtil=50) for pid in (os.getpid(), 5)]
    nvml = Mock(
        nvmlDeviceGetComputeRunningProcesses=lambda handle: busy,
        nvmlDeviceGetProcessUtilization=lambda handle, since: busy,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 0,
    )
    for sharing, found in ((5, ()), (6, ("kernels of other processes on the GPU",))):
        watch = _NvidiaWatch(nvml, "uuid", lambda sharing=sharing: {sharing, os.getpid()})
        watch.begin()
        assert watch.end() == found
