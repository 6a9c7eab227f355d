"""What comes from another machine decides nothing unasked; what no autofuse wrote does not come in at all."""

from __future__ import annotations

import json
import os
import resource
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from autofuse.cache_db import (
    Baseline,
    Snapshot,
    Trial,
    TunedDatabase,
    Winner,
    collect_garbage,
    compare,
    export_database,
    import_into,
    preview_import,
    read_export,
)
from autofuse.cli.app import run
from autofuse.errors import AutofuseError, BadInput
from autofuse.models import PRESETS, per_rank
from autofuse.ops import OPS, get_op
from autofuse.targets.base import Target

H200 = Target("cuda", "sm_90a", "NVIDIA H200")
OP = get_op("mla_dual_rms_norm")
PROBLEM = OP.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
HERE, OLD_SOURCE = OP.source_hash("cuda"), "0123abcd"
MINE, THEIRS, THIRD = islice(OP.kernel_source("cuda").space.configs(PROBLEM, 64), 3)
EARLY, LATE = "2026-01-31T12:00:00Z", "2026-02-01T12:00:00Z"
WINNER = Winner(H200, PROBLEM, 64, MINE, HERE, 1.03, 0.02, "compile", 2.15, 2.09, 2.01, 2.16, measured_at=EARLY)
FOREIGN = replace(WINNER, config=THEIRS, time_us=0.5, gain=4.3, gain_low=4.2, gain_high=4.4, measured_at=LATE)


@pytest.fixture
def there(tmp_path: Path) -> TunedDatabase:
    """Another machine's database: a winner with its trial and baseline."""
    database = TunedDatabase(tmp_path / "there" / "tuned.db")
    provenance = database.record_provenance({"driver": "580.65", "host": "there"})
    trial = Trial(H200, PROBLEM, 64, THEIRS, HERE, "ok", time_us=0.5, error=0.2, measured_at=LATE)
    for record in (trial, Baseline(H200, PROBLEM, 64, "compile", 2.15, 0.1, measured_at=LATE), FOREIGN):
        database.record(replace(record, provenance=provenance))
    return database


@pytest.fixture
def here(tmp_path: Path) -> TunedDatabase:
    return TunedDatabase(tmp_path / "tuned.db")


@pytest.fixture
def brought(there: TunedDatabase, tmp_path: Path) -> Path:
    return export_database(there, tmp_path / "brought.jsonl").path


def test_what_is_brought_decides_nothing_but_says_what_to_try(here: TunedDatabase, brought: Path) -> None:
    before = here.digest(H200)
    import_into(here, brought)
    assert (here.winners(), here.trials(H200, PROBLEM, 64, HERE), here.baselines(H200, PROBLEM, 64)) == ([], [], {})
    assert here.digest(H200) == before
    assert [winner.standing for winner in here.every(Winner, candidates=True)] == ["candidate"]
    assert here.priors(H200, PROBLEM, 64, HERE) == [THEIRS]


def test_what_is_trusted_decides_until_it_is_measured_here(here: TunedDatabase, brought: Path) -> None:
    assert [winner.config for winner in import_into(here, brought, trust=True).wins] == [THEIRS]
    assert Snapshot.load(here.path, H200).lookup(PROBLEM, 64, 64, HERE).rule == "exact"
    assert here.baselines(H200, PROBLEM, 64).keys() == {"compile"}
    here.record_winner(WINNER)
    assert [(winner.config, winner.standing) for winner in here.winners()] == [(MINE, "own")]


@pytest.mark.parametrize("trust", [True, False])
def test_what_was_measured_here_stays_however_fast_the_other_is(
    here: TunedDatabase, brought: Path, trust: bool
) -> None:
    here.record_winner(WINNER)
    done = import_into(here, brought, trust=trust)
    assert [(each.stays, each.here.config, each.there.config) for each in done.conflicts] == [("here", MINE, THEIRS)]
    assert [winner.config for winner in here.winners()] == [MINE]
    assert done.wins == ()


