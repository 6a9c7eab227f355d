"""``autofuse tune --watch``, ``--exclusive`` and ``--dry-run``: when the tuner works, and what it says beforehand."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planting import tune_here

from autofuse.cache_db import Captured, Trial, TunedDatabase, Winner
from autofuse.cache_db.records import TIME_FORMAT
from autofuse.cli import watch as watch_module
from autofuse.cli.app import run
from autofuse.cli.watch import watch
from autofuse.errors import DatabaseError
from autofuse.ops import Problem, get_op
from autofuse.targets import target_of
from autofuse.tuner import api, budgets, devices, idleness, job
from autofuse.tuner.budgets import GUESSED_PACE, Effort
from autofuse.tuner.device_lock import device_lock
from autofuse.tuner.forecast import Forecast, forecast, paces
from autofuse.tuner.job import tune_buckets
from autofuse.tuner.queue import Bucket

CPU = torch.device("cpu")
NORMS = get_op("mla_dual_rms_norm")


def norms(q: int = 96) -> Problem:
    return NORMS.make_problem(dtype="bf16", q_lora_rank=q, kv_lora_rank=40, cast_before_weight=True)


# Watching


class Service:
    """A watch that a test steps through: ``sleeps`` is how long it rested each time, until ``naps`` of them."""

    def __init__(self, database: TunedDatabase, effort: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
        self.database, self.effort = database, effort
        self.sleeps: list[float] = []
        self.lines: list[str] = []
        self.devices = [CPU]
        self.others: list[str | None] = []
        self.on_sleep: Callable[[], None] = lambda: None
        monkeypatch.setattr(watch_module, "_others", lambda devices: self.others.pop(0) if self.others else None)
        monkeypatch.setattr(watch_module, "typer", SimpleNamespace(echo=lambda line, err: self.lines.append(line)))

    def run(self, naps: int, duty: float = 0.5, ends_by: type[BaseException] = KeyboardInterrupt) -> None:
        def sites() -> dict[Captured, list[Bucket]]:
            return {site: api.captured_buckets(site) for site in self.database.captured()}

        def sleep(seconds: float) -> None:
            self.sleeps.append(seconds)
            self.on_sleep()
            if len(self.sleeps) == naps:
                raise KeyboardInterrupt

        with pytest.raises(ends_by):
            watch(self.database, self.devices, sites, self.effort, 0, duty, sleep=sleep)


@pytest.fixture
def service(tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> Any:
    tune_here(monkeypatch)
    with TunedDatabase() as database:
        yield Service(database, tiny, monkeypatch)


def capture(database: TunedDatabase, problem: Problem, low: int, high: int) -> None:
    database.record_captured(Captured(target_of(CPU), problem, low, high))


def test_it_tunes_a_bucket_at_a_time_and_forgets_the_site_with_the_last(service: Service) -> None:
    capture(service.database, norms(), 2, 100)  # T=64 and T=1024
    service.run(1)
    assert [winner.tokens for winner in service.database.winners()] == [64]
    assert len(service.database.captured()) == 1
    service.sleeps.clear()
    service.run(3)  # a service that is started anew goes on
    assert [winner.tokens for winner in service.database.winners()] == [64, 1024]
    assert service.database.captured() == []
    assert service.sleeps[-1] == budgets.WATCH_LOOK_S
    assert service.lines[-1] == "autofuse: waiting for sites that are not tuned"


def test_new_sites_are_found(service: Service) -> None:
    service.on_sleep = lambda: capture(service.database, norms(), 4, 4) if len(service.sleeps) == 1 else None
    service.run(2)
    assert [winner.tokens for winner in service.database.winners()] == [4]


def test_while_others_use_the_device_it_waits_and_says_so_once(service: Service) -> None:
    capture(service.database, norms(), 4, 4)
    service.others = ["cpu is busy: 2.0 of 2 cores are at work"] * 3
    service.run(3)
    assert service.sleeps == [budgets.WATCH_LOOK_S] * 3
    assert service.lines == ["autofuse: waiting: cpu is busy: 2.0 of 2 cores are at work"]
    assert service.database.winners() == []


def test_it_rests_as_long_as_its_share_of_the_time_asks_for(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(service.database, norms(), 4, 4)
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(watch_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(watch_module, "_tune", lambda database, devices, batch, *rest: (set(batch), set()))
    service.run(1, duty=0.2)
    assert service.sleeps == [pytest.approx(40.0)]


def test_another_tuner_is_waited_for(service: Service) -> None:
    capture(service.database, norms(), 4, 4)
    with device_lock([CPU]):
        service.run(3)
    (line,) = service.lines
    assert "is at work on cpu" in line
    assert service.sleeps == [budgets.WATCH_LOOK_S] * 3
    assert service.database.winners() == []
    service.sleeps.clear()
    service.run(1)
    assert service.lines[1] == "autofuse: 1 buckets to tune"
    assert len(service.database.winners()) == 1


@pytest.mark.parametrize("devices", [1, 2])
def test_what_cannot_be_tuned_is_said_and_left_and_the_rest_is_tuned(
    devices: int, service: Service, edit_kernels: Callable[[str, str, str], None]
) -> None:
    edit_kernels("mla_dual_rms_norm.cpp", "struct Params", "#if WIDTH_A == 232\n#error no\n#endif\nstruct Params")
    spec = NORMS.spec("cpu", norms(232), NORMS.default_config("cpu", norms(232), 4))
    (name,) = [name for name, value in spec.defines.items() if value == 232]
    edit_kernels("mla_dual_rms_norm.cpp", "WIDTH_A == 232", f"{name} == 232")
    for width in (232, 248):
        capture(service.database, norms(width), 4, 4)
    service.devices = [CPU] * devices
    service.run(4)
    assert [winner.problem for winner in service.database.winners()] == [norms(248)]
    assert [site.problem for site in service.database.captured()] == [norms(232)]
    assert sum("is not tried again" in line for line in service.lines) == 1


def failing_to_open(monkeypatch: pytest.MonkeyPatch, problem: Problem, error: Exception) -> None:
    opens = job.IsolatedBench.open

    def opened(bench: Any, which: Problem, *arguments: Any) -> None:
        if which == problem:
            raise error
        opens(bench, which, *arguments)

    monkeypatch.setattr(job.IsolatedBench, "open", opened)


@pytest.mark.parametrize(
    "error", [MemoryError("DefaultCPUAllocator:\n  can't allocate memory"), RuntimeError("KeyError: 'x'")]
)
def test_what_does_not_fit_or_fails_in_the_worker_is_left_and_the_rest_is_tuned(
    error: Exception, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_to_open(monkeypatch, norms(), error)
    for problem in (norms(), norms(104)):
        capture(service.database, problem, 4, 4)
    service.run(4)
    assert [winner.problem for winner in service.database.winners()] == [norms(104)]
    assert [site.problem for site in service.database.captured()] == [norms()]
    (line,) = [line for line in service.lines if "is not tried again" in line]
    assert line.endswith(" ".join(str(error).split()))


def test_where_one_of_several_fails_the_unfinished_are_tuned_one_at_a_time(
    service: Service, tiny: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []

    def in_turn(batch: Sequence[Bucket], on: object, database: TunedDatabase, effort: Effort, **options: Any) -> None:
        batches.append([bucket.problem["q_lora_rank"] for bucket in batch])
        tune_buckets(batch, CPU, database, effort, **options)

    monkeypatch.setattr(devices, "tune_on_devices", in_turn)
    failing_to_open(monkeypatch, norms(104), MemoryError("can't allocate memory"))
    for width in (104, 112, 120, 128):
        capture(service.database, norms(width), 4, 4)
    service.devices = [CPU] * 2
    service.run(5)
    assert batches == [[104, 112], [104], [112], [120, 128]]
    assert [site.problem for site in service.database.captured()] == [norms(104)]
    assert sum("is not tried again" in line for line in service.lines) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), DatabaseError("it cannot be written")])
def test_what_is_no_buckets_fault_ends_the_service(
    error: Exception, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_to_open(monkeypatch, norms(), error)
    capture(service.database, norms(), 4, 4)
    service.run(1, ends_by=type(error))
    assert not any("is not tried again" in line for line in service.lines)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_service_ends_by_signals(number: int, code: int, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(120)
        process = subprocess.Popen(
            [sys.executable, "-m", "autofuse", "tune", "--watch", "--device", "cpu"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            start_new_session=True,
        )
        assert systemd.recv(100) == b"READY=1"
    assert process.stderr is not None
    assert process.stderr.readline() == "autofuse: waiting for sites that are not tuned\n"
    process.send_signal(number)
    assert process.stderr.read() == "autofuse: stopped; everything measured so far is kept\n"
    assert process.wait() == code


# A busy device


def test_a_cpu_is_busy_if_its_cores_are_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idleness, "LOOK_S", 0.05)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for worked_s, said in ((0.0, False), (1000.0, True)):
        seconds = iter([5.0, 5.0 + worked_s])
        monkeypatch.setattr(idleness, "_cpu_seconds", lambda seconds=seconds: next(seconds))
        assert (idleness.busy(CPU) is not None) == said
    monkeypatch.setattr(idleness, "_cpu_seconds", lambda: None)
    assert idleness.busy(CPU) is None


def test_the_work_of_all_cores_is_counted() -> None:
    before = idleness._cpu_seconds()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = idleness._cpu_seconds()
    assert before is not None
    assert after is not None
    assert after - before > 0.2


SMI = """#!/bin/sh
case "$*" in
  *query-compute-apps*) printf '{apps}' ;;
  *query-gpu*) printf '{use}' ;;
