"""Kept reports do not pile up for ever, and none goes that a graph in Inductor's cache may soon ask for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from models import isolate

from autofuse.graph import report_store
from autofuse.graph.report import GraphReport
from autofuse.graph.report_store import KEPT_DAYS, SPARED_DAYS, ReportStore

DAY_S = 86400


@pytest.fixture
def store(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)
    return ReportStore()


def kept(store):
    return {path.stem for path in store.folder.glob("[!.]*.json")}


def save(store, key, days_ago=0.0):
    """A report that was used last so many days ago."""
    path = store.folder / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(GraphReport(key, "level=O2").to_json(), encoding="utf-8")
    when = time.time() - days_ago * DAY_S
    os.utime(path, (when, when))
    return path


def test_what_was_not_used_for_long_goes(store):
    for name, days in (("new", 0), ("used", KEPT_DAYS - 1), ("old", KEPT_DAYS + 1)):
        save(store, name, days)
    store.prune()
    assert kept(store) == {"new", "used"}


def test_reading_a_report_keeps_it(store):
    save(store, "read", KEPT_DAYS + 1)
    save(store, "unread", KEPT_DAYS + 1)
    assert store.load("read") is not None
    store.prune()
    assert kept(store) == {"read"}


def test_of_too_many_those_used_least_recently_go(store, monkeypatch):
    for days in range(1, 6):
        save(store, str(days), SPARED_DAYS + days)
    monkeypatch.setattr(report_store, "KEPT_ON_DISK", 3)
    store.prune()
    assert kept(store) == {"1", "2", "3"}


def test_however_many_there_are_those_of_the_last_days_stay(store, monkeypatch):
    for days in (0, 1, SPARED_DAYS - 1, SPARED_DAYS + 1):
        save(store, str(days), days)
    monkeypatch.setattr(report_store, "KEPT_ON_DISK", 0)
    store.prune()
    assert kept(store) == {"0", "1", str(SPARED_DAYS - 1)}


def test_half_written_files_go_once_nobody_can_be_writing_them(store):
    save(store, "report")
    for name, days in ((".old.json", 2), (".now.json", 0)):
        path = store.folder / name
        path.write_text("{", encoding="utf-8")
        os.utime(path, (time.time() - days * DAY_S,) * 2)
    store.prune()
    assert sorted(path.name for path in store.folder.iterdir()) == [".now.json", "report.json"]


def test_a_process_prunes_with_its_first_report_and_now_and_then(store, monkeypatch):
    monkeypatch.setattr(report_store, "_SAVES_PER_PRUNING", 3)
    pruned = []
    for number in range(7):
        save(store, "old", KEPT_DAYS + 1)
        store.save(GraphReport(str(number), "level=O2"))
        pruned.append("old" not in kept(store))
    assert pruned == [True, False, False, True, False, False, True]


def test_two_processes_may_prune_at_once(store, monkeypatch):
    paths = [save(store, str(number), KEPT_DAYS + 1) for number in range(3)]
    unlink = Path.unlink

    def unlinked_by_another(path, *args):
        unlink(path)
        unlink(path, *args)

    monkeypatch.setattr(Path, "unlink", unlinked_by_another)
    store.prune()
    assert not any(path.exists() for path in paths)


def test_a_folder_that_is_not_there_is_no_fault(store):
    store.prune()
    assert store.recent(5) == []


def test_the_most_recent_come_last(store):
    for name, days in (("a", 3), ("b", 1), ("c", 2)):
        save(store, name, days)
    assert [report.key for report in store.recent(2)] == ["c", "b"]
