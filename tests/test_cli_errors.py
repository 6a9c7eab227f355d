"""Bad input and broken surroundings: one line that says what to do, exit code 2, nothing lost."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from autofuse.cache_db import TunedDatabase, Winner
from autofuse.cli import show as show_module
from autofuse.cli.app import run
from autofuse.errors import TargetUnavailable
from autofuse.ops import Config, Problem
from autofuse.targets import Target, nvrtc

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; gives its one line without the prefix."""

    def call(*arguments: object, code: int = 2) -> str:
        result = run([str(argument) for argument in arguments])
        written = capsys.readouterr()
        (line,) = written.err.splitlines()
        assert (result, written.out) == (code, "")
        assert line.startswith("autofuse: error: ")
        return line.removeprefix("autofuse: error: ")

    return call


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("tun", "No such command 'tun'. Did you mean 'tune'?"),
        ("tune --tokns 1", "No such option: --tokns"),
        ("tune --tokens 1,,x", "tokens '1,,x': '' is not a whole number from 1; give a list such as 1,64,2048"),
        ("tune --tokens 0", "tokens '0': '0' is not a whole number from 1"),
        ("tune --tokens -3", "tokens '-3': '-3' is not a whole number from 1"),
        ("tune --tokens 1e9", "tokens '1e9': '1e9' is not a whole number from 1"),
        ("tune --tokens 1000000000", "1000000000 is more than 1048576, the most that is tuned"),
        ("tune --op mla_dual_rmsnorm", "op 'mla_dual_rmsnorm' is none of"),
        ("tune --device gpu", "device 'gpu' is none of auto, cpu, cuda, cuda:N"),
        ("tune --device cpu,gpu", "device 'gpu' is none of auto, cpu, cuda, cuda:N"),
        ("tune --device cpu:3", "device 'cpu:3': there is one cpu"),
        ("tune --device cuda:99", "device cuda:99: "),
        ("tune --model deepseek-v4", "did you mean deepseek-v"),
        ("tune --model no/such/config.json", "model config no/such/config.json cannot be read"),
        ("tune --effort max", "effort 'max' is none of quick, default, exhaustive"),
        ("tune --dtype int8", "dtype 'int8' is none of bf16, fp16, fp32"),
        ("tune --problem nonsense", "problem 'nonsense' is not of the form op(name=value,...)"),
        (f"tune --problem mla_dual_rms_norm(dtype=bf16,q_lora_rank={'9' * 5000})", "at most 18 ASCII digits"),
        ("tune --problem mla_dual_rms_norm(dtype=bf16,q_lora_rank=٩٦)", "at most 18 ASCII digits"),
        ("tune --captured --tokens 1", "--captured brings its own token counts: leave --tokens out"),
        ("tune --captured --model deepseek-v3", "give one of them"),
        ("tune --seed x", "'--seed'"),
        ("tune --seed -1", "'--seed'"),
        ("ops --op rms_norm", "op 'rms_norm' is none of"),
        ("show --op nothing", "op 'nothing' is none of"),
        ("show --trials --failures", "give one of --trials and --failures"),
        ("why mla_dual_rms_norm --html x.html", "--html shows graphs: leave the op out"),
        ("why --html no/such/folder/x.html", "no/such/folder/x.html: No such file or directory"),
        ("why --last 0", "'--last'"),
        ("tune --budget -1", "--budget '-1' is no duration: give one such as 300, 90s, 5m or 1h30m"),
        ("tune --budget soon", "--budget 'soon' is no duration"),
        ("tune --trials 0", "'--trials'"),
        ("tune --model deepseek-v3 --tp 0", "--tp 0: there is at least one rank"),
        ("tune --model deepseek-v3 --tp 3", "model 'deepseek-v3' has 128 heads, which 3 ranks cannot share equally"),
        ("tune --captured --tp 2", "--tp is for models"),
        ("tune --watch --json", "--watch runs until it is stopped"),
        ("tune --duty 0.5", "--duty 0.5 is a share above 0 and up to 1, and goes with --watch"),
        ("tune --watch --duty 2", "--duty 2 is a share"),
        ("why mla_dual_rms_nrm", "did you mean mla_dual_rms_norm?"),
        ("why mla_dual_rms_norm heads=3", "has no parameter 'heads'; it has dtype, q_lora_rank"),
        ("why mla_dual_rms_norm q_lora_rank", "'q_lora_rank' is not of the form name=value"),
        ("why mla_dual_rms_norm q_lora_rank=wide", "q_lora_rank is a whole number"),
        ("why mla_dual_rms_norm q_lora_rank=٩٦", "q_lora_rank is a whole number"),
        (f"why mla_dual_rms_norm q_lora_rank={'9' * 5000}", "q_lora_rank is a whole number"),
        (f"why mla_dual_rms_norm --tokens 1..{'9' * 5000}", "is neither a whole number nor a range"),
        ("why mla_dual_rms_norm --tokens ٣", "tokens '٣' is neither a whole number nor a range"),
        ("why mla_dual_rms_norm kv_lora_rank=3", "is not a whole number of 4-byte words"),
        ("why mla_dual_rms_norm dtype=fp64", "dtype 'fp64' is none of bf16, fp16, fp32"),
        ("why mla_dual_rms_norm --tokens 9..3", "tokens '9..3' is neither a whole number nor a range"),
        ("compile", "give either --arch, with a list such as sm_80,sm_90a, or --all"),
        ("compile --all --arch sm_80", "give either --arch"),
        ("compile --arch gfx_42", "arch 'gfx_42'"),
        ("compile --arch x86-64-v5", "did you mean x86-64-v4?"),
        ("compile --arch sm_80,", "give a list such as sm_80,sm_90a"),
        ("compile --arch x86-64-v3 --configs 0", "'--configs'"),
        ("import no-such-file", "cannot import no-such-file: there is no such file"),
    ],
)
def test_bad_input_is_one_line(command: str, message: str, refused: Refused, database_path: Path) -> None:
    with TunedDatabase() as database:
        assert database.path == database_path
    before = database_path.read_bytes()
    assert message in refused(*command.split())
    assert database_path.read_bytes() == before