esac
"""


@pytest.mark.parametrize(
    ("apps", "use", "processes", "said"),
    [
        ("", "0 %%\\n", True, None),
        ("4711, python\\n4712, vllm\\n", "0 %%\\n", True, "process 4711 (python) and 1 more is on it"),
        ("4711, python\\n", "0 %%\\n", False, None),
        ("", "87 %%\\n", True, "kernels run on it 87 % of the time"),
        ("", "[N/A]\\n", True, None),
    ],
)
def test_a_gpu_is_busy_with_processes_and_kernels(
    apps: str, use: str, processes: bool, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI.format(apps=apps, use=use), encoding="utf-8")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0-1"))
    monkeypatch.setattr(idleness, "LOOK_S", 0.05)
    assert idleness.busy(torch.device("cuda:0"), processes=processes) == said


def test_without_nvidia_smi_a_gpu_counts_as_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0-1"))
    monkeypatch.setattr(idleness, "LOOK_S", 0.05)
    assert idleness.busy(torch.device("cuda:0"), processes=True) is None


TUNE = ["tune", "--problem", str(norms()), "--tokens", "4", "--device", "cpu", "--exclusive"]


def test_exclusive_refuses_a_busy_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(idleness, "busy", lambda device, processes: "process 4711 (python) is on it")
    assert run(TUNE) == 2
    said = "device cpu is busy: process 4711 (python) is on it; --exclusive tunes on idle devices only"
    assert capsys.readouterr().err == f"autofuse: error: {said}\n"


def test_exclusive_refuses_a_device_that_another_tuner_has(capsys: pytest.CaptureFixture[str]) -> None:
    with device_lock([CPU]):
        assert run(TUNE) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"autofuse: error: another autofuse tune (process {os.getpid()} on {platform.node()}) is at work on cpu"
    )


# What would be done


def look(database: TunedDatabase, effort: Effort, *tokens: int, **options: Any) -> Forecast:
    return forecast([Bucket(norms(), count) for count in tokens], [CPU], database, effort, **options)


def states(found: Forecast) -> list[tuple[str, int, int]]:
    return [(outlook.state, outlook.known, outlook.trials) for outlook in found.outlooks]


def test_a_forecast_says_what_is_tuned_begun_stale_and_new(
    tiny: Effort, monkeypatch: pytest.MonkeyPatch, edit_kernels: Callable[[str, str, str], None]
) -> None:
    tune_here(monkeypatch)
    with TunedDatabase() as database:
        tune_buckets([Bucket(norms(), 4)], CPU, database, tiny)
        more = replace(tiny, trials=6)
        assert states(look(database, tiny, 4, 64)) == [("tuned", 4, 0), ("new", 0, 4)]
        assert states(look(database, more, 4)) == [("begun", 4, 2)]
        assert states(look(database, tiny, 4, retune=True)) == [("again", 4, 4)]
        assert look(database, tiny, 4).seconds == 0.0
        edit_kernels("mla_dual_rms_norm.cpp", "struct Params", "// another version\nstruct Params")
        assert states(look(database, tiny, 4)) == [("stale", 0, 4)]


def rows(database: TunedDatabase, gaps_s: Sequence[float], final_s: float) -> None:
    at = datetime(2026, 1, 1)
    target, source = target_of(CPU), NORMS.source_hash("cpu")
    configs = list(NORMS.kernel_source("cpu").space.configs(norms(), 64))
    for config, gap in zip(configs, [0.0, *gaps_s], strict=False):
        at += timedelta(seconds=gap)
        when = at.strftime(TIME_FORMAT)
        database.record_trial(Trial(target, norms(), 64, config, source, "ok", time_us=1.0, measured_at=when))
    when = (at + timedelta(seconds=final_s)).strftime(TIME_FORMAT)
    made = Winner(target, norms(), 64, configs[0], source, 1.0, 0.1, "eager", 2.0, 2.0, 1.9, 2.1, measured_at=when)
    database.record_winner(made)


def test_its_pace_is_that_of_recorded_trials_and_a_pause_is_none_of_it(tiny: Effort) -> None:
    with TunedDatabase() as database:
        rows(database, [2.0, 4.0, 86_400.0, 3.0], final_s=20.0)
        pace = paces(database, target_of(CPU))[NORMS.name]
        guess = GUESSED_PACE["cpu"]
        assert (pace.trial_s, pace.bucket_s) == (3.0, 20.0 + guess.open_s)
        found = look(database, replace(tiny, trials=5), 1, 64)
        assert [outlook.seconds for outlook in found.outlooks] == [20.0 + guess.open_s + 5 * 3.0, 0.0]
        assert found.basis.startswith("from trials of the same ops")
        two = forecast([Bucket(norms(), t) for t in (1, 2)], [CPU, CPU], database, tiny)
        assert two.seconds == pytest.approx(sum(outlook.seconds for outlook in two.outlooks) / 2)
        assert look(database, tiny, 1, budget_s=5.0).seconds == 5.0


def test_a_dry_run_measures_and_makes_nothing(database_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune", "--model", "deepseek-v3", "--tp", "8", "--tokens", "1,64", "--device", "cpu", "--dry-run"]
    assert run(command) == 0
    written = capsys.readouterr()
    assert "guessed: nothing was measured" in written.out
    assert "heads=16" in written.out
    assert written.err == ""
    assert run([*command, "--json", "--trials", "3", "--op", "mla_dual_rms_norm"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [(each["tokens"], each["state"], each["trials"]) for each in facts["buckets"]] == [
        (1, "new", 3),
        (64, "new", 3),
    ]
    assert facts["seconds"] == sum(each["seconds"] for each in facts["buckets"])
    assert facts["devices"] == ["cpu"]
    assert not database_path.exists()


def test_no_more_trials_than_asked_for(monkeypatch: pytest.MonkeyPatch, tiny: Effort) -> None:
    tune_here(monkeypatch)
    monkeypatch.setitem(budgets.EFFORTS, "quick", tiny)
    assert run([*TUNE[:-1], "--effort", "quick", "--trials", "2", "--budget", "10m"]) == 0
    with TunedDatabase(read_only=True) as database:
        assert len(database.every(Trial)) == 2
