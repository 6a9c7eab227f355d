"""One job on several devices, and one tuner at a time on each. CPUs stand in for GPUs."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from autofuse.cache_db import Trial, TunedDatabase
from autofuse.errors import AutofuseError, BadInput, TargetUnavailable
from autofuse.ops import get_op
from autofuse.tuner import devices as devices_module
from autofuse.tuner.budgets import Effort
from autofuse.tuner.device_lock import device_lock, lock_path
from autofuse.tuner.devices import parse_devices, tune_on_devices
from autofuse.tuner.job import BucketDone, Event, TrialDone
from autofuse.tuner.queue import Bucket, BucketQueue

CPU = torch.device("cpu")
NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=96, kv_lora_rank=40, cast_before_weight=True)


def buckets(*tokens: int) -> list[Bucket]:
    return [Bucket(PROBLEM, count) for count in tokens]


# The queue


def test_a_queue_hands_each_bucket_out_once() -> None:
    queue = BucketQueue(buckets(1, 2))
    taken = [queue.take(), queue.take(), queue.take()]
    assert [share and share.bucket.tokens for share in taken] == [1, 2, None]


def test_time_is_shared_by_those_who_tune_at_once() -> None:
    alone, pair = BucketQueue(buckets(1, 2, 3, 4), 100.0), BucketQueue(buckets(1, 2, 3, 4), 100.0, takers=2)
    first, second = alone.take(), pair.take()
    assert first is not None
    assert second is not None
    assert first.budget_s == pytest.approx(25.0, abs=1.0)
    assert second.budget_s == pytest.approx(50.0, abs=1.0)


def test_without_time_nothing_is_handed_out() -> None:
    assert BucketQueue(buckets(1), 0.0).take() is None


def test_a_bucket_without_tokens_is_refused_before_anything_is_done() -> None:
    with pytest.raises(BadInput, match="at least one token"):
        BucketQueue(buckets(4, 0))


# Several devices


def test_two_devices_take_from_one_queue_into_one_database(tiny: Effort) -> None:
    events: list[Event] = []
    wanted = buckets(2, 4, 6, 8)
    with TunedDatabase() as database:
        winners = tune_on_devices(wanted, [CPU, CPU], database, tiny, on_event=events.append)
        assert sorted(winner.tokens for winner in database.winners()) == [2, 4, 6, 8]
        assert sorted(winners, key=lambda winner: winner.tokens) == database.winners()
        measured = [event.trial for event in events if isinstance(event, TrialDone)]
        rows = database.every(Trial)
        assert sorted(measured, key=str) == sorted(rows, key=str)
        again: list[Event] = []
        tune_on_devices(wanted, [CPU, CPU], database, tiny, on_event=again.append)
    assert sum(isinstance(event, BucketDone) for event in events) == 4
    assert not any(isinstance(event, TrialDone) for event in again)
    # Both were at work: a bucket began while another was not done.
    done_before_second = [type(event) for event in events].index(BucketDone)
    assert len({event.bucket for event in events[:done_before_second]}) > 1


def test_what_fails_on_one_device_is_said_with_its_name(
    tiny: Effort, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with (
        TunedDatabase() as database,
        pytest.raises(TargetUnavailable, match=r"^device cpu: .*CXX='no-such-compiler'"),
    ):
        tune_on_devices(buckets(4, 8), [CPU, CPU], database, tiny)


def test_a_process_that_dies_is_one_line(tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    started = devices_module.start_module

    def dying(*arguments: object, **options: object) -> subprocess.Popen[str]:
        process = started(*arguments, **options)  # type: ignore[arg-type]
        process.kill()
        return process

    monkeypatch.setattr(devices_module, "start_module", dying)
    with TunedDatabase() as database, pytest.raises(AutofuseError, match=r"process that tunes on it died .*is kept"):
        tune_on_devices(buckets(4, 8), [CPU, CPU], database, tiny)


def test_numpy_has_one_thread_in_each_process_unless_told_otherwise(
    tiny: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    started = devices_module.start_module
    threads: list[list[str]] = []

    def noted(*args: Any, env: dict[str, str], **options: Any) -> subprocess.Popen[bytes]:
        threads.append([env["OPENBLAS_NUM_THREADS"], env["MKL_NUM_THREADS"]])
        return started(*args, env=env, **options)

    monkeypatch.setattr(devices_module, "start_module", noted)
    with TunedDatabase() as database:
        tune_on_devices(buckets(4, 8), [CPU, CPU], database, tiny)
    assert threads == [["1", "3"]] * 2


def test_an_interrupt_stops_all_devices_and_leaves_no_half_row(tiny: Effort) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, TrialDone):
            raise KeyboardInterrupt

    with TunedDatabase() as database:
        with pytest.raises(KeyboardInterrupt):
            tune_on_devices(buckets(2, 4, 6), [CPU, CPU], database, tiny, on_event=interrupt)
        rows = database.every(Trial)
        assert rows
        assert {row.status for row in rows} == {"ok"}
        tune_on_devices(buckets(2, 4, 6), [CPU, CPU], database, tiny)
        assert {(row.tokens, row.config) for row in rows} <= {(row.tokens, row.config) for row in database.every(Trial)}
        assert len(database.winners()) == 3


def test_devices_are_named_by_all_or_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices_module, "parse_device", torch.device)
    monkeypatch.setattr(devices_module, "target_of", lambda device: device.type)
    assert parse_devices("all") == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert parse_devices("cuda:1, cuda:0,cuda:1") == [torch.device("cuda:1"), torch.device("cuda:0")]
    with pytest.raises(BadInput, match=r"are of several kinds .*: tune one kind at a time"):
        parse_devices("cpu,cuda:0")


# One tuner at a time


HOLD = """
import sys, torch
from autofuse.tuner.device_lock import device_lock
with device_lock([torch.device("cpu")]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder() -> object:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_another_tuner_on_the_device_is_named_and_not_waited_for_longer_than_asked(
    holder: subprocess.Popen[str],
) -> None:
    said: list[str] = []
    who = f"process {holder.pid} on {platform.node()}"
    for wait_s in (0.0, 0.6):
        with (
            pytest.raises(TargetUnavailable, match=re.escape(f"another autofuse tune ({who}) is at work on cpu")),
            device_lock([CPU], wait_s=wait_s, on_wait=said.append),
        ):
            pytest.fail("it is held")
    (line,) = said
    assert line.endswith("waiting for it")


def test_a_cpu_is_its_hosts_where_several_share_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(host: str) -> Path:
        monkeypatch.setattr(platform, "node", lambda: host)
        return lock_path(CPU)

    assert on("../a node.example").name == "cpu-___a_node_example.lock"
    assert on("two").parent == on("one").parent
    with device_lock([CPU], wait_s=0.0):
        on("two")
        with device_lock([CPU], wait_s=0.0):
            pass


def test_the_system_lets_go_of_what_a_killed_tuner_held(holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    begin = time.monotonic()
    with device_lock([CPU], wait_s=5.0):
        assert time.monotonic() - begin < 2.0
    assert lock_path(CPU).is_file()


def test_the_lock_is_handed_on_when_the_other_ends(holder: subprocess.Popen[str]) -> None:
    def end(line: str) -> None:
        assert holder.stdin is not None
        holder.stdin.close()

    with device_lock([CPU], on_wait=end):
        assert holder.wait(10) == 0


def test_processes_of_a_tuner_do_not_hold_its_lock(tmp_path: Path) -> None:
    with device_lock([CPU]):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with device_lock([CPU], wait_s=0.0):
            pass
    finally:
        child.kill()
        child.wait()


JOB = """
import torch
from autofuse.cache_db import TunedDatabase
from autofuse.ops import Problem
from autofuse.tuner.budgets import Effort
from autofuse.tuner.devices import tune_on_devices
from autofuse.tuner.job import TrialDone
from autofuse.tuner.queue import Bucket

buckets = [Bucket(Problem.parse({problem!r}), tokens) for tokens in (2, 4, 6, 8)]
with TunedDatabase() as database:
    tune_on_devices(buckets, [torch.device("cpu")] * 2, database, Effort(),
                    on_event=lambda event: print(type(event).__name__, flush=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_job_leaves_no_process_and_its_trials(tmp_path: Path) -> None:
    mark = f"AUTOFUSE_TEST_MARK={tmp_path}"
    process = subprocess.Popen(
        [sys.executable, "-c", JOB.format(problem=str(PROBLEM))],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **dict([mark.split("=", 1)])},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "TrialDone\n":
            break
    assert len(marked(mark)) >= 3
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.1)
    assert marked(mark) == []
    with TunedDatabase() as database:
        rows = database.every(Trial)
    assert any(row.status == "ok" for row in rows)
    assert sum(row.status != "ok" for row in rows) <= 2  # what ran on each when they died


def marked(mark: str) -> list[int]:
    """The processes that have ``mark`` in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found