def test_bad_input_makes_no_database(refused: Refused, database_path: Path) -> None:
    refused("tune", "--tokens", "x")
    refused("tune", "--device", "gpu")
    refused("tune", "--model", "none")
    refused("import", "no-such-file")
    assert not database_path.exists()


@pytest.mark.parametrize("command", ["show", "export there.jsonl"])
def test_an_absent_database_says_how_to_make_one(command: str, refused: Refused, database_path: Path) -> None:
    line = refused(*command.split())
    assert line.startswith(f"database {database_path} does not exist; run `autofuse tune` to make it")


@pytest.mark.parametrize("command", ["show", "why mla_dual_rms_norm --device cpu", "export there.jsonl", "tune"])
def test_a_database_that_is_none_is_left_alone(command: str, refused: Refused, database_path: Path) -> None:
    text = "something that somebody still needs\n" * 30
    database_path.write_text(text, encoding="utf-8")
    assert "is not a SQLite database; move it away or set AUTOFUSE_DB" in refused(*command.split())
    assert database_path.read_text(encoding="utf-8") == text


def test_a_database_of_a_newer_autofuse_is_refused(refused: Refused, database_path: Path) -> None:
    TunedDatabase().close()
    with closing(sqlite3.connect(database_path)) as connection, connection:
        columns = "migration_set, name, applied_at"
        connection.execute(f"INSERT INTO _sqlite_migrations ({columns}) VALUES ('autofuse', 'm999_later', '')")
    assert "was written by a newer autofuse; upgrade autofuse" in refused("show")


