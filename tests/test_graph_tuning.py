"""``untuned="tune"``: what is measured while compiling, for how long, and what is left when the time is over."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from deciding import CPU, PROBLEM, buckets, decide, tuned, winner
from models import HIDDEN, MlaLatents, isolate, without_code_generation
from planting import tune_here

from autofuse.cache_db import Trial, TunedDatabase, default_path
from autofuse.errors import BadInput
from autofuse.graph import notice
from autofuse.graph.compile_tuning import TuningTime
from autofuse.graph.explain import explain
from autofuse.graph.report_store import last_reports
from autofuse.graph.settings import Settings
from autofuse.ops import get_op
from autofuse.targets import target_of
from autofuse.tuner import api, budgets, job
from autofuse.tuner.job import Bucket, BucketDone, tune_buckets

TUNE = {"autofuse.untuned": "tune"}


@pytest.fixture(autouse=True)
def tuning_time(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")
    notice.warn_once.cache_clear()
    fresh = TuningTime()
    monkeypatch.setattr("autofuse.graph.decide.tuning_time", fresh)
    return fresh


class Tuner:
    """In place of ``autofuse tune``: remembers what it is asked for, and measures at once."""

    def __init__(self, gain=1.5, error=None):
        self.gain, self.error, self.asked = gain, error, []

    def __call__(self, problem, tokens, device, path, budget_s):
        self.asked.append((problem, tokens, device, path, budget_s))
        if self.error is not None:
            raise self.error
        if self.gain is not None:
            tuned(*(winner(each, self.gain) for each in tokens))


def captured():
    with TunedDatabase(default_path(), read_only=True) as database:
        return [(site.problem, site.tokens_low, site.tokens_high) for site in database.captured()]


def test_it_is_measured_and_looked_up_again():
    tune = Tuner()
    assert buckets(decide(16, {**TUNE, "autofuse.tune_budget": 7}, tune=tune)) == [16]
    assert tune.asked == [(PROBLEM, (16,), CPU, default_path(), 7.0)]
    assert captured() == []


def test_what_turns_out_to_be_slower_is_left_alone_and_not_to_be_tuned_again():
    tune = Tuner(gain=0.8)
    assert (decide(16, TUNE, tune=tune).rule, decide(16, TUNE, tune=tune).plan) == ("exact", None)
    assert len(tune.asked) == 1
    assert captured() == []


def test_the_default_budget_is_on_the_page_of_budgets():
    assert Settings.parse(TUNE)[0].tune_budget == budgets.COMPILE_BUDGET_S


def test_when_the_budget_is_over_the_rest_is_left_and_remembered(tuning_time, caplog):
    options = {**TUNE, "autofuse.tune_budget": 10.0}
    tuning_time.spent_s = 4.0
    first = Tuner(gain=None)
    decide(16, options, tune=first)
    assert first.asked[0][-1] == pytest.approx(6.0)
    tuning_time.spent_s = 10.0
    tune = Tuner()
    for tokens in (32, 64):
        decision = decide(tokens, options, tune=tune)
        assert (decision.plan, decision.rule) == (None, "untuned")
        assert "the 10 s of autofuse.tune_budget were over" in decision.reason
    assert tune.asked == []
    assert captured() == [(PROBLEM, 16, 16), (PROBLEM, 32, 32), (PROBLEM, 64, 64)]
    (warning,) = [record.message for record in caplog.records if "tune_budget" in record.message]
    assert "are remembered for `autofuse tune --captured`" in warning
    assert buckets(decide(32, {**TUNE, "autofuse.tune_budget": 20}, tune=tune)) == [32]  # somebody gives it more


def test_a_budget_of_nothing_tunes_nothing():
    tune = Tuner()
    assert decide(16, {**TUNE, "autofuse.tune_budget": 0}, tune=tune).rule == "untuned"
    assert tune.asked == []


@pytest.mark.parametrize("error", [BadInput("no such thing"), OSError("no process is left"), ZeroDivisionError("oh")])
def test_no_fault_ends_the_compilation_or_is_met_twice(error, caplog):
    tune = Tuner(error=error)
    for _ in range(2):
        decision = decide(16, TUNE, tune=tune)
        assert (decision.plan, decision.rule) == (None, "untuned")
        assert str(error) in decision.reason
    assert len(tune.asked) == 1
    assert captured() == [(PROBLEM, 16, 16)]
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "could not tune" in warning


def test_ctrl_c_ends_the_compilation_and_is_counted(tuning_time):
    with pytest.raises(KeyboardInterrupt):
        decide(16, TUNE, tune=Tuner(error=KeyboardInterrupt()))
    assert tuning_time.spent_s > 0
    assert buckets(decide(16, TUNE, tune=Tuner())) == [16]


def test_ctrl_c_comes_through_torch_compile(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "tune_site", interrupted)
    with without_code_generation(), torch.no_grad(), pytest.raises(KeyboardInterrupt):
        torch.compile(MlaLatents(), backend="autofuse", options=TUNE)(hidden())


def test_looking_at_a_model_tunes_nothing(monkeypatch):
    monkeypatch.setattr(api, "tune_site", lambda *_, **__: pytest.fail("tuned"))
    compiled = torch.compile(MlaLatents(), backend="autofuse", options=TUNE)
    with torch.no_grad():
        explanation = explain(compiled, torch.randn(4, HIDDEN, dtype=torch.bfloat16))
    assert "it is tuned while compiling" in str(explanation)


def hidden():
    return torch.randn(4, HIDDEN, dtype=torch.bfloat16)


def test_what_was_left_is_tuned_by_the_next_compilation_and_no_cache_stands_in_the_way(monkeypatch, tuning_time):
    """Inductor's caches are on here: the graph of the first compilation must not answer for the second."""
    model, asked = MlaLatents(), []

    def tune_site(problem, tokens, device, database, budget_s, on_line):
        asked.append(problem)

    monkeypatch.setattr(api, "tune_site", tune_site)
    for expected in (0, 1, 2):
        torch._dynamo.reset()
        tuning_time._tried.clear()  # as in a new process
        options = {**TUNE, "autofuse.tune_budget": 0 if expected == 0 else 60}
        with torch.no_grad():
            torch.compile(model, backend="autofuse", options=options)(hidden())
        assert len(asked) == expected
        assert not last_reports()[-1].from_cache
        assert last_reports()[-1].sites[0].verdict == "untuned"


