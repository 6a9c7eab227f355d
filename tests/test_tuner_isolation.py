"""Whatever a candidate does, it becomes a failed trial, and the job goes on in another process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import PROBLEM, Planted, impatient, plant

from autofuse import kernels_src
from autofuse.cache_db import TunedDatabase
from autofuse.errors import AutofuseError, BadInput
from autofuse.ops import OPS, Problem, get_op
from autofuse.targets import target_of
from autofuse.tuner import isolation
from autofuse.tuner.budgets import Effort
from autofuse.tuner.isolation import IsolatedBench, WorkerError
from autofuse.tuner.job import Bucket, BucketDone, Event, TrialDone, tune_buckets

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
TOKENS = 12
EditKernels = Callable[[str, str, str], None]
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture
def planted(edit_kernels: EditKernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Planted:
    return plant(edit_kernels, monkeypatch, tmp_path)


def tune(database: TunedDatabase, effort: Effort, **options: Any) -> Any:
    return tune_buckets([Bucket(PROBLEM, TOKENS)], CPU, database, effort, **options)


# What candidates do

OUTCOMES = {
    "write to address 8": ("crashed", "the process died of SIGSEGV"),
    "integer division by zero": ("crashed", "the process died of SIGFPE"),
    "illegal instruction": ("crashed", "the process died of SIGILL"),
    "endless loop": ("timed_out", r"it did not end within \d+ s"),
    "abort": ("crashed", "the process died of SIGABRT"),
    "exit": ("crashed", r"it ended the process \(exit code 3\)"),
    "killed": ("crashed", r"the process was killed \(SIGKILL\), as the system does when memory runs out"),
    "write after a result": ("wrong", "bytes beside result 1 were written: 0 bytes after its end"),
    "write before a result": ("wrong", "bytes beside result 0 were written: 1 bytes before its begin"),
    "write after what it writes into": ("wrong", "bytes beside an input were written"),
    "last row unwritten": ("wrong", "result 0 is inf times the tolerance"),
    "NaN": ("wrong", "result 0 is inf times the tolerance"),
    "another result each time": ("wrong", "result 0 differs between two runs"),
    "changed input": ("wrong", "input 0 was changed"),
    "does not compile": ("compile_error", "this config does not compile"),
}


def test_each_fault_is_a_failed_trial_and_the_right_config_wins(planted: Planted, tiny: Effort) -> None:
    planted.choose(CPU, *OUTCOMES, "none")
    events: list[Event] = []
    with TunedDatabase() as database:
        winners = tune(database, impatient(tiny, 6.0), on_event=events.append)
        trials = planted.trials(database, CPU, TOKENS)
    assert {fault: trial.status for fault, trial in trials.items()} == {
        **{fault: status for fault, (status, _) in OUTCOMES.items()},
        "none": "ok",
    }
    for fault, (_, message) in OUTCOMES.items():
        assert re.search(message, trials[fault].message), (fault, trials[fault].message)
    assert [winner.config for winner in winners] == [trials["none"].config]
    assert sum(isinstance(event, TrialDone) for event in events) == len(trials)
    assert isinstance(events[-1], BucketDone)


def test_a_finalist_that_dies_is_dropped_and_the_next_takes_its_place(planted: Planted, tiny: Effort) -> None:
    planted.choose(CPU, "dies when the finale has begun", "none")

    def on_event(event: Event) -> None:
        if isinstance(event, TrialDone) and event.trial.config["FAULT"] == 0:  # the last one
            planted.finale.touch()

    with TunedDatabase() as database:
        (winner,) = tune(database, impatient(tiny, 60.0), on_event=on_event)
        trials = planted.trials(database, CPU, TOKENS)
    dropped = trials["dies when the finale has begun"]
    assert (dropped.status, dropped.message) == ("crashed", "the process died of SIGABRT")
    assert winner.config == trials["none"].config


def test_nothing_is_blamed_on_a_config_that_another_one_did_to_its_process(planted: Planted, tiny: Effort) -> None:
    planted.choose(CPU, "spoils the process", "dies in a spoilt process")
    events: list[Event] = []
    with TunedDatabase() as database:
        winners = tune(database, impatient(tiny, 60.0), on_event=events.append)
    assert [event.trial.status for event in events if isinstance(event, TrialDone)] == ["ok", "ok"]
    assert len(winners) == 1  # among the finalists, nothing tells which of two spoilt the process: one is dropped


# The worker


def test_one_worker_serves_the_whole_job(planted: Planted, tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []

    class Counted(isolation._Worker):
        def __init__(self, turn_s: float) -> None:
            started.append(self)
            super().__init__(turn_s)

    monkeypatch.setattr(isolation, "_Worker", Counted)
    planted.choose(CPU, "none")
    with TunedDatabase() as database:
        buckets = [Bucket(PROBLEM, tokens) for tokens in (1, 2)]
        winners = tune_buckets(buckets, CPU, database, tiny)
        assert [winner.tokens for winner in winners] == [1, 2]
        tune_buckets(buckets, CPU, database, tiny)  # all is known
    assert len(started) == 1


def test_what_the_worker_logs_is_logged_here(
    planted: Planted, tiny: Effort, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    planted.choose(CPU, "none")
    monkeypatch.setenv("CXX", "false")
    op = OPS["faulty"]
    with IsolatedBench(CPU, tiny) as bench:  # one whose Inductor has no compiler that works
        bench.open(PROBLEM, 4, op.source_hash("cpu"))
        assert bench.baselines(compiled=True) == ["eager"]
    (record,) = [each for each in caplog.records if "no baseline through torch.compile" in each.message]
    assert record.levelname == "WARNING"


def test_a_kernel_that_is_edited_while_it_is_tuned_is_an_error(planted: Planted, tiny: Effort) -> None:
    planted.choose(CPU, "none")
    with IsolatedBench(CPU, tiny) as bench:
        bench.open(PROBLEM, 4, "0123456789abcdef")
        with pytest.raises(AutofuseError, match="the kernel of faulty was edited while it was tuned"):
            bench.verify(OPS["faulty"].default_config("cpu", PROBLEM, 4))


def test_a_reference_that_kills_its_process_is_an_error(
    planted: Planted, tiny: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted.choose(CPU, "none")
    monkeypatch.setenv("FAULTY_REFERENCE", "dies")
    with IsolatedBench(CPU, tiny) as bench:
        bench.open(PROBLEM, 4, OPS["faulty"].source_hash("cpu"))
        with pytest.raises(WorkerError, match=r"the reference of faulty\(.*\) at T=4 cannot be computed: .* SIGABRT"):
            bench.verify(OPS["faulty"].default_config("cpu", PROBLEM, 4))


def test_an_op_of_the_main_program_is_refused(planted: Planted, tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    planted.choose(CPU, "none")
    monkeypatch.setattr(type(OPS["faulty"]), "__module__", "__main__")
    with TunedDatabase() as database, pytest.raises(BadInput, match="op faulty is defined in the main program"):
        tune(database, tiny)


# The process that tunes

SCRIPT = """
import sys
from pathlib import Path
import torch
import autofuse.kernels_src
autofuse.kernels_src.FOLDER = Path({kernels!r})
sys.path.insert(0, {ops!r})
if {ops!r}:
    import faulty_op
