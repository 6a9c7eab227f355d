"""The tuned-config database in daily use: what goes in comes out, from several processes at once."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlite_utils

from autofuse.cache_db import LOOKUP_RULES, Baseline, Captured, Trial, TunedDatabase, Winner, default_path
from autofuse.cache_db.schema import migrations
from autofuse.errors import BadInput, DatabaseError
from autofuse.ops.problem import Config, Problem
from autofuse.targets.base import Target

H200 = Target("cuda", "sm_90a", "NVIDIA H200")
CPU = Target("cpu", "x86-64-v4", "AMD EPYC 9B14")
PROBLEM = Problem("mla_dual_rms_norm", (("dtype", "bf16"), ("q_lora_rank", 1536), ("kv_lora_rank", 512)))


def trial(rows: int = 1, **changes: Any) -> Trial:
    return replace(Trial(H200, PROBLEM, 64, Config.of(ROWS=rows), "abc", "ok", time_us=2.5, error=0.1), **changes)


def winner(tokens: int = 64, **changes: Any) -> Winner:
    made = Winner(H200, PROBLEM, tokens, Config.of(ROWS=1), "abc", 1.03, 0.02, "compile", 2.15, 2.09, 2.01, 2.16)
    return replace(made, **changes)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[TunedDatabase]:
    with TunedDatabase(tmp_path / "made" / "tuned.db") as made:
        yield made


def rewritten(database: TunedDatabase) -> TunedDatabase:
    """The same file as another process would see it."""
    return TunedDatabase(database.path, read_only=True)


def test_a_trial_comes_back_as_it_was_recorded(database: TunedDatabase) -> None:
    provenance = database.record_provenance({"driver": "580.65", "power_cap_w": 700.0, "mig": None})
    recorded = database.record_trial(
        trial(spread_us=0.1, compile_s=0.4, registers=32, spill_bytes=0, shared_bytes=4096, provenance=provenance)
    )
    assert recorded.measured_at.endswith("Z")
    assert rewritten(database).trials(H200, PROBLEM, 64, "abc") == [recorded]
    assert rewritten(database).provenance(provenance) == {"driver": "580.65", "power_cap_w": 700.0, "mig": None}


def test_trials_come_fastest_first_and_failures_last(database: TunedDatabase) -> None:
    database.record_trial(trial(1, status="compile_error", message="no such intrinsic", time_us=None))
    database.record_trial(trial(2, time_us=3.0))
    database.record_trial(trial(4, time_us=2.0))
    found = database.trials(H200, PROBLEM, 64, "abc")
    assert [known.config["ROWS"] for known in found] == [4, 2, 1]
    assert [known.message for known in database.failures(op="mla_dual_rms_norm")] == ["no such intrinsic"]


def test_a_result_with_nan_is_infinitely_wrong(database: TunedDatabase) -> None:
    database.record_trial(trial(status="wrong", error=float("nan"), time_us=None))
    assert database.failures()[0].error == float("inf")


def test_measuring_again_replaces_the_row(database: TunedDatabase) -> None:
    for time_us in (3.0, 2.0):
        database.record_trial(trial(time_us=time_us))
        database.record_baseline(Baseline(H200, PROBLEM, 64, "eager", time_us, 0.1))
        database.record_winner(winner(time_us=time_us))
    assert [known.time_us for known in database.trials(H200, PROBLEM, 64, "abc")] == [2.0]
    assert {kind: known.time_us for kind, known in database.baselines(H200, PROBLEM, 64).items()} == {"eager": 2.0}
    assert [known.time_us for known in database.winners()] == [2.0]


def test_an_edited_kernel_keeps_its_own_trials(database: TunedDatabase) -> None:
    database.record_trial(trial())
    database.record_trial(trial(source_hash="def"))
    assert len(database.trials(H200, PROBLEM, 64, "abc")) == len(database.trials(H200, PROBLEM, 64, "def")) == 1


def test_winners_are_found_by_target_op_and_problem(database: TunedDatabase) -> None:
    other = replace(PROBLEM, op="fp8_group_quant")
    for made in (winner(64), winner(1), winner(64, target=CPU), winner(64, problem=other)):
        database.record_winner(made)
    assert [known.tokens for known in database.winners(H200, problem=PROBLEM)] == [1, 64]
    assert [known.target for known in database.winners(op="mla_dual_rms_norm")] == [CPU, H200, H200]
    assert database.winner(H200, other, 64) is not None
    assert database.winner(H200, other, 65) is None
    assert database.targets() == [CPU, H200]


def test_captured_sites_are_kept_until_forgotten(database: TunedDatabase) -> None:
    site = Captured(H200, PROBLEM, 1, 4096)
    database.record_captured(site)
    database.record_captured(site)
    assert [(known.tokens_low, known.tokens_high) for known in database.captured(H200)] == [(1, 4096)]
    database.forget_captured(site)
    assert database.captured() == []


def test_records_of_one_transaction_are_all_there_or_none(database: TunedDatabase) -> None:
    def interrupted() -> None:
        with database.transaction():
            database.record_winner(winner())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert database.winners() == []


@pytest.mark.parametrize(
    "values",
    [{"time_us": float("nan")}, {"time_us": -1.0}, {"time_us": None}, {"tokens": 0}, {"status": "fine"}, {"error": -1}],
)
def test_a_record_refuses_what_no_measurement_gives(values: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"trial: {next(iter(values))} must be"):
        trial(**values)


def test_the_digest_stands_for_what_a_decision_depends_on(database: TunedDatabase, tmp_path: Path) -> None:
    empty = database.digest(H200)
    for made in (winner(1), winner(64)):
        database.record_winner(made)
    with TunedDatabase(tmp_path / "other.db") as other:
        assert other.digest(CPU) == empty
        for made in (winner(64, measured_at="2026-01-31T12:00:00Z"), winner(1, spread_us=0.5)):
            other.record_winner(made)
        assert other.digest(H200) == database.digest(H200) != empty
        other.record_winner(winner(1, config=Config.of(ROWS=2)))
        assert other.digest(H200) != database.digest(H200)


def test_the_path_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.delenv("AUTOFUSE_DB", raising=False)
    assert default_path() == Path("/home/ada/.cache/autofuse/tuned.db")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_path() == Path("/cache/autofuse/tuned.db")
    monkeypatch.setenv("AUTOFUSE_DB", "~/mine.db")
    assert default_path() == Path("/home/ada/mine.db")


def test_views_are_readable_with_sqlite_utils(database: TunedDatabase) -> None:
    database.record_winner(winner())
    for rows in (1, 2):
        database.record_trial(trial(rows, status="compile_error", message="too many registers", time_us=None))
    views = sqlite_utils.Database(database.path)
    (best,) = views["winners_view"].rows
    assert (best["tokens"], best["config"], best["gain"], best["beats_baseline"]) == (64, "ROWS=1", 2.09, "yes")
    (failures,) = views["failures_view"].rows
    assert (failures["status"], failures["message"], failures["trials"]) == ("compile_error", "too many registers", 2)
    assert len(list(views["trials_view"].rows)) == 2


def test_the_documentation_names_every_view_and_rule(database: TunedDatabase) -> None:
    page = (Path(__file__).parents[1] / "docs" / "database.md").read_text(encoding="utf-8")
    views = sqlite_utils.Database(database.path).view_names()
    assert set(re.findall(r"^\| `(\w+_view)` \|", page, re.MULTILINE)) == {*views}
    rules = page.partition("## How a call is answered")[2].partition("\n\n## ")[0]
    assert set(LOOKUP_RULES) <= set(re.findall(r"`(\w+)`", rules))


WRITER = """
import sys
from pathlib import Path
from typing import Any
from autofuse.cache_db import Trial, TunedDatabase
from autofuse.ops.problem import Config, Problem
from autofuse.targets.base import Target
with TunedDatabase(Path(sys.argv[1])) as database:
    for row in range(int(sys.argv[2])):
        config = Config.of(ROWS=row, WRITER=int(sys.argv[3]))
        database.record_trial(Trial(Target("cpu", "a", "b"), Problem("op", ()), 1, config, "abc", "ok", time_us=1.0))
        print(row, flush=True)
