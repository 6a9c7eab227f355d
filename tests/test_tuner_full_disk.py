"""A disk that is full, or must not be written: one line, exit code 2, and everything measured before is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from planting import tune_here

from autofuse.cache_db import Trial, TunedDatabase
from autofuse.cli.app import run
from autofuse.ops import get_op
from autofuse.tuner import budgets
from autofuse.tuner.budgets import Effort

PROBLEM = get_op("mla_dual_rms_norm").make_problem(
    dtype="bf16", q_lora_rank=112, kv_lora_rank=40, cast_before_weight=True
)
TUNE = ["tune", "--problem", str(PROBLEM), "--tokens", "4", "--device", "cpu", "--effort", "quick"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tiny: Effort) -> None:
    tune_here(monkeypatch)
    monkeypatch.setitem(budgets.EFFORTS, "quick", tiny)


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is an error; lines of progress may come before."""
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("autofuse: error: ")
    return last.removeprefix("autofuse: error: ")


def trials() -> list[Trial]:
    with TunedDatabase(read_only=True) as database:
        return database.every(Trial)


def test_a_full_disk_under_the_database(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """SQLite's own limit stands for the disk's: the error is the same."""
    recorded = TunedDatabase.record_trial
    calls: list[Trial] = []

    def filling(self: TunedDatabase, trial: Trial) -> Trial:
        calls.append(trial)
        if len(calls) == 4:  # one is done, and of the second it is known that it runs
            (pages,) = self._db.execute("PRAGMA page_count").fetchone()
            self._db.execute(f"PRAGMA max_page_count = {pages}")
            trial = Trial(**{**vars(trial), "message": "x" * 100_000})
        return recorded(self, trial)

    monkeypatch.setattr(TunedDatabase, "record_trial", filling)
    assert run(TUNE) == 2
    assert "cannot be written: the disk is full; free some space and run again" in error(capsys)
    kept = [trial for trial in trials() if trial.status == "ok"]
    assert len(kept) == 1
    monkeypatch.setattr(TunedDatabase, "record_trial", recorded)
    assert run(TUNE) == 0
    assert set(kept) <= set(trials())


def test_a_full_disk_under_the_compiler_is_no_fault_of_the_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The compiler runs once, and then finds no space for its temporary files."""
    compiler = tmp_path / "c++"
    script = f"""#!/bin/sh
case "$*" in *-c*) ;; *) exec g++ "$@" ;; esac
mkdir {tmp_path}/once 2>/dev/null && exec g++ "$@"
test -e {tmp_path}/space && exec g++ "$@"
echo "fatal error: error writing to /tmp/ccUik8DS.s: No space left on device" >&2
exit 1
"""
    compiler.write_text(script, encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(TUNE) == 2
    assert error(capsys).startswith("a compiler says: No space left on device: free some in ")
    kept = trials()
    assert {trial.status for trial in kept} <= {"ok"}
    (tmp_path / "space").touch()
    assert run(TUNE) == 0
    assert {trial.status for trial in trials()} == {"ok"}


def test_a_kernel_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "autofuse").mkdir()
    (tmp_path / "autofuse" / "kernels").write_text("in the way", encoding="utf-8")
    assert run(TUNE) == 2
    assert error(capsys).startswith(f"kernel cache {tmp_path}/autofuse/kernels cannot be written")
    assert trials() == []


def test_a_database_that_is_read_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], database_path: Path
) -> None:
    assert run(TUNE) == 0
    capsys.readouterr()
    before = database_path.read_bytes()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **kw: mode != os.W_OK and allowed(path, mode))
    monkeypatch.setattr(os, "supports_effective_ids", set())
    assert run([*TUNE, "--retune"]) == 2
    assert "cannot be written: the file, its folder or the file system is read-only; make it writable" in error(capsys)
    assert database_path.read_bytes() == before
    assert run([*TUNE, "--dry-run"]) == 0