from autofuse.cache_db import TunedDatabase
from autofuse.ops import Problem
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import Bucket, TrialDone, tune_buckets

def on_event(event):
    if isinstance(event, TrialDone):
        print("trial", event.trial.status, flush=True)

effort = Effort(exhaustive_up_to=1000, trial_rounds=2, final_rounds=4, cpu_round_us=50.0, ring_bytes=1, verify_seeds=1,
                attempts=1)
with TunedDatabase() as database:
    winners = tune_buckets([Bucket(Problem.parse({problem!r}), {tokens})], torch.device("cpu"), database, effort,
                           on_event=on_event)
print("winners", len(winners), flush=True)
"""


def script() -> str:
    """Tunes the planted op as a user's program would."""
    folder = str(Path(__file__).parent / "faulty")
    return SCRIPT.format(kernels=str(kernels_src.FOLDER), ops=folder, problem=str(PROBLEM), tokens=TOKENS)


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **options,
    )


def test_a_script_needs_no_main_guard(planted: Planted, tmp_path: Path) -> None:
    planted.choose(CPU, "none")
    path = tmp_path / "tune_it.py"
    path.write_text(script())
    with start([str(path)]) as process:
        out, said = process.communicate()
    assert (process.returncode, out.splitlines()) == (0, ["trial ok", "winners 1"]), said


