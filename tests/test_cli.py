"""The command line: what each command prints, for a person and for a program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autofuse.cache_db import Captured, TunedDatabase
from autofuse.cli.app import app, run
from autofuse.ops import OPS, Problem, get_op
from autofuse.targets import target_of, toolchain
from autofuse.tuner import budgets
from autofuse.tuner.budgets import Effort

CPU = torch.device("cpu")
NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=96, kv_lora_rank=40, cast_before_weight=True)
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands if command.callback)

Cli = Callable[..., str]
TuneTiny = Callable[..., str]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command that must succeed, or end with ``code``; gives what it wrote to standard output."""

    def call(*arguments: object, code: int = 0) -> str:
        result = run([str(argument) for argument in arguments])
        written = capsys.readouterr()
        assert (result, "Traceback" in written.err) == (code, False), written.err
        return written.out

    return call


@pytest.fixture
def tune_tiny(cli: Cli, tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> TuneTiny:
    """``autofuse tune`` of a small problem within seconds."""
    monkeypatch.setitem(budgets.EFFORTS, "quick", tiny)

    def call(*arguments: object, problem: Problem = PROBLEM) -> str:
        what = () if "--captured" in arguments else ("--problem", problem, "--tokens", 4)
        return cli("tune", *what, "--device", "cpu", "--effort", "quick", *arguments)

    return call


def test_without_a_command_the_commands_are_listed(cli: Cli) -> None:
    listed = cli()
    assert cli("--help") == listed
    for command in COMMANDS:
        assert f"  {command} " in listed
    names = "capture compile diff doctor export gc import merge ops report rollback show tune verify why"
    assert names.split() == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, cli: Cli) -> None:
    text = cli(command, "--help")
    assert f"Example: autofuse {command}" in text
    assert "--json" in text


def test_the_version_is_that_of_the_distribution(cli: Cli) -> None:
    assert cli("--version").startswith("autofuse 0.")


def test_doctor_says_what_there_is(cli: Cli) -> None:
    text = cli("doctor")
    for line in ("Python: ", "PyTorch: ", "C++ compiler: ", "kernel cache: ", "database: ", "Ready to tune on: "):
        assert line in text
    facts = json.loads(cli("doctor", "--json"))
    assert facts["ok"] is True
    assert "cpu" in facts["ready"]


