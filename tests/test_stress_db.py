"""A short form of scripts/stress_db.py: nothing committed is lost, nothing is raised, nothing is overwritten."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import stress_db


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
    assert (outcome.faults, outcome.counts["rows"]) == ([], 200)


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