def test_an_interactive_session_can_tune(planted: Planted) -> None:
    """As a notebook does, it gives one statement after the other to one interpreter, whose program is no file."""
    planted.choose(CPU, "none")
    with start(["-i", "-q"], stdin=subprocess.PIPE) as process:
        out, said = process.communicate(f"exec({script()!r})\n")
    assert (process.returncode, out.splitlines()) == (0, ["trial ok", "winners 1"]), said


def children(pid: int) -> set[int]:
    """The processes that a process started, and theirs."""
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | children(child)
    return found


def wait_until_gone(pids: set[int], seconds: float = 30.0) -> set[int]:
    end = time.monotonic() + seconds
    while time.monotonic() < end and (pids := {pid for pid in pids if runs(pid)}):
        time.sleep(0.1)
    return pids


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@linux
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_a_job_that_is_ended_leaves_no_process_and_keeps_its_rows(planted: Planted, ending: signal.Signals) -> None:
    planted.choose(CPU, "changed input", "endless loop", "none")
    with start(["-c", script()]) as process:
        started: set[int] = set()
        with TunedDatabase() as database:
            while not planted.trials(database, CPU, TOKENS):
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            time.sleep(5.0)  # into the loop, whose row is there from before it runs
            started = children(process.pid)
            process.send_signal(ending)
            process.communicate(timeout=60)
            rows = planted.trials(database, CPU, TOKENS)
    assert started
    assert wait_until_gone(started) == set()
    if ending == signal.SIGINT:
        assert "endless loop" not in rows  # it was taken back
    else:
        assert rows["endless loop"].message == "the process died while this config ran"


@linux
def test_sigterm_ends_the_command_in_good_order(planted: Planted, tmp_path: Path) -> None:
    problem = get_op("mla_dual_rms_norm").make_problem(
        dtype="bf16", q_lora_rank=96, kv_lora_rank=40, cast_before_weight=True
    )
    command = ["-m", "autofuse", "tune", "--problem", str(problem), "--tokens", "4", "--device", "cpu"]
    with start(command) as process, TunedDatabase() as database:
        while not trials_of(database, problem, 4):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        started = children(process.pid)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert all(trial.message == "" for trial in trials_of(database, problem, 4))
    assert process.returncode == 143, said
    assert "stopped; everything measured so far is kept" in said
    assert started
    assert wait_until_gone(started) == set()


def trials_of(database: TunedDatabase, problem: Problem, tokens: int) -> list[Any]:
    op = get_op(problem.op)
    return database.trials(target_of(CPU), problem, tokens, op.source_hash("cpu"))


@linux
def test_a_config_that_takes_the_tuning_process_down_twice_is_not_run_again(planted: Planted) -> None:
    planted.choose(CPU, "kills the parent", "none")

    def run() -> int:
        with start(["-c", script()]) as process:
            process.communicate(timeout=300)
        return process.returncode

    def message() -> str:
        with TunedDatabase() as database:
            return planted.trials(database, CPU, TOKENS)["kills the parent"].message

    assert run() == -signal.SIGKILL
    assert message() == "the process died while this config ran"
    assert run() == -signal.SIGKILL
    assert message() == "the process died twice while this config ran"
    assert run() == 0
    with TunedDatabase() as database:
        assert len(database.winners()) == 1
