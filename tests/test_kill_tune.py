"""What scripts/kill_tune.py counts as lost and as measured again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import tune_here

from autofuse.cache_db import Trial, TunedDatabase
from autofuse.ops import Config, get_op
from autofuse.targets import target_of
from autofuse.tuner import known
from autofuse.tuner.bench import Bench
from autofuse.tuner.budgets import Effort
from autofuse.tuner.disturbance import Comparison
from autofuse.tuner.failures import CandidateFailed
from autofuse.tuner.job import Event, TrialDone, tune_buckets
from autofuse.tuner.measure import Timing
from autofuse.tuner.queue import Bucket
from autofuse.tuner.racing import Race
from kill_tune import Tally, Told, told_of

CPU = torch.device("cpu")
NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=112, kv_lora_rank=40, cast_before_weight=True)
DIED = {"status": "launch_error", "message": known.DIED, "time_us": None}
CRASHED = {"status": "crashed", "message": "the process died of SIGABRT", "time_us": None}


def trials(*statuses: str) -> list[Trial]:
    configs = NORMS.kernel_source("cpu").space.configs(PROBLEM, 4)
    source = NORMS.source_hash("cpu")
    return [
        Trial(target_of(CPU), PROBLEM, 4, config, source, status, time_us=1.0, measured_at="2026-01-01T00:00:00Z")
        for config, status in zip(configs, statuses, strict=False)
    ]


def tally_of(rows: Sequence[Trial]) -> Tally:
    tally = Tally()
    tally.take([told_of(row) for row in rows])
    return tally


def now(path: Path, rows: Sequence[Trial]) -> Path:
    """Writes ``rows`` to the database in place of what is there."""
    path.unlink(missing_ok=True)
    with TunedDatabase(path) as database:
        for row in rows:
            database.record_trial(row)
    return path


def later(row: Trial, **changes: Any) -> Trial:
    return replace(row, measured_at="2026-01-01T00:00:09Z", **changes)


@pytest.mark.parametrize(("status", "repeated"), [("ok", 1), ("pruned", 1), ("wrong", 0)])
def test_what_was_right_or_pruned_is_not_to_be_measured_again(status: str, repeated: int) -> None:
    (row,) = trials(status)
    tally = tally_of([row])
    tally.take([told_of(later(row))])
    assert tally.repeated == repeated


def test_rows_as_they_were_told_are_not_lost(database_path: Path) -> None:
    rows = trials("ok", "pruned", "wrong")
    tally = tally_of(rows)
    tally.check(now(database_path, rows))
    assert (tally.lost, tally.duplicates) == (0, 0)


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        (0, {"time_us": 2.0}),  # of an "ok" one
        (0, {"status": "pruned"}),
        (0, DIED),
        (1, {"time_us": 2.0}),  # of a pruned one, while another is right
        (1, {"status": "ok"}),
        (1, DIED),
        (2, CRASHED),  # of one that was wrong
    ],
)
def test_a_row_that_another_was_written_over_is_lost(which: int, changes: dict[str, Any], database_path: Path) -> None:
    rows = trials("ok", "pruned", "wrong")
    tally = tally_of(rows)
    rows[which] = later(rows[which], **changes)
    tally.check(now(database_path, rows))
    assert tally.lost == 1


def test_a_row_that_is_gone_or_older_is_lost(database_path: Path) -> None:
    first, second = trials("ok", "ok")
    tally = tally_of([first, later(second)])
    tally.check(now(database_path, [replace(second, **CRASHED)]))
    assert tally.lost == 2


def test_what_was_timed_to_the_end_when_the_process_was_killed_is_measured_once_more(database_path: Path) -> None:
    finalist, pruned = trials("ok", "pruned")
    tally = tally_of([finalist, pruned])
    rows = [later(finalist, **CRASHED), later(pruned, **DIED)]
    tally.check(now(database_path, rows))
    tally.take([told_of(later(pruned))])
    tally.check(now(database_path, [rows[0], later(pruned)]))
    assert (tally.lost, tally.repeated) == (0, 0)
    tally.take([told_of(later(pruned))])
    assert tally.repeated == 1


def test_what_the_tuner_rewrites_as_it_chooses_the_winner_is_not_lost(
    tiny: Effort, monkeypatch: pytest.MonkeyPatch, database_path: Path
) -> None:
    timed: list[Config] = []  # the first of which is whichever compiled first

    def race(self: Bench, config: Config, best: Config | None) -> Race:
        timed.append(config)
        return Race(Timing((1.0, 1.0)), pruned=best is not None)

    def interleave(self: Bench, subjects: Sequence[Any], rounds: int, seed: int) -> Comparison:
        if timed[0] in subjects:
            raise CandidateFailed(timed[0], "crashed", "as planned")
        return Comparison((Timing((1.0,) * rounds),) * len(subjects))

    tune_here(monkeypatch)
    monkeypatch.setattr(Bench, "time", race)
    monkeypatch.setattr(Bench, "interleave", interleave)
    told: list[Told] = []

    def tell(event: Event) -> None:
        if isinstance(event, TrialDone):
            told.append(told_of(event.trial))

    with TunedDatabase() as database:
        tune_buckets([Bucket(PROBLEM, 4)], CPU, database, tiny, on_event=tell)
        rows = {told_of(row) for row in database.every(Trial)}
    assert [each[3] for each in told] == ["ok"] + ["pruned"] * (tiny.trials - 1)
    assert len(rows - set(told)) == 2  # the finalist, and what was timed to the end
    tally = Tally()
    tally.take(told)
    for _ in range(2):  # once more, of what it takes them for now
        tally.check(database_path)
        assert (tally.lost, tally.duplicates) == (0, 0)
    assert set(tally.committed.values()) == rows
