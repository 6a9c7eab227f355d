"""What a call without a plan finds untuned is noted for the tuner, and never in the call's way."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from autofuse.cache_db import Captured, TunedDatabase, Winner
from autofuse.cache_db.notebook import Notebook
from autofuse.ops import Problem, get_op
from autofuse.ops.buckets import RANGE_BUCKETS
from autofuse.runtime.dispatch import resolve_plan
from autofuse.targets import target_of
from autofuse.tuner.api import captured_buckets

CPU = torch.device("cpu")
OP = get_op("mla_dual_rms_norm")


def arguments(width: int) -> tuple[Problem, tuple[object, ...]]:
    """Of a problem of one's own: a call of a known one is bound already."""
    problem = OP.make_problem(dtype="fp32", q_lora_rank=width, kv_lora_rank=64, cast_before_weight=False)
    return problem, OP.example_args(problem, 3, CPU, torch.Generator().manual_seed(0))


def test_a_call_of_what_nobody_tuned_is_noted_at_all_tokens_once() -> None:
    problem, args = arguments(176)
    for _ in range(2):
        torch.ops.autofuse.mla_dual_rms_norm(*args)
    with TunedDatabase() as database:
        (site,) = (site for site in database.captured() if site.problem == problem)
    assert (site.target, site.tokens_low, site.tokens_high) == (target_of(CPU), RANGE_BUCKETS[0], RANGE_BUCKETS[-1])
    assert tuple(bucket.tokens for bucket in captured_buckets(site)) == RANGE_BUCKETS


def test_a_call_of_what_is_tuned_is_not() -> None:
    problem, _ = arguments(208)
    target, config = target_of(CPU), OP.default_config("cpu", problem, 4)
    winner = Winner(target, problem, 4, config, OP.source_hash("cpu"), 5.0, 0.1, "eager", 9.0, 1.8, 1.7, 1.9)
    with TunedDatabase() as database:
        database.record_winner(winner)
    assert resolve_plan(OP, problem, target).buckets == ((4, config),)
    with TunedDatabase() as database:
        assert not [site for site in database.captured() if site.problem == problem]


def test_a_database_that_takes_no_notes_is_one_warning_and_the_call_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOFUSE_DB", str(tmp_path / "file" / "tuned.db"))  # no folder can be made there
    for width in (240, 272):
        _, args = arguments(width)
        with caplog.at_level(logging.WARNING, "autofuse"):
            q, kv = torch.ops.autofuse.mla_dual_rms_norm(*args)
        right = OP.reference(*args)
        torch.testing.assert_close((q, kv), right)
    assert len([record for record in caplog.records if "cannot remember" in record.message]) <= 1


def test_a_database_is_given_up_after_its_first_fault(tmp_path: Path) -> None:
    folder = tmp_path / "tuned.db"
    folder.mkdir()
    notebook, site = Notebook(), Captured(target_of(CPU), arguments(304)[0], 1, 8)
    assert "cannot remember what is still to be tuned" in notebook.write(folder, [site])
    assert notebook.write(folder, [site]) == ""
    assert notebook.write(tmp_path / "other.db", [site]) == ""
    with TunedDatabase(tmp_path / "other.db") as database:
        assert [each.problem for each in database.captured()] == [site.problem]
