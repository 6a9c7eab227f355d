"""A short form of scripts/stress_db.py: nothing committed is lost, nothing is raised, nothing is overwritten."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import stress_db
from bench.progress import Progress


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can enter: some of the stress is under another user's permissions."""
    with tempfile.TemporaryDirectory(prefix="autofuse-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("autofuse")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def test_many_writers_lose_no_row(folder: Path) -> None:
    outcome = stress_db.writers(folder, processes=4, rows=50)
    assert (outcome.faults, outcome.counts["rows that are there"]) == ([], 200)


def test_a_writer_that_stops_early_would_be_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(number: int, writer: int) -> stress_db.Trial:
        if number == 3:
            os._exit(0)
        return trial(number, writer)

    trial = stress_db.trial
    monkeypatch.setattr(stress_db, "trial", stopping)
    assert stress_db.writers(folder, processes=1, rows=4).faults == [
        "a writer committed 3 of 4 rows",
        "1 rows are gone",
    ]


def test_side_by_side_copies_come_to_the_same(folder: Path) -> None:
    alone, together = (stress_db.corrupted_copies(folder, copies=20, jobs=jobs) for jobs in (1, 2))
    assert (together.counts, together.faults) == (alone.counts, alone.faults)


def test_long_work_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 11.0, 21.0])
    monkeypatch.setattr("bench.progress.time.monotonic", lambda: next(clock))
    progress = Progress("rows", 30)
    for steps in (1, 1, 1, 0):
        progress.advance(steps)
    assert capsys.readouterr().err.splitlines() == ["  rows: 2 of 30, 10 s", "  rows: 3 of 30, 21 s"]


def test_killed_processes_leave_what_they_committed(folder: Path) -> None:
    outcome = stress_db.kills(folder, count=6)
    assert (outcome.faults, outcome.counts.total()) == ([], 6)


def test_damaged_files_are_neither_fatal_nor_overwritten(folder: Path) -> None:
    outcome = stress_db.corrupted_copies(folder, copies=3 * len(stress_db.DAMAGE))
    assert (outcome.faults, outcome.counts.total()) == ([], 3 * len(stress_db.DAMAGE))
    assert outcome.counts["left unfused"] > len(stress_db.DAMAGE)


def test_a_model_compiles_unfused_with_one_warning_where_nothing_can_be_read(folder: Path) -> None:
    outcome = stress_db.compiled_copies(folder, copies=7)
    assert (outcome.faults, outcome.counts["fused"] + outcome.counts["left unfused"]) == ([], 7)
    assert outcome.counts["warnings"] >= len(stress_db._UNUSABLE)


def test_a_row_that_is_gone_would_be_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stress_db, "trial", lambda number, writer, one=stress_db.trial: one(number // 2, writer))
    assert stress_db.writers(folder, processes=1, rows=4).faults == ["2 rows are gone"]
