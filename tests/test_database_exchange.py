"""Measurements travel between machines whole, and nothing malformed gets in."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autofuse.cache_db import (
    Baseline,
    Captured,
    Trial,
    TunedDatabase,
    Winner,
    export_database,
    import_into,
)
from autofuse.errors import AutofuseError, BadInput, DatabaseError
from autofuse.ops import get_op
from autofuse.targets.base import Target

CPU = Target("cpu", "x86-64-v4", "AMD EPYC 9B14")
H200 = Target("cuda", "sm_90a", "NVIDIA H200")
OP = get_op("mla_dual_rms_norm")
PROBLEM = OP.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
CONFIGS = {kind: [*OP.kernel_source(kind).space.configs(PROBLEM, 64)][:2] for kind in ("cuda", "cpu")}
HERE = OP.source_hash("cuda")
BEST, OTHER = CONFIGS["cuda"]
OLD, NEW = "2026-01-31T12:00:00Z", "2026-02-01T12:00:00Z"
TRIAL = Trial(H200, PROBLEM, 64, BEST, HERE, "ok", time_us=1.03, error=0.2, measured_at=OLD)
WRONG = replace(TRIAL, config=OTHER, status="wrong", message='µs\n"x"', time_us=None, error=float("inf"))
BASELINE = Baseline(H200, PROBLEM, 64, "compile", 2.15, 0.1, measured_at=OLD)
WINNER = Winner(H200, PROBLEM, 64, BEST, HERE, 1.03, 0.02, "compile", 2.15, 2.09, 2.01, 2.16, "", OLD)
FORMATS = pytest.mark.parametrize("name", ["tuned.jsonl", "tuned-export.db"])


def on(target: Target, record: Any) -> Any:
    """``record`` as it would be of another target: with its kernel's source and a config of its space."""
    if isinstance(record, Baseline):
        return replace(record, target=target)
    config = CONFIGS[target.kind][CONFIGS["cuda"].index(record.config)]
    return replace(record, target=target, source_hash=OP.source_hash(target.kind), config=config)


@pytest.fixture
def here(tmp_path: Path) -> TunedDatabase:
    """A database with something of everything, for two targets."""
    database = TunedDatabase(tmp_path / "here" / "tuned.db")
    provenance = database.record_provenance({"driver": "580.65", "power_cap_w": 700})
    for target in (H200, CPU):
        for record in (TRIAL, WRONG, BASELINE, WINNER):
            database.record(replace(on(target, record), provenance=provenance))
        database.record_captured(Captured(target, PROBLEM, 1, 4096))
    return database


@pytest.fixture
def there(tmp_path: Path) -> TunedDatabase:
    """An empty database of another machine."""
    return TunedDatabase(tmp_path / "there" / "tuned.db")


def content(database: TunedDatabase) -> list[object]:
    kinds = (Trial, Baseline, Winner)
    records: list[Any] = [replace(r, standing="own") for kind in kinds for r in database.every(kind)]
    return [*database.targets(), *records, *(database.provenance(record.provenance) for record in records)]


@FORMATS
def test_an_import_gives_what_was_exported(
    here: TunedDatabase, there: TunedDatabase, tmp_path: Path, name: str
) -> None:
    exported = export_database(here, tmp_path / name)
    assert exported.counts == {"trials": 4, "baselines": 2, "winners": 2}
    imported = import_into(there, tmp_path / name, trust=True)
    assert imported.new == exported.counts
    assert {winner.standing for winner in there.winners()} == {"trusted"}
    assert content(there) == content(here)
    assert there.digest(H200) == here.digest(H200)
    assert there.captured() == []


@FORMATS
def test_importing_twice_changes_nothing(here: TunedDatabase, there: TunedDatabase, tmp_path: Path, name: str) -> None:
    export_database(here, tmp_path / name)
    import_into(there, tmp_path / name)
    again = import_into(there, tmp_path / name)
    assert again.kept == {"trials": 4, "baselines": 2, "winners": 2}
    assert not any((*again.new.values(), *again.replaced.values()))


def test_a_database_itself_can_be_imported(here: TunedDatabase, there: TunedDatabase) -> None:
    import_into(there, here.path, trust=True)
    assert content(there) == content(here)


def test_one_target_or_op_alone_can_be_exported(here: TunedDatabase, tmp_path: Path) -> None:
    assert export_database(here, tmp_path / "cpu.jsonl", targets=[CPU]).counts["winners"] == 1
    assert export_database(here, tmp_path / "rope.jsonl", op="rope_kv_cache").counts["winners"] == 0