def test_doctor_says_what_to_do_where_nothing_can_be_tuned(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine can tune on its GPU")
    monkeypatch.setenv("CXX", "no-such-compiler")
    text = cli("doctor", code=1)
    assert "no  C++ compiler: none" in text
    assert "set it to a C++ compiler, or unset it" in text
    assert text.endswith("Not ready to tune: see the lines marked 'no'.\n")


def test_ops_lists_tunables_and_the_reasons_of_constraints(cli: Cli) -> None:
    text = cli("ops")
    listed = json.loads(cli("ops", "--json"))
    assert [op["name"] for op in listed] == list(OPS)
    for kernel in NORMS.kernels.values():
        for tunable in kernel.space.tunables:
            assert f"{tunable.name} = " in text
            assert tunable.trades in text
        for constraint in kernel.space.constraints:
            assert constraint.reason in text
    assert cli("ops", "--op", NORMS.name) in text


def test_tune_prints_the_winners_and_remembers_them(tune_tiny: TuneTiny, cli: Cli, database_path: Path) -> None:
    text = tune_tiny()
    assert str(PROBLEM) in text
    assert f"the database is {database_path}" in text
    again = tune_tiny()
    assert "tuned already" in again
    assert "Everything was tuned already" in again
    assert str(PROBLEM) in cli("show")


def test_tunes_json_holds_everything(tune_tiny: TuneTiny, database_path: Path) -> None:
    facts = json.loads(tune_tiny("--json"))
    assert facts["database"] == str(database_path)
    (bucket,) = facts["buckets"]
    assert (bucket["problem"], bucket["tokens"], bucket["measured"]) == (str(PROBLEM), 4, True)
    assert bucket["winner"]["gain_low"] <= bucket["winner"]["gain"] <= bucket["winner"]["gain_high"]
    assert bucket["baselines_us"].keys() == {"eager", "compile", "graph"}


def test_progress_goes_to_standard_error_as_plain_lines(tune_tiny: TuneTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autofuse.cli.progress._LINE_EVERY_S", 0.0)
    lines: list[str] = []
    monkeypatch.setattr("autofuse.cli.progress.typer", SimpleNamespace(echo=lambda text, err: lines.append(text)))
    tune_tiny()
    assert lines[0] == f"{PROBLEM} T=4: up to 4 configs to measure"
    assert " s left" in lines[2]
    assert lines[-1].startswith(f"{PROBLEM} T=4: ")


def test_tune_captured_tunes_what_torch_compile_left(tune_tiny: TuneTiny, cli: Cli) -> None:
    assert tune_tiny("--captured").startswith("No captured site is left to tune")
    with TunedDatabase() as database:
        database.record_captured(Captured(target_of(CPU), PROBLEM, 4, 4))
    assert str(PROBLEM) in tune_tiny("--captured")
    assert json.loads(tune_tiny("--captured", "--json"))["buckets"] == []


def test_a_budget_ends_the_tuning_and_the_same_command_goes_on(
    tune_tiny: TuneTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune_tiny("--budget", 0).startswith("Nothing was tuned")
    assert json.loads(tune_tiny("--budget", 0, "--json"))["buckets"] == []
    assert run(["tune", "--problem", str(PROBLEM), "--tokens", "4", "--device", "cpu", "--budget", "0"]) == 0
    assert "the 0 of --budget are over: 1 of 1 buckets are not tuned; the same command goes on from there" in (
        capsys.readouterr().err
    )
    assert str(PROBLEM) in tune_tiny("--budget", 600)


def test_tune_takes_a_model_from_its_config(tune_tiny: TuneTiny, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"q_lora_rank": 96, "kv_lora_rank": 40}), encoding="utf-8")
    cli("tune", "--model", path, "--tokens", 4, "--device", "cpu", "--effort", "quick")
    (winner,) = json.loads(cli("show", "--json"))
    assert winner["problem"] == str(PROBLEM)


def test_show_lists_winners_trials_and_failures(tune_tiny: TuneTiny, cli: Cli, tiny: Effort) -> None:
    tune_tiny()
    (winner,) = json.loads(cli("show", "--json", "--op", NORMS.name, "--target", "cpu"))
    assert (winner["problem"], winner["tokens"], winner["state"]) == (str(PROBLEM), 4, "fresh")
    trials = json.loads(cli("show", "--trials", "--json"))
    assert [trial["status"] for trial in trials] == ["ok"] * tiny.trials
    assert winner["config"] in cli("show", "--trials")
    assert json.loads(cli("show", "--failures", "--json")) == []
    assert cli("show", "--failures") == "None.\n"


def test_show_marks_winners_of_another_kernel_version(
    tune_tiny: TuneTiny, cli: Cli, edit_kernels: Callable[[str, str, str], None]
) -> None:
    tune_tiny()
    edit_kernels("mla_dual_rms_norm.cpp", "struct Params", "// another version\nstruct Params")
    assert "stale: the kernel changed" in cli("show")
    assert "rule: stale" in cli("why", NORMS.name, "q_lora_rank=96", "kv_lora_rank=40", "--device", "cpu")


def test_why_walks_a_lookup(tune_tiny: TuneTiny, cli: Cli, database_path: Path) -> None:
    ask = ("why", NORMS.name, "q_lora_rank=96", "kv_lora_rank=40", "--device", "cpu")
    assert "rule: untuned" in cli(*ask, "--tokens", 4)
    tune_tiny()
    text = cli(*ask, "--tokens", 4)
    assert f"database: {database_path}" in text
    assert f"problem: {PROBLEM}" in text
    assert "rule: exact" in text
    assert "faster here: " in text
    assert json.loads(cli(*ask, "--tokens", "2..8", "--json"))["rule"] == "range"


def test_why_fills_in_what_is_left_out_from_the_model(cli: Cli) -> None:
    facts = json.loads(cli("why", NORMS.name, "dtype=fp16", "--device", "cpu", "--json"))
    assert facts["problem"] == ("mla_dual_rms_norm(dtype=fp16,q_lora_rank=1536,kv_lora_rank=512,cast_before_weight=1)")


@pytest.mark.parametrize("name", ["there.jsonl", "there.db"])
def test_an_import_gives_the_same_show_as_the_export(name: str, tune_tiny: TuneTiny, cli: Cli, tmp_path: Path) -> None:
    tune_tiny()
    assert "1 winners" in cli("export", tmp_path / name)
    other = tmp_path / "other.db"
    ask = ("import", tmp_path / name, "--database", other, "--trust", "--json")
    assert json.loads(cli(*ask))["new"]["winners"] == 1
    assert cli("show", "--trials", "--database", other) == cli("show", "--trials")
    (here,), (there,) = (json.loads(cli("show", "--json", *where)) for where in ((), ("--database", other)))
    assert (here.pop("state"), there.pop("state")) == ("fresh", "trusted: imported, not measured here")
    assert (here.pop("standing"), there.pop("standing")) == ("own", "trusted")
    assert here == there
    assert json.loads(cli(*ask))["kept"]["winners"] == 1


def test_what_was_measured_with_another_compiler_is_suspect(
    tune_tiny: TuneTiny, cli: Cli, database_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_tiny()
    assert "suspect" not in cli("show")
    provenance = toolchain("cpu").provenance(CPU)
    monkeypatch.setattr(type(toolchain("cpu")), "provenance", lambda *_: {**provenance, "compiler": "another"})
    (winner,) = json.loads(cli("show", "--json"))
    assert winner["state"] == f"suspect: compiler was {provenance['compiler']}, is another"


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_keeps_what_was_measured_and_says_how_to_go_on(database_path: Path) -> None:
    command = [sys.executable, "-m", "autofuse", "tune", "--problem", str(PROBLEM), "--tokens", "64", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    first = process.stderr.readline()
    assert "configs to measure" in first
    end = time.monotonic() + 60
    while not measured(database_path) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the compilers at work get it too
    rest = process.stderr.read()
    assert process.wait() == 130
    (line,) = [line for line in rest.splitlines() if not line.startswith("  ")]
    assert line == (
        f"autofuse: stopped; everything measured so far is kept in {database_path}; the same command goes on from there"
    )
    assert measured(database_path)


def measured(path: Path) -> list[Any]:
    with TunedDatabase(path, read_only=True) as database:
        trials = database.trials(target_of(CPU), PROBLEM, 64, NORMS.source_hash("cpu"))
    return [trial for trial in trials if trial.status == "ok"]  # what runs at the moment is a failure until it is done