def test_a_database_that_is_locked_says_so(
    refused: Refused, database_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TunedDatabase().close()
    monkeypatch.setattr(TunedDatabase.__init__, "__kwdefaults__", {"read_only": False, "busy_timeout_s": 0.1})
    with closing(sqlite3.connect(database_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        line = refused("tune", "--tokens", "1", "--device", "cpu")
    assert line == f"database {database_path} is locked by another process; try again when that has finished"


def test_a_target_that_is_not_in_the_database_is_refused(refused: Refused) -> None:
    TunedDatabase().close()
    assert "target 'sm_90a' is not in database" in refused("show", "--target", "sm_90a")


def test_an_export_does_not_overwrite_unasked(refused: Refused, tmp_path: Path) -> None:
    TunedDatabase().close()
    (tmp_path / "there.jsonl").write_text("precious", encoding="utf-8")
    assert "it exists; name another file or ask to overwrite it" in refused("export", tmp_path / "there.jsonl")
    assert (tmp_path / "there.jsonl").read_text(encoding="utf-8") == "precious"


def test_no_compiler_is_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    for command in ("compile --arch x86-64-v3 --configs 1", "compile --arch x86-64-v3 --configs 8"):
        assert "CXX='no-such-compiler' is not a command that can be run" in refused(*command.split())


def test_a_compiler_with_half_a_quotation_is_one_line(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", '"')
    assert "CXX='\"' is not a command" in refused("compile", "--arch", "x86-64-v3", "--configs", 1)
    assert run(["doctor"]) == (0 if torch.cuda.is_available() else 1)
    assert "CXX='\"' is not a command" in capsys.readouterr().out


def test_a_config_that_is_nested_too_deeply_is_one_line(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000, encoding="utf-8")
    assert "is nested too deeply" in refused("tune", "--model", tmp_path / "config.json")


def test_a_home_folder_that_is_nobodys_is_one_line(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOFUSE_DB", "~no-such-user/x.db")
    said = "database ~no-such-user/x.db cannot be found: ~no-such-user is no user's home folder here"
    assert refused("show").startswith(said)
    assert run(["doctor"]) == 1
    assert said in capsys.readouterr().out


def test_output_that_cannot_show_a_character_shows_another(database_path: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}

    def output(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "autofuse", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    problem = Problem("mla_dual_rms_norm", (("dtype", "bf16"),))
    with TunedDatabase() as database:
        target = Target("cpu", "x86-64-v4", "a CPU of 3 GHz × 2")
        database.record_winner(
            Winner(target, problem, 4, Config.of(ROWS=1), "a1b2", 1.0, 0.1, "eager", 2.0, 2.0, 1.9, 2.1)
        )
    shown = output("show")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "3 GHz ? 2" in shown.stdout
    (winner,) = json.loads(output("show", "--json").stdout)
    assert winner["target"] == str(target)
    refused = output("tune", "--model", "✗")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_no_gpu_is_one_line(refused: Refused) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert refused("tune", "--device", "cuda") == f"device cuda: PyTorch {torch.__version__} finds no NVIDIA GPU"


def test_no_cupy_is_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    assert "install the project with its 'cuda' extra" in refused("compile", "--arch", "sm_90a", "--configs", 1)


def test_an_arch_of_another_spelling_gets_a_hint(refused: Refused) -> None:
    try:
        nvrtc.version()
    except TargetUnavailable as reason:
        pytest.skip(str(reason))
    assert "did you mean sm_90a?" in refused("compile", "--arch", "sm_9a")


def test_faults_of_ours_ask_to_be_reported(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("of all things")

    TunedDatabase().close()
    monkeypatch.setattr(show_module, "choose_targets", broken)
    line = refused("show", code=1)
    assert line.startswith("unexpected ZeroDivisionError: of all things")
    assert "please report it" in line
    monkeypatch.setenv("AUTOFUSE_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run(["show"])


def test_want_of_memory_is_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*arguments: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    TunedDatabase().close()
    monkeypatch.setattr(show_module, "choose_targets", hungry)
    assert refused("show").startswith("there is not enough memory")


def test_the_command_itself_exits_with_code_2() -> None:
    command = [sys.executable, "-m", "autofuse", "tune", "--tokens", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_output_may_be_cut_off() -> None:
    ops = subprocess.Popen([sys.executable, "-m", "autofuse", "ops"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ops.stdout is not None
    assert ops.stderr is not None
    ops.stdout.close()
    assert ops.stderr.read() == b""
    ops.wait()
