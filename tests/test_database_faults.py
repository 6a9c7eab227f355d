"""A database that cannot be used is one line that says what, where and what to do; and it stays as it was."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import sqlite_utils

from autofuse.cache_db import AbsentDatabaseError, Snapshot, Trial, TunedDatabase, Winner
from autofuse.errors import BadInput, DatabaseError
from autofuse.ops.problem import Config, Problem
from autofuse.targets.base import Target
from stress_db import unprivileged

CPU = Target("cpu", "x86-64-v4", "AMD EPYC 9B14")
PROBLEM = Problem("mla_dual_rms_norm", (("dtype", "bf16"),))
WINNER = Winner(CPU, PROBLEM, 64, Config.of(ROWS=1), "abc", 1.03, 0.02, "compile", 2.15, 2.09, 2.01, 2.16)
TRIAL = Trial(CPU, PROBLEM, 64, Config.of(ROWS=1), "abc", "ok", time_us=1.03)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound database, closed."""
    with TunedDatabase(tmp_path / "tuned.db") as database:
        database.record_winner(WINNER)
    return tmp_path / "tuned.db"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter, with a sound database."""
    with tempfile.TemporaryDirectory(prefix="autofuse-test-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with TunedDatabase(folder / "tuned.db") as database:
            database.record_winner(WINNER)
        yield folder
        folder.chmod(0o755)


def complaint(use: Callable[[], object]) -> str:
    with pytest.raises(DatabaseError) as caught:
        use()
    text = str(caught.value)
    assert "\n" not in text
    assert ";" in text, "it must say what to do"
    return text


def refused(path: Path) -> str:
    """The one complaint of readers and writers about ``path``, which neither changes, nor anything beside it."""
    before = path.read_bytes()
    texts = {
        complaint(lambda: TunedDatabase(path, busy_timeout_s=0.1).winners()),
        complaint(lambda: TunedDatabase(path, read_only=True, busy_timeout_s=0.1).winners()),
        complaint(lambda: Snapshot.load(path, CPU)),
    }
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    (text,) = texts
    assert str(path) in text
    return text


def edit(path: Path, sql: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(sql)


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(AbsentDatabaseError, match=r"tuned\.db does not exist; run `autofuse tune`"):
        TunedDatabase(tmp_path / "tuned.db", read_only=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("read_only", [True, False])
def test_a_folder(tmp_path: Path, read_only: bool) -> None:
    assert "is a folder" in complaint(lambda: TunedDatabase(tmp_path, read_only=read_only))


def test_not_a_regular_file() -> None:
    assert "is not a regular file" in complaint(lambda: TunedDatabase(Path("/dev/null")))


def test_a_folder_that_cannot_be_made(path: Path) -> None:
    assert "cannot be made" in complaint(lambda: TunedDatabase(path / "deeper" / "tuned.db"))


@pytest.mark.parametrize("content", [b"x", b"a note\n" * 15, b"a note\n" * 73, b"a note\n" * 9999])
def test_not_sqlite(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    assert "is not a SQLite database; move it away or set AUTOFUSE_DB" in refused(tmp_path / "notes.txt")


@pytest.mark.parametrize("kept", [512, 3000, 4096, 20000])
def test_cut_short(path: Path, kept: int) -> None:
    os.truncate(path, kept)
    assert "is damaged or cut short" in refused(path)


def test_damaged_inside(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    path.write_bytes(content)
    assert "is damaged or cut short" in refused(path)


def test_another_programs_database(tmp_path: Path) -> None:
    sqlite_utils.Database(tmp_path / "music.db").table("albums").insert({"title": "Kind of Blue"})
    assert "belongs to another program (its tables: albums)" in refused(tmp_path / "music.db")


def test_another_programs_migrations(tmp_path: Path) -> None:
    other = sqlite_utils.Migrations("music")
    other()(lambda db: db.table("albums").create({"title": str}))
    other.apply(sqlite_utils.Database(tmp_path / "music.db"))
    assert "belongs to another program" in refused(tmp_path / "music.db")


def test_a_newer_schema(path: Path) -> None:
    edit(path, "INSERT INTO _sqlite_migrations (migration_set, name) VALUES ('autofuse', 'm999_later')")
    assert "was written by a newer autofuse; upgrade autofuse or set AUTOFUSE_DB" in refused(path)


def test_a_missing_table(path: Path) -> None:
    edit(path, "DROP TABLE winners")
    assert "lacks the table winners" in refused(path)


def test_a_missing_column(path: Path) -> None:
    edit(path, "DROP VIEW winners_view; ALTER TABLE winners DROP COLUMN spread_us")
    assert "lacks the column winners.spread_us" in refused(path)


def test_a_row_edited_by_hand(path: Path) -> None:
    edit(path, "UPDATE winners SET time_us = 'fast'")
    assert "holds a row that autofuse did not write: winner: time_us must be" in complaint(
        lambda: Snapshot.load(path, CPU)
    )


def test_locked_by_another_writer(path: Path) -> None:
    with TunedDatabase(path) as other, TunedDatabase(path, busy_timeout_s=0.1) as database, other.transaction():
        assert "is locked by another process; try again" in complaint(lambda: database.record_winner(WINNER))
        assert len(database.winners()) == 1


@pytest.mark.parametrize("read_only", [True, False])
def test_unreadable(open_folder: Path, read_only: bool) -> None:
    (open_folder / "tuned.db").chmod(0)
    with unprivileged():
        text = complaint(lambda: TunedDatabase(open_folder / "tuned.db", read_only=read_only))
    assert "cannot be read: permission denied" in text


def test_a_read_only_folder_can_be_read_but_not_written(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    with unprivileged():
        assert len(Snapshot.load(open_folder / "tuned.db", CPU).winners) == 1
        assert "read-only" in complaint(lambda: TunedDatabase(open_folder / "tuned.db"))
        assert "read-only" in complaint(lambda: TunedDatabase(open_folder / "other.db"))
    assert [file.name for file in open_folder.iterdir()] == ["tuned.db"]


@pytest.mark.parametrize("suffixes", [["-wal"], ["-wal", "-shm"]])
def test_a_log_that_a_killed_process_left_is_read_in_a_read_only_folder(
    path: Path, open_folder: Path, suffixes: list[str]
) -> None:
    with TunedDatabase(path) as database:
        database.record_winner(replace(WINNER, tokens=1))
        for suffix in ["", *suffixes]:
            shutil.copyfile(f"{path}{suffix}", open_folder / f"crashed.db{suffix}")
    open_folder.chmod(0o555)
    with unprivileged():
        winners = Snapshot.load(open_folder / "crashed.db", CPU).winners
    assert [known.tokens for known in winners] == [1, 64]


@pytest.mark.parametrize("read_only", [True, False])
def test_a_journal_that_a_killed_process_left_is_rolled_back(path: Path, tmp_path: Path, read_only: bool) -> None:
    crashed = tmp_path / "crashed" / "tuned.db"
    crashed.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.executescript("PRAGMA journal_mode = DELETE; PRAGMA cache_size = 1; BEGIN; DELETE FROM winners")
        for number in range(500):  # more than is held in memory: the file itself is half written now
            writer.execute("INSERT INTO problems VALUES (?, 'op', ?)", [f"op(n={number})", "x" * 1000])
        for suffix in ("", "-journal"):
            shutil.copyfile(f"{path}{suffix}", f"{crashed}{suffix}")
    before = crashed.read_bytes()
    with TunedDatabase(crashed, read_only=read_only) as database:
        assert database.winners() != []
    assert (crashed.read_bytes() == before) == read_only


def test_a_full_disk_loses_nothing_recorded_before(path: Path) -> None:
    with TunedDatabase(path) as database:
        database._db.execute("PRAGMA max_page_count = 1")
        trials = (replace(TRIAL, config=Config.of(ROWS=row), message="x" * 5000) for row in range(9))
        assert "the disk is full; free some space" in complaint(lambda: [database.record_trial(t) for t in trials])
        assert len(database.winners()) == 1


def test_removed_while_in_use(path: Path) -> None:
    with TunedDatabase(path) as database:
        path.unlink()
        assert "was removed or replaced" in complaint(lambda: database.record_winner(WINNER))


def test_a_provenance_that_was_never_recorded(path: Path) -> None:
    with TunedDatabase(path) as database:
        text = complaint(lambda: database.record_winner(replace(WINNER, provenance="feed")))
        assert "call record_provenance" in text
        assert "holds no provenance 'feed'" in complaint(lambda: database.provenance("feed"))


def test_used_after_closing(path: Path) -> None:
    database = TunedDatabase(path)
    database.close()
    database.close()
    assert "closed database" in complaint(database.winners)


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    (tmp_path / "tuned.db").touch()
    assert Snapshot.load(tmp_path / "tuned.db", CPU).winners == ()
    with TunedDatabase(tmp_path / "tuned.db") as database:
        database.record_winner(WINNER)
    assert Snapshot.load(tmp_path / "tuned.db", CPU).winners != ()


@pytest.mark.parametrize("name", ["a b.db", "a?b.db", "a#b.db", "100%.db", "ä.db"])
def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    with TunedDatabase(tmp_path / name) as database:
        database.record_winner(WINNER)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert len(Snapshot.load(tmp_path / name, CPU).winners) == 1


def test_names_that_would_not_read_back_are_refused() -> None:
    for changes in ({"target": Target("cpu", "a:b", "c")}, {"config": Config((("ROWS", True),))}):
        with pytest.raises(BadInput, match=r"does not read back|must be given once"):
            replace(WINNER, **changes)