"""


def writer(path: Path, rows: int, number: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(rows), str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_make_and_fill_one_database_lose_nothing(tmp_path: Path) -> None:
    writers = [writer(tmp_path / "tuned.db", 50, number) for number in range(4)]
    assert [process.communicate()[1] for process in writers] == [""] * 4
    with TunedDatabase(tmp_path / "tuned.db", read_only=True) as database:
        assert len(database.every(Trial)) == 200


def test_a_killed_process_keeps_every_row_it_recorded(tmp_path: Path) -> None:
    process = writer(tmp_path / "tuned.db", 1_000_000, 0)
    assert process.stdout is not None
    recorded = max(int(process.stdout.readline()) for _ in range(20)) + 1
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with TunedDatabase(tmp_path / "tuned.db", read_only=True) as database:
        assert len(database.every(Trial)) >= recorded


def test_readers_do_not_wait_for_a_writer(database: TunedDatabase) -> None:
    database.record_winner(winner(1))
    with database.transaction():
        database.record_winner(winner(64))
        assert [known.tokens for known in rewritten(database).winners()] == [1]
    assert [known.tokens for known in rewritten(database).winners()] == [1, 64]


def test_a_second_writer_waits_for_the_first(database: TunedDatabase) -> None:
    with TunedDatabase(database.path) as second:
        waiting = threading.Thread(target=second.record_winner, args=(winner(64),))
        with database.transaction():
            database.record_winner(winner(1))
            waiting.start()
            waiting.join(0.1)
            assert waiting.is_alive()
        waiting.join()
    assert [known.tokens for known in database.winners()] == [1, 64]


def test_a_database_is_kept_in_wal_mode(database: TunedDatabase) -> None:
    assert sqlite3.connect(database.path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_reading_leaves_no_file_behind(database: TunedDatabase) -> None:
    database.record_winner(winner())
    database.close()
    before = database.path.read_bytes()
    assert len(rewritten(database).winners()) == 1
    assert [file.name for file in database.path.parent.iterdir()] == ["tuned.db"]
    assert database.path.read_bytes() == before


def test_a_read_only_database_refuses_records(database: TunedDatabase) -> None:
    with pytest.raises(DatabaseError, match="open for reading only"):
        rewritten(database).record_winner(winner())


@pytest.mark.parametrize("read_only", [True, False])
def test_an_older_schema_is_brought_up_to_date_without_loss(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "tuned.db"
    with closing(sqlite3.connect(path)) as connection:
        migrations.apply(sqlite_utils.Database(connection), stop_before="m002_indexes")
    before = path.read_bytes()
    with TunedDatabase(path, read_only=read_only) as database:
        assert database.winners() == []
    views = sqlite_utils.Database(path).view_names()
    assert (path.read_bytes() == before) == read_only == (views == [])