@FORMATS
def test_equal_content_gives_equal_bytes(here: TunedDatabase, there: TunedDatabase, tmp_path: Path, name: str) -> None:
    first = export_database(here, tmp_path / f"first-{name}").path
    for time_us in (5.0, 1.03):  # one has a past that the other has not
        there.record_winner(replace(WINNER, time_us=time_us, measured_at="2025-01-01T00:00:00Z"))
    import_into(there, first, trust=True)
    there.record(next(r for r in here.winners(H200)))
    time.sleep(1.1)  # when an export was made is not its content
    second = export_database(there, tmp_path / f"second-{name}").path
    assert first.read_bytes() == second.read_bytes()


def test_an_exported_database_is_one_plain_file(here: TunedDatabase, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    exported = export_database(here, tmp_path / "out" / "tuned.db").path
    assert [file.name for file in exported.parent.iterdir()] == ["tuned.db"]
    with closing(sqlite3.connect(exported)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


@pytest.mark.parametrize(("theirs", "outcome"), [(OLD, "kept"), (NEW, "replaced"), ("2025-12-31T00:00:00Z", "kept")])
def test_of_two_trusted_measurements_the_later_one_stays(
    here: TunedDatabase, there: TunedDatabase, tmp_path: Path, theirs: str, outcome: str
) -> None:
    here.record_winner(replace(WINNER, time_us=9.0, measured_at=theirs))
    there.record_winner(replace(WINNER, standing="trusted"))
    done = import_into(there, export_database(here, tmp_path / "tuned.jsonl", targets=[H200]).path, trust=True)
    assert getattr(done, outcome)["winners"] == 1
    known = there.winner(H200, PROBLEM, 64)
    assert known is not None
    assert (known.time_us == 9.0) == (outcome == "replaced")


@FORMATS
def test_an_export_overwrites_only_when_asked(here: TunedDatabase, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(BadInput, match="it exists; name another file or ask to overwrite it"):
        export_database(here, tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"
    export_database(here, tmp_path / name, overwrite=True)
    assert (tmp_path / name).stat().st_size > 1000


def test_an_export_to_nowhere_is_refused(here: TunedDatabase, tmp_path: Path) -> None:
    refusals = {
        tmp_path / "absent" / "tuned.jsonl": "its folder does not exist",
        tmp_path / "here": "it is a folder",
        here.path: "onto itself",
    }
    for destination, reason in refusals.items():
        with pytest.raises(BadInput, match=reason):
            export_database(here, destination, overwrite=True)


def test_an_export_does_not_replace_a_database_in_use(here: TunedDatabase, there: TunedDatabase) -> None:
    there.record_winner(WINNER)
    with pytest.raises(BadInput, match="in use"):
        export_database(here, there.path, overwrite=True)
    assert there.winners() == [WINNER]


def test_an_interrupted_export_leaves_nothing(
    here: TunedDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    for name in ("tuned.jsonl", "tuned.db"):
        with pytest.raises(KeyboardInterrupt):
            export_database(here, tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["here"]


Edit = Callable[[list[str]], object]


def edit(number: int, **changes: Any) -> Edit:
    """Changes columns of line ``number``; None removes one."""

    def change(lines: list[str]) -> None:
        row = {**json.loads(lines[number - 1]), **changes}
        lines[number - 1] = json.dumps({name: value for name, value in row.items() if value is not ...})

    return change


# Lines of the export: 1 header, 2 provenance, 3–4 trials, 5 baseline, 6 winner.
MALFORMED: dict[str, tuple[int, Edit, str]] = {
    "empty": (0, lambda lines: lines.clear(), "the file is empty"),
    "no header": (1, lambda lines: lines.pop(0), "not the header"),
    "newer format": (1, edit(1, version=2), "upgrade autofuse"),
    "not JSON": (3, lambda lines: lines.insert(2, "{"), "not valid JSON"),
    "not an object": (3, lambda lines: lines.insert(2, "[1]"), "not an object"),
    "too deep": (3, lambda lines: lines.insert(2, "[" * 100_000), "not valid JSON"),
    "number too long": (3, lambda lines: lines.insert(2, "1" * 5000), "not valid JSON"),
    "unknown table": (3, edit(3, table="sqlite_master"), "unknown table"),
    "a column too few": (3, edit(3, tokens=...), "misses tokens"),
    "a column too many": (3, edit(3, note="hi"), "has the unknown note"),
    "a text for a time": (3, edit(3, time_us="fast"), "time_us must be"),
    "SQL for a time": (3, edit(3, time_us="1); DROP TABLE trials"), "is an SQL statement"),
    "a flag for a count": (3, edit(3, tokens=True), "tokens must be"),
    "a count too large": (3, edit(3, tokens=2**64), "tokens must be"),
    "an infinite time": (5, lambda lines: lines.__setitem__(4, lines[4].replace("2.15", "1e999")), "time_us must be"),
    "not a number": (5, lambda lines: lines.__setitem__(4, lines[4].replace("2.15", "NaN")), "NaN is not a number"),
    "a negative time": (5, edit(5, time_us=-2.15), "time_us must be"),
    "an unknown status": (3, edit(3, status="great"), "status must be one of"),
    "a target without a device": (6, edit(6, target="cuda:sm_90a"), "target 'cuda:sm_90a'"),
    "a problem that is none": (6, edit(6, problem="all of them"), "problem 'all of them'"),
    "a config that is none": (6, edit(6, config="ROWS=__import__('os')"), "config"),
    "a config out of order": (6, edit(6, config="ROWS=1,PDL=1"), "canonical form"),
    "control characters": (6, edit(6, target="cuda:sm_90a:\x1b[2J"), "does not read back"),
    "a line too long": (3, edit(3, message="x" * (1 << 20)), "the line is longer than"),
    "a text too long": (3, edit(3, message="x" * 20_000), "is longer than any that autofuse writes"),
    "a gain outside sense": (6, edit(6, gain_low=3.0), "gain_low 3 is above gain_high"),
    "a time that is none": (6, edit(6, measured_at="yesterday"), "measured_at must be"),
    "no time": (6, edit(6, measured_at=""), "measured_at is empty"),
    "a time to come": (6, edit(6, measured_at="2999-01-01T00:00:00Z"), "in the future"),
    "the same key twice": (7, lambda lines: lines.append(lines[5]), "the same key as line 6"),
    "provenance of other content": (2, edit(2, fields={"driver": "999"}), "not the id of its fields"),
    "provenance that is nested": (2, edit(2, fields={"driver": [1]}), "must be text, a number or None"),
    "provenance that is missing": (5, lambda lines: lines.pop(1), "which the file does not hold"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_named_and_nothing_is_imported(
    here: TunedDatabase, there: TunedDatabase, tmp_path: Path, case: str
) -> None:
    line, spoil, reason = MALFORMED[case]
    path = export_database(here, tmp_path / "tuned.jsonl", targets=[H200]).path
    lines = path.read_text().splitlines()
    spoil(lines)
    path.write_text("".join(f"{text}\n" for text in lines))
    with pytest.raises(BadInput) as caught:
        import_into(there, path)
    assert f"{path}, line {line}:" in str(caught.value)
    assert reason in str(caught.value)
    assert there.targets() == []


def test_bytes_that_are_no_text_are_refused(there: TunedDatabase, tmp_path: Path) -> None:
    (tmp_path / "tuned.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(BadInput, match="line 1: not valid JSON"):
        import_into(there, tmp_path / "tuned.jsonl")


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("UPDATE winners SET gain = 'huge'", "gain must be"),
        ("UPDATE winners SET measured_at = '2999-01-01T00:00:00Z'", "in the future"),
        ("UPDATE provenance SET fields = '{}'", "not the id of its fields"),
        ("UPDATE provenance SET fields = '[1]'", "not the id of its fields"),
        ("DROP TABLE trials", "lacks the table trials"),
    ],
)
def test_a_malformed_database_is_refused_whole(
    here: TunedDatabase, there: TunedDatabase, tmp_path: Path, sql: str, reason: str
) -> None:
    path = export_database(here, tmp_path / "tuned.db").path
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(sql)
    with pytest.raises(AutofuseError, match=reason) as caught:
        import_into(there, path)
    assert str(path) in str(caught.value)
    assert there.targets() == []


def test_what_is_no_export_is_refused(here: TunedDatabase, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes\n" * 200)
    with pytest.raises(DatabaseError, match="is not a SQLite database"):
        import_into(here, tmp_path / "notes.txt")
    with pytest.raises(BadInput, match="there is no such file"):
        import_into(here, tmp_path / "absent.jsonl")
    with pytest.raises(BadInput, match="into itself"):
        import_into(here, here.path)
