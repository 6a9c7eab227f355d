"""Replaying searches on recorded spaces. Times are made up; no kernel runs here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from autofuse.errors import BadInput
from autofuse.ops import Config, Problem
from bench_search import added, chosen, loaded, markdown, trials_to_near
from search.recorded import Outcome, Recorded
from search.strategies import OPTUNA, SIMPLE

PROBLEM = Problem("op", (("width", 512),))
TUNABLES = {"WARPS": (4, 1, 2, 8), "UNROLL": (1, 2, 4), "VEC": (16, 8, 4)}


def outcome(config: Config) -> Outcome:
    if config["WARPS"] == 8 and config["VEC"] == 4:
        return "crashed"
    return 10.0 + abs(config["WARPS"] - 2) + config["UNROLL"] + 16 / config["VEC"]


def space() -> Recorded:
    every = [Config.of(WARPS=w, UNROLL=u, VEC=v) for w in (4, 1, 2, 8) for u in (1, 2, 4) for v in (16, 8, 4)]
    valid = [config for config in every if config["WARPS"] * config["UNROLL"] <= 16]
    return Recorded("cpu:a:b", PROBLEM, 64, TUNABLES, every[0], 40, {c: outcome(c) for c in valid}, {"host": "x"})


def test_a_recorded_space_reads_back_as_it_was(tmp_path: Path) -> None:
    space().save(tmp_path / "cpu" / "op_T64.json")
    assert loaded([tmp_path]) == [space()]
    assert space().best_us == 12.0


def test_a_file_that_is_no_space_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"target": "x"}')
    with pytest.raises(BadInput, match=r"a\.json is no recorded space: KeyError"):
        loaded([tmp_path])
    with pytest.raises(BadInput, match="no spaces in"):
        loaded([tmp_path / "nowhere"][:0])


@pytest.mark.parametrize("name", [*SIMPLE, "optuna TPE", "optuna NSGA-II", "optuna brute force"])
def test_every_search_proposes_points_of_the_space_each_once(name: str) -> None:
    recorded = space()
    configs = list({**SIMPLE, **OPTUNA}[name](recorded, 12, 3))
    assert len(configs) == len(set(configs)) == 12
    assert set(configs) <= recorded.outcomes.keys()


def test_trials_are_counted_until_one_is_near_the_best() -> None:
    recorded = space()
    order = sorted(recorded.times, key=recorded.times.__getitem__, reverse=True)
    best = order[-1]
    order.insert(4, best)
    assert trials_to_near(recorded, lambda *_: iter(order), 20, 0) == 5
    assert trials_to_near(recorded, lambda *_: iter(order), 4, 0) == math.inf


def test_an_unknown_strategy_is_refused() -> None:
    assert list(chosen("random, autofuse")) == ["random", "autofuse"]
    with pytest.raises(BadInput, match="strategy 'luck' is none of autofuse, "):
        chosen("luck")


def test_rows_of_other_searches_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    row = {"target": "gpu", "problem": "op()", "space": "op T=4", "strategy": "luck", "median_trials": 9}
    path.write_text(json.dumps(added([row, {**row, "strategy": "random"}], path)))
    again = added([{**row, "median_trials": 7}], path)
    assert [(each["strategy"], each["median_trials"]) for each in again] == [("luck", 7), ("random", 9)]


def test_the_table_says_where_not_every_seed_got_there() -> None:
    recorded = space()
    row = {"target": recorded.target, "space": recorded.name, "problem": str(recorded.problem)}
    row |= {"seeds": 3, "trials": 12}
    found = {**row, "strategy": "luck", "median_trials": 5, "reached": 1.0}
    missed = {**row, "strategy": "grid", "median_trials": None, "reached": 1 / 3}
    elsewhere = {**found, "target": "cpu:x86-64-v4:another", "median_trials": 6}
    header, _, line = markdown([found, missed, elsewhere], [recorded]).splitlines()
    assert header.endswith("| luck, 3 seeds | grid, 3 seeds |")
    assert line.endswith("| 5 | > 12 (33%) |")
