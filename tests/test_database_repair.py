"""What a damaged database still holds can be saved, and an upgrade keeps the file as it was."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from autofuse.cache_db import Baseline, Captured, DamagedDatabaseError, Trial, TunedDatabase, Winner, repair
from autofuse.cli.app import run
from autofuse.errors import DatabaseError
from autofuse.ops.problem import Config, Problem
from autofuse.targets.base import Target

SCHEMAS = sorted((Path(__file__).parent / "schemas").glob("*.db"))
CPU = Target("cpu", "x86-64-v4", "AMD EPYC 9B14")
PROBLEM = Problem("mla_dual_rms_norm", (("dtype", "bf16"),))
TRIAL = Trial(CPU, PROBLEM, 64, Config.of(ROWS=1), "abc", "ok", time_us=1.03)
WINNER = Winner(CPU, PROBLEM, 64, Config.of(ROWS=1), "abc", 1.03, 0.02, "compile", 2.15, 2.09, 2.01, 2.16)
LONG = "x" * 9000  # more than a page


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound, closed database of a few hundred rows."""
    with TunedDatabase(tmp_path / "tuned.db") as database, database.transaction():
        provenance = database.record_provenance({"driver": "580.65"})
        for row in range(300):
            database.record_trial(replace(TRIAL, config=Config.of(ROWS=row), provenance=provenance))
        database.record_trial(replace(TRIAL, tokens=1, status="wrong", message=LONG))
        for time_us in (1.1, 1.0):
            database.record_winner(replace(WINNER, time_us=time_us))
        database.record_captured(Captured(CPU, PROBLEM, 1, 4096))
    return tmp_path / "tuned.db"


def content(path: Path) -> list[object]:
    with TunedDatabase(path, read_only=True) as database:
        database.check()
        kinds = (Trial, Baseline, Winner, Captured)
        return [*(record for kind in kinds for record in database.every(kind)), *database.history()]


def page_of(path: Path, table: str) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", [table]).fetchone()[0])


def spoil(path: Path, page: int, length: int = 4096) -> bytes:
    content = bytearray(path.read_bytes())
    content[(page - 1) * 4096 : (page - 1) * 4096 + length] = b"\xaa" * length
    path.write_bytes(content)
    return bytes(content)


@pytest.mark.parametrize("spoiled", ["nothing", "trials", "sqlite_master"])
def test_every_row_on_a_whole_page_is_saved(path: Path, spoiled: str) -> None:
    before = content(path)
    if spoiled != "nothing":  # the root of a large table has no rows, and no row is found without it
        spoil(path, 1 if spoiled == "sqlite_master" else page_of(path, spoiled))
        with pytest.raises(DamagedDatabaseError, match="doctor --repair"):
            content(path)
    damaged = path.read_bytes()
    done = repair(path)
    assert done.path == path.with_name("tuned.repaired.db")
    assert content(done.path) == before
    assert done.salvaged == {"trials": 301, "baselines": 0, "winners": 1, "captured": 1}
    assert path.read_bytes() == damaged


def test_of_a_file_cut_short_what_is_left_is_saved(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 4 // 5)
    assert 0 < repair(path).salvaged["trials"] < 301


def test_a_log_that_was_not_yet_written_back_is_read(path: Path, tmp_path: Path) -> None:
    with TunedDatabase(path) as database:
        database.record_winner(replace(WINNER, tokens=1))
        (tmp_path / "crashed").mkdir()
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{path}{suffix}", tmp_path / "crashed" / f"tuned.db{suffix}")
    crashed = tmp_path / "crashed" / "tuned.db"
    spoil(crashed, 1, 100)
    assert repair(crashed).salvaged["winners"] == 2


def test_what_was_deleted_does_not_come_back(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("PRAGMA secure_delete = OFF; DELETE FROM trials")
    assert repair(path).salvaged["trials"] == 0


def test_a_row_that_is_damaged_itself_is_left_behind(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("UPDATE trials SET time_us = -1.0 WHERE config = 'ROWS=7'")
    assert repair(path).salvaged["trials"] == 300


def test_repairing_again_makes_another_file(path: Path) -> None:
    assert [repair(path).path.name for _ in range(2)] == ["tuned.repaired.db", "tuned.repaired-2.db"]


def test_nothing_to_save_is_said(tmp_path: Path) -> None:
    (tmp_path / "tuned.db").write_bytes(b"a note\n" * 9999)
    with pytest.raises(DatabaseError, match="holds no row that can be read; move it away"):
        repair(tmp_path / "tuned.db")
    assert [file.name for file in tmp_path.iterdir()] == ["tuned.db"]


def test_doctor_repairs_only_what_is_damaged(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--repair", "--database", str(path)]) == 0
    assert "is sound: there is nothing to repair" in capsys.readouterr().out
    spoil(path, 1)
    assert run(["doctor", "--repair", "--database", str(path)]) == 0
    text = capsys.readouterr().out
    assert f"Saved 301 trials, 1 winners, 1 captured from {path} into {path.with_name('tuned.repaired.db')}" in text
    assert run(["doctor", "--repair", "--database", str(path.with_name("absent.db"))]) == 2


def test_doctor_finds_damage_in_pages_that_winners_do_not_need(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["doctor", "--database", str(path)])
    assert f"ok  database: {path}: 1 winners" in capsys.readouterr().out
    spoil(path, page_of(path, "trials"))
    assert run(["doctor", "--database", str(path)]) == 1
    text = capsys.readouterr().out
    assert f"no  database: {path} cannot be used" in text
    assert "`autofuse doctor --repair` saves what can be read" in text


@pytest.mark.parametrize("released", SCHEMAS, ids=lambda path: path.stem)
def test_every_released_schema_is_brought_up_to_date_and_kept_beside(tmp_path: Path, released: Path) -> None:
    path = Path(shutil.copyfile(released, tmp_path / "tuned.db"))
    with TunedDatabase(path) as database:
        database.check()
        assert [len(database.every(kind)) for kind in (Trial, Baseline, Winner, Captured)] == [8, 4, 4, 1]
        assert {winner.standing for winner in database.winners()} == {"own"}
    backups = [file for file in tmp_path.iterdir() if file != path]
    assert len(backups) == (released != SCHEMAS[-1])
    for backup in backups:
        assert content(backup) == content(path)
    assert len(content(repair(released_copy(released, tmp_path)).path)) == len(content(path))


def released_copy(released: Path, folder: Path) -> Path:
    (folder / "copy").mkdir()
    return Path(shutil.copyfile(released, folder / "copy" / "tuned.db"))


def test_an_upgrade_that_cannot_be_backed_up_does_not_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shutil.copyfile(SCHEMAS[0], tmp_path / "tuned.db"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr("os.rename", full)
    with pytest.raises(DatabaseError, match="cannot be backed up before its upgrade: No space left on device"):
        TunedDatabase(path)
    assert path.read_bytes() == before