def test_a_winner_that_did_not_win_here_is_still_worth_a_trial(here: TunedDatabase, there: TunedDatabase) -> None:
    here.record_winner(WINNER)
    path = export_database(there, there.path.parent / "winners.jsonl", winners_only=True).path
    import_into(here, path)
    assert here.priors(H200, PROBLEM, 64, HERE) == [THEIRS]


def test_the_kernel_that_is_here_stays_over_one_of_another_version(here: TunedDatabase, brought: Path) -> None:
    here.record_winner(replace(WINNER, source_hash=OLD_SOURCE))
    assert [each.stays for each in import_into(here, brought, trust=True).conflicts] == ["there"]
    assert [former.winner.source_hash for former in here.history()] == [OLD_SOURCE]


def test_a_dry_run_says_what_an_import_does_and_changes_nothing(here: TunedDatabase, brought: Path) -> None:
    here.record_winner(replace(WINNER, source_hash=OLD_SOURCE))
    here.close()
    before = here.path.read_bytes()
    told = preview_import(here.path, brought, trust=True)
    assert here.path.read_bytes() == before
    with TunedDatabase(here.path) as again:
        assert import_into(again, brought, trust=True) == told
    assert preview_import(here.path.with_name("absent.db"), brought).new["winners"] == 1


def test_rows_that_are_of_no_use_here_are_left_out_and_counted(here: TunedDatabase, there: TunedDatabase) -> None:
    there.record(replace(FOREIGN, tokens=1, problem=replace(PROBLEM, op="somebodys_own")))
    there.record(replace(FOREIGN, tokens=2, source_hash=OLD_SOURCE, config=type(MINE).of(ROWS=77)))
    done = import_into(here, there.path, trust=True)
    assert sorted(done.left_out.values()) == [1, 1]
    assert any("somebodys_own has no kernel for cuda here" in why for why in done.left_out)
    assert any("ROWS=77' is outside the search space" in why for why in done.left_out)
    assert [winner.tokens for winner in here.winners()] == [64]


def test_a_url_is_fetched_first(here: TunedDatabase, brought: Path) -> None:
    pytest.importorskip("fsspec")
    assert import_into(here, brought.as_uri()).new["winners"] == 1
    with pytest.raises(BadInput, match="cannot import file:///nowhere"):
        import_into(here, "file:///nowhere/tuned.jsonl")
    with pytest.raises(BadInput, match="cannot import nosuch://host"):
        import_into(here, "nosuch://host/tuned.jsonl")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server that has the files of ``tmp_path``."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


@pytest.mark.parametrize("suffix", ["jsonl", "db"])
def test_a_web_server_has_it(
    suffix: str, here: TunedDatabase, there: TunedDatabase, server: str, tmp_path: Path
) -> None:
    pytest.importorskip("aiohttp")
    export_database(there, tmp_path / f"brought.{suffix}")
    assert preview_import(here.path, f"{server}/brought.{suffix}?raw=1").new["winners"] == 1
    assert import_into(here, f"{server}/brought.{suffix}").new["winners"] == 1
    with pytest.raises(BadInput, match=rf"cannot import {server}/absent\.{suffix}: .*404.*; check the URL"):
        import_into(here, f"{server}/absent.{suffix}")