def script(body):
    """A command that stands for the Python interpreter, whatever it is asked to run."""
    return f"#!{sys.executable}\nimport os, signal, sys, time\n{body}\n"


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Makes ``autofuse tune`` another program, given by its text."""

    def replace(body):
        path = tmp_path / "python"
        path.write_text(script(body), encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setattr("autofuse.tuner.api.sys.executable", str(path))

    return replace


def test_each_line_of_the_progress_is_logged(command, caplog):
    command("print('3/32 configs, best 3.7 µs', file=sys.stderr); print('  done', file=sys.stderr)")
    with caplog.at_level(logging.INFO, "autofuse.graph"):
        decide(16, TUNE)
    said = [record.message for record in caplog.records]
    assert any(f"tuning {PROBLEM} at T=16 on cpu: 300 s left" in line for line in said)
    assert "tuning: 3/32 configs, best 3.7 µs" in said
    assert "tuning: done" in said


def test_the_command_is_told_problem_tokens_and_budget(command, tmp_path):
    command(f"open({str(tmp_path / 'asked')!r}, 'w').write(repr(sys.argv[1:]))")
    api.tune_site(PROBLEM, (1, 64), CPU, tmp_path / "x.db", 12.0)
    asked = eval((tmp_path / "asked").read_text())
    assert asked[:5] == ["-m", "autofuse", "tune", "--problem", str(PROBLEM)]
    assert asked[asked.index("--tokens") + 1] == "1,64"
    assert asked[asked.index("--budget") + 1] == "12.0"


def test_a_command_that_does_not_end_is_stopped_as_ctrl_c_does(command, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "STOP_GRACE_S", 2.0)
    command(
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        f"    open({str(tmp_path / 'orderly')!r}, 'w').close()\n    sys.exit(130)"
    )
    begin = time.monotonic()
    with pytest.raises(Exception, match="did not end within its 0 s: run autofuse tune"):
        api.tune_site(PROBLEM, (1,), CPU, None, 0.0)
    assert time.monotonic() - begin < 30
    assert (tmp_path / "orderly").exists()


def test_a_command_that_will_not_stop_is_killed(command, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "STOP_GRACE_S", 1.0)
    command(
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    with pytest.raises(Exception, match="did not end within"):
        api.tune_site(PROBLEM, (1,), CPU, None, 0.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_stops_the_command_and_reaches_the_caller(command, tmp_path):
    ready, orderly = tmp_path / "ready", tmp_path / "orderly"
    command(
        f"open({str(ready)!r}, 'w').close()\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        f"    open({str(orderly)!r}, 'w').close()\n    sys.exit(130)"
    )

    def interrupt():
        end = time.monotonic() + 20
        while not ready.exists() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        api.tune_site(PROBLEM, (1,), CPU, None, 60.0)
    thread.join()
    assert orderly.exists()


# The job within a budget


@pytest.fixture
def unmeasured(monkeypatch):
    """No worker process, and no baseline through Inductor: both would take seconds."""
    tune_here(monkeypatch)
    monkeypatch.setattr("autofuse.tuner.baselines.baseline_calls", lambda op, args, running: {"eager": op.unfused})


def test_a_search_that_is_cut_short_gives_a_winner_and_goes_on_later(tiny, unmeasured, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: now[0])
    op = get_op("mla_dual_rms_norm")

    def on_event(event):
        events.append(event)
        now[0] += 1.0

    events: list[object] = []
    with TunedDatabase(default_path()) as database:
        winners = tune_buckets([Bucket(PROBLEM, 4)], CPU, database, tiny, budget_s=2.5, on_event=on_event)
        trials = database.trials(target_of(CPU), PROBLEM, 4, op.source_hash("cpu"))
        assert 1 <= len(trials) < tiny.trials
        assert [each.tokens for each in winners] == [4]
        tune_buckets([Bucket(PROBLEM, 4)], CPU, database, tiny)
        assert len(database.trials(target_of(CPU), PROBLEM, 4, op.source_hash("cpu"))) == tiny.trials


def test_buckets_without_time_are_not_begun(tiny, unmeasured, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: now[0])

    def on_event(event):
        if isinstance(event, BucketDone):
            done.append(event.bucket.tokens)
            now[0] += 100.0

    done: list[int] = []
    wanted = [Bucket(PROBLEM, tokens) for tokens in (2, 3)]
    with TunedDatabase(default_path()) as database:
        tune_buckets(wanted, CPU, database, tiny, budget_s=50.0, on_event=on_event)
    assert done == [2]


def test_what_was_tuned_without_success_is_told_from_what_was_not_tuned():
    failed = Trial(
        target_of(CPU),
        PROBLEM,
        16,
        get_op("mla_dual_rms_norm").default_config("cpu", PROBLEM, 16),
        get_op("mla_dual_rms_norm").source_hash("cpu"),
        "wrong",
        "differs",
    )
    assert "no config works" not in decide(16).reason
    with TunedDatabase(Path(default_path())) as database:
        database.record_trial(failed)
    assert "it was tuned, but no config works (1 wrong): `autofuse show --failures` says why" in decide(16).reason


def test_a_graph_compiled_with_tuning_is_fused(monkeypatch):
    """From ``torch.compile`` to the tuner's process and back."""

    def tune_site(problem, tokens, device, database, budget_s, on_line):
        tuned(*(winner(each, 1.5) for each in tokens))

    monkeypatch.setattr(api, "tune_site", tune_site)
    with without_code_generation(), torch.no_grad():
        torch.compile(MlaLatents(), backend="autofuse", options=TUNE)(hidden())
    assert last_reports()[-1].fused == 1