def test_a_url_whose_file_system_is_not_installed_says_what_to_install(
    here: TunedDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")

    def absent(*_: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "open", absent)
    with pytest.raises(BadInput, match=r"cannot import s3://b/x.db: Install s3fs to access S3; install that, or fetch"):
        import_into(here, "s3://b/x.db")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(BadInput, match=r"URLs need fsspec; `pip install 'fsspec\[http\]'`, or fetch the file"):
        import_into(here, "s3://b/x.db")


def test_winners_alone_bring_the_baselines_that_they_are_compared_with(there: TunedDatabase, tmp_path: Path) -> None:
    there.record(Baseline(H200, PROBLEM, 1, "compile", 2.0, 0.1))
    done = export_database(there, tmp_path / "winners.db", winners_only=True)
    assert done.counts == {"trials": 0, "baselines": 1, "winners": 1}


def test_files_are_compared_by_what_they_say(here: TunedDatabase, there: TunedDatabase, brought: Path) -> None:
    here.record_winner(WINNER)
    here.record_winner(replace(WINNER, tokens=1))
    found = compare(read_export(here.path), read_export(brought))
    assert [winner.tokens for winner in found.only_here] == [1]
    assert [(pair.a.config, pair.b.config) for pair in found.changed] == [(MINE, THEIRS)]
    assert found.rows == {"trials": (0, 1, 0), "baselines": (0, 1, 0), "winners": (1, 0, 1)}
    assert compare(read_export(there.path), read_export(brought)).empty


def test_an_earlier_winner_can_be_brought_back(here: TunedDatabase) -> None:
    first, second, third = (replace(WINNER, config=config) for config in (MINE, THEIRS, THIRD))
    for winner in (first, second, second, third):
        here.record_winner(winner)
    assert [former.winner.config for former in here.history()] == [THEIRS, MINE]
    assert here.roll_back(H200, PROBLEM, 64) == second
    assert here.roll_back(H200, PROBLEM, 64) == first
    assert here.roll_back(H200, PROBLEM, 64) is None
    assert here.winners() == [first]
    with TunedDatabase(here.path.with_name("other.db")) as other:
        other.record_winner(first)
        assert other.digest(H200) == here.digest(H200)


def test_garbage_is_what_nothing_can_use(here: TunedDatabase) -> None:
    for driver, source in (("1", OLD_SOURCE), ("2", HERE)):
        provenance = here.record_provenance({"driver": driver})
        trial = Trial(H200, PROBLEM, 64, MINE, source, "ok", time_us=1.0, provenance=provenance)
        here.record(trial)
        here.record(replace(WINNER, tokens=int(driver), source_hash=source, provenance=provenance))
    for time_us in (1.0, 2.0, 3.0, 4.0):
        here.record(replace(WINNER, time_us=time_us))
    would = collect_garbage(here, keep=2, dry_run=True)
    assert collect_garbage(here, keep=2) == {**would, "provenance": 1}
    assert would == {"trials": 1, "winners": 1, "history": 1}
    assert [former.winner.time_us for former in here.history()] == [3.0, 2.0]
    assert {winner.source_hash for winner in here.winners()} == {HERE}
    here.check()


# Files that somebody made up


def lines(path: Path, **changes: Any) -> Path:
    """The export with these columns of its last row changed."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1].update(changes)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def provenance(path: Path, **fields: Any) -> Path:
    from autofuse.cache_db.store import provenance_id

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[1:]:
        if row["table"] == "provenance":
            row["fields"].update(fields)
            row["id"] = provenance_id(row["fields"])
        else:
            row["provenance"] = rows[1]["id"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sql(path: Path, script: str) -> Path:
    made = path.with_suffix(".db")
    with TunedDatabase(made.with_name("whole.db")) as database:
        import_into(database, path, trust=True)
        export_database(database, made)
    with closing(sqlite3.connect(made)) as connection:
        connection.executescript(script)
    return made


def sparse(path: Path, suffix: str) -> Path:
    huge = path.with_name(f"sparse{suffix}")
    huge.write_bytes(b"SQLite format 3\x00")
    os.truncate(huge, 10 << 30)
    return huge


DROP = "x'); DROP TABLE winners; --"
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    **{
        f"SQL in {column}": (lambda path, column=column: lines(path, **{column: DROP}), "is an SQL statement")
        for column in ("problem", "config", "source_hash", "baseline", "provenance", "measured_at")
    },
    "SQL in target": (lambda path: lines(path, target=f"cuda:sm_90a:{DROP}"), "is an SQL statement"),
    "SQL in provenance's fields": (lambda path: provenance(path, host=DROP), "is an SQL statement"),
    "SQL in provenance's names": (lambda path: provenance(path, **{DROP: 1}), "is an SQL statement"),
    "quotes in target": (lambda path: lines(path, target="cuda:sm_90a:x' OR '1'='1"), "named as no device is"),
    "a path in target": (lambda path: lines(path, target="cuda:../../etc/passwd:x"), "named as no device is"),
    "a path for a device": (lambda path: lines(path, target="cuda:sm_90a:/etc/passwd"), "named as no device is"),
    "a path for a source": (lambda path: lines(path, source_hash="../../tuned"), "no hash of a kernel's source"),
    "a path for a config": (lambda path: lines(path, config="ROWS=/etc/passwd"), "as a whole number"),
    "another kind": (lambda path: lines(path, target="rm:sm_90a:x"), "its kind is none of"),
    "a huge time": (lambda path: lines(path, time_us=1e300), "time_us must be"),
    "a huge T": (lambda path: lines(path, tokens=10**30), "tokens must be"),
    "a huge config": (lambda path: lines(path, config="ROWS=" + "9" * 100), "as a whole number"),
    "a huge text": (lambda path: lines(path, target="cuda:sm_90a:" + "x" * 100_000), "is longer than any"),
    "a huge line": (lambda path: lines(path, target="x" * (64 << 20)), "the line is longer than"),
    "NaN for a time": (lambda path: lines(path, time_us=float("nan")), "NaN is not a number"),
    "an infinite gain": (lambda path: lines(path, gain=float("inf")), "Infinity is not a number"),
    "a config outside": (lambda path: lines(path, config=str(MINE).replace("ROWS=1", "ROWS=77")), "ROWS=77 is not one"),
    "a tunable too many": (lambda path: lines(path, config=f"A=1,{THEIRS}"), "its tunables are"),
    "a problem that is none": (lambda path: lines(path, problem=f"{OP.name}(dtype=../../x)"), "has no problem"),
    "a sparse file": (lambda path: sparse(path, ".db"), "is larger than 256 MiB, as no export is"),
    "sparse lines": (lambda path: sparse(path, ".jsonl"), "is larger than 256 MiB, as no export is"),
    "a trigger": (
        lambda path: sql(path, "CREATE TRIGGER t AFTER INSERT ON trials BEGIN DELETE FROM winners; END"),
        "it holds the trigger 't'",
    ),
    "a trigger in place of ours": (
        lambda path: sql(
            path,
            "DROP TRIGGER winners_insert;"
            "CREATE TRIGGER winners_insert AFTER INSERT ON winners BEGIN DELETE FROM trials; END",
        ),
        "its trigger winners_insert is not the one",
    ),
    "a view": (lambda path: sql(path, "CREATE VIEW v AS SELECT 1"), "it holds the view 'v'"),
    "a view in place of a table": (
        lambda path: sql(
            path,
            "DROP TABLE winners; CREATE VIEW winners AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n)"
            " SELECT i AS target FROM n",
        ),
        "it holds the view 'winners'",
    ),
    "a virtual table": (lambda path: sql(path, "CREATE VIRTUAL TABLE f USING fts5(x)"), "it holds the table 'f'"),
    "computed columns": (
        lambda path: sql(path, "ALTER TABLE winners ADD COLUMN c BLOB AS (zeroblob(1000000000))"),
        "its table winners computes its columns",
    ),
    "a huge blob": (lambda path: sql(path, "UPDATE winners SET config = zeroblob(100000000)"), "is longer than any"),
    "a blob": (lambda path: sql(path, "UPDATE winners SET config = x'00ff'"), "is a blob"),
    "NaN in a table": (lambda path: sql(path, "UPDATE trials SET time_us = 9e999 - 9e999"), "time_us must be"),
    "an infinite time": (lambda path: sql(path, "UPDATE winners SET time_us = 9e999"), "time_us must be"),
    "SQL in a table": (lambda path: sql(path, "UPDATE trials SET message = 'x''; DROP TABLE a'"), "an SQL statement"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_somebody_made_up_is_refused_by_name(
    here: TunedDatabase, brought: Path, tmp_path: Path, case: str
) -> None:
    here.record_winner(replace(WINNER, tokens=1))
    make, reason = HOSTILE[case]
    path = make(brought)
    files = sorted(file.name for file in tmp_path.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    for trust in (False, True):
        with pytest.raises(AutofuseError, match=reason) as caught:
            import_into(here, path, trust=trust)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 1000
    assert time.perf_counter() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 << 10  # KiB
    assert [winner.tokens for winner in here.every(Winner, candidates=True)] == [1]
    assert sorted(file.name for file in tmp_path.iterdir()) == files


# The command line


def test_the_command_line_shows_before_it_imports(
    brought: Path, database_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["import", str(brought), "--dry-run", "--trust"]) == 0
    text = capsys.readouterr().out
    assert "Would import" in text
    assert "new: 1 trials, 1 baselines, 1 winners" in text
    assert "Trusted until measured here" in text
    assert not database_path.exists()
    assert run(["import", str(brought)]) == 0
    assert "These are candidates: `autofuse tune` measures them first" in capsys.readouterr().out
    assert run(["import", str(brought.with_name("absent.jsonl"))]) == 2


def test_the_command_line_compares(here: TunedDatabase, brought: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here.record_winner(WINNER)
    assert run(["diff", str(here.path), str(brought)]) == 1
    text = capsys.readouterr().out
    assert "Different winners" in text
    assert "winners: 0 only in A, 0 only in B, 1 differ" in text
    assert run(["diff", str(brought), str(brought)]) == 0
    assert "hold the same" in capsys.readouterr().out


def test_the_command_line_exports_by_device_and_model(
    there: TunedDatabase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--database", str(there.path), "--overwrite", "--json"]

    def winners(*arguments: str) -> int:
        assert run(["export", str(tmp_path / "out.jsonl"), *arguments, *out]) == 0
        return int(json.loads(capsys.readouterr().out)["rows"]["winners"])

    assert winners("--gpu", "h200") == winners("--model", "deepseek-v3") == winners("--winners-only") == 1
    assert winners("--model", "llama-3-8b") == 0
    shared = OPS["mla_rope_kv_cache_cat"].model_problems(per_rank(PRESETS["deepseek-v3"], 8, "deepseek-v3"), "bf16")
    for problem in shared:
        config = OPS[problem.op].default_config("cuda", problem, 64)
        source = OPS[problem.op].source_hash("cuda")
        there.record(replace(FOREIGN, problem=problem, config=config, source_hash=source))
    assert winners("--model", "deepseek-v3") == 1 + len(shared) > 1
    assert run(["export", str(tmp_path / "out.jsonl"), "--gpu", "MI300X", *out]) == 2
    assert "no device in" in capsys.readouterr().err


def test_the_command_line_rolls_back_and_cleans_up(here: TunedDatabase, capsys: pytest.CaptureFixture[str]) -> None:
    here.record_winner(replace(WINNER, source_hash=OLD_SOURCE, tokens=1))
    for config in (THEIRS, MINE):
        here.record_winner(replace(WINNER, config=config))
    base = ["--database", str(here.path)]
    assert run(["rollback", *base]) == 0
    assert "Winners of before" in capsys.readouterr().out
    assert run(["rollback", str(PROBLEM), "--tokens", "64", *base]) == 0
    assert f"is {THEIRS} again" in capsys.readouterr().out
    assert run(["rollback", str(PROBLEM), "--tokens", "64", *base]) == 2
    assert "has no winner of before" in capsys.readouterr().err
    assert run(["gc", "--dry-run", *base]) == 0
    assert "Would remove" in capsys.readouterr().out
    assert run(["gc", *base]) == 0
    assert "1 of winners" in capsys.readouterr().out
