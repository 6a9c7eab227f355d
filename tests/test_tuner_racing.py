"""Racing: poor configs are given up, and no good one is, whatever else the machine does. Times are made up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from planting import Planted, impatient, plant, tune_here
from sqlite_utils import Database

from autofuse.cache_db import Trial, TunedDatabase
from autofuse.ops import OPS, Config, Problem, get_op
from autofuse.targets import target_of
from autofuse.tuner import bench
from autofuse.tuner.bench import Bench
from autofuse.tuner.budgets import Effort
from autofuse.tuner.disturbance import Comparison
from autofuse.tuner.failures import CandidateFailed
from autofuse.tuner.isolation import IsolatedBench
from autofuse.tuner.job import Bucket, BucketDone, Event, TrialDone, tune_buckets
from autofuse.tuner.measure import Runner, Timing
from autofuse.tuner.racing import Race, race

CPU = torch.device("cpu")
NORMS = get_op("mla_dual_rms_norm")
EFFORT = Effort(trial_rounds=7, warmup_rounds=2, race_margin=1.1, race_pairs=2)


class Pretended(Runner):
    """Takes what it is told to, round by round, the last one again and again; the first tells its length."""

    def __init__(self, *times_us: float) -> None:
        self._times = itertools.chain(times_us, itertools.repeat(times_us[-1]))
        self.first_us = next(self._times)
        self.rounds = 0

    def _time_us(self) -> float:
        self.rounds += 1
        return next(self._times)


def test_a_poor_config_is_given_up_after_two_pairs() -> None:
    poor, best = Pretended(30.0), Pretended(20.0)
    assert race(poor, best, EFFORT) == Race(Timing((30.0, 30.0)), pruned=True)
    assert (poor.rounds, best.rounds) == (2, 2)


def test_a_good_config_gets_all_its_rounds_and_costs_none_of_the_best() -> None:
    good, best = Pretended(21.9), Pretended(20.0)
    assert race(good, best, EFFORT) == Race(Timing((21.9,) * 7))
    assert (good.rounds, best.rounds) == (9, 0)  # two to warm up


def test_the_first_config_runs_alone() -> None:
    assert race(Pretended(30.0), None, EFFORT) == Race(Timing((30.0,) * 7))


@pytest.mark.parametrize(
    ("config", "best"),
    [
        (Pretended(40.0, 20.0), Pretended(20.0)),  # other work while its length was found
        (Pretended(40.0, 40.0, 20.0), Pretended(20.0)),  # and in the first pair
        (Pretended(40.0, 40.0), Pretended(20.0, 40.0)),  # since then, and for both
    ],
)
def test_a_config_that_other_work_slows_down_is_not_given_up(config: Pretended, best: Pretended) -> None:
    outcome = race(config, best, EFFORT)
    assert not outcome.pruned
    assert len(outcome.timing.rounds_us) == EFFORT.trial_rounds


def test_a_time_that_cannot_be_is_not_hidden_by_a_race() -> None:
    rounds = race(Pretended(40.0, float("nan")), Pretended(20.0), EFFORT).timing.rounds_us
    assert len(rounds) == EFFORT.trial_rounds


def noisy(true_us: float, source: random.Random, burst: Callable[[], float]) -> Pretended:
    return Pretended(*(true_us * source.lognormvariate(0.0, 0.01) * burst() for _ in range(20)))


def test_noise_and_bursts_cost_a_config_that_is_best_its_rounds_less_than_once_in_a_hundred_times() -> None:
    source = random.Random(1)

    def burst() -> float:
        return 2.0 if source.random() < 0.1 else 1.0

    races = [race(noisy(10.0, source, burst), noisy(10.0, source, burst), EFFORT) for _ in range(2000)]
    assert sum(each.pruned for each in races) < 20


# In the job


def norms() -> Problem:
    return NORMS.make_problem(dtype="bf16", q_lora_rank=104, kv_lora_rank=40, cast_before_weight=True)


def tune(database: TunedDatabase, effort: Effort, events: list[Event]) -> list[Any]:
    return tune_buckets([Bucket(norms(), 4)], CPU, database, effort, on_event=events.append)


def rows(database: TunedDatabase) -> list[Trial]:
    return database.trials(target_of(CPU), norms(), 4, NORMS.source_hash("cpu"))


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Each config is twice as slow as the one before; those that somebody raced are collected."""
    tune_here(monkeypatch)
    rivals: list[Config] = []
    times: dict[Config, float] = {}

    def time(self: Bench, config: Config, best: Config | None) -> Race:
        times.setdefault(config, 2.0 ** len(times))
        if best is None:
            return Race(Timing((times[config],) * 7))
        rivals.append(best)
        return Race(Timing((times[config],) * 2), pruned=times[config] > times[best])

    monkeypatch.setattr(Bench, "time", time)
    return rivals


def test_a_pruned_trial_is_kept_and_never_a_finalist(
    raced: list[Config], tiny: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(prepared: Sequence[Runner], rounds: int, seed: int = 0) -> list[Timing]:
        sizes.append(len(prepared))
        return [Timing((1.0,) * rounds) for _ in prepared]

    sizes: list[int] = []
    monkeypatch.setattr(bench, "interleave", pretend)
    events: list[Event] = []
    with TunedDatabase() as database:
        (winner,) = tune(database, tiny, events)
        first, *pruned = trials = rows(database)
        assert [trial.status for trial in trials] == ["ok"] + ["pruned"] * (tiny.trials - 1)
        assert [trial.time_us for trial in trials] == [1.0, 2.0, 4.0, 8.0]
        assert all(trial.error is not None for trial in pruned)
        assert database.failures() == []
        assert list(Database(database.path).view("failures_view").rows) == []
    assert winner.config == first.config
    assert raced == [first.config] * 3
    assert sizes == [4]  # one finalist has none to choose from


def test_a_pruned_trial_is_not_measured_again(raced: list[Config], tiny: Effort) -> None:
    with TunedDatabase() as database:
        tune(database, tiny, [])
        before = rows(database)
        events: list[Event] = []
        tune(database, tiny, events)
        assert rows(database) == before
        tune(database, replace(tiny, trials=6), events)
        again = [event.trial for event in events if isinstance(event, TrialDone)]
    assert len(again) == 2
    assert not {trial.config for trial in again} & {trial.config for trial in before}
    assert set(raced[-2:]) == {before[0].config}  # the best of the job before


def test_where_all_others_fail_in_the_end_the_best_that_was_pruned_is_timed_again(
    raced: list[Config], tiny: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interleave(self: Bench, subjects: Sequence[Any], rounds: int, seed: int) -> Comparison:
        first = raced[0]  # whichever compiled first
        if first in subjects:
            raise CandidateFailed(first, "crashed", "as planned")
        return Comparison((Timing((1.0,) * rounds),) * len(subjects))

    monkeypatch.setattr(Bench, "interleave", interleave)
    events: list[Event] = []
    with TunedDatabase() as database:
        (winner,) = tune(database, tiny, events)
        trials = {trial.config: trial for trial in rows(database)}
    assert trials[raced[0]].status == "crashed"
    assert (trials[winner.config].status, trials[winner.config].time_us) == ("ok", 2.0)
    assert [trial.status for trial in trials.values()].count("pruned") == tiny.trials - 2
    assert isinstance(events[-1], BucketDone)


# In the worker


@pytest.fixture
def planted(edit_kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Planted:
    return plant(edit_kernels, monkeypatch, tmp_path)


def test_whoever_dies_in_a_race_is_timed_once_more_alone(planted: Planted, tiny: Effort) -> None:
    faults = ("spoils the process", "dies in a spoilt process")
    planted.choose(CPU, *faults)
    op = OPS["faulty"]
    spoils, dies = (Config.of(FAULT=planted.names(CPU).index(fault)) for fault in faults)
    problem = Problem("faulty", (("dtype", "fp32"), ("width", 16)))
    with IsolatedBench(CPU, impatient(tiny, 60.0)) as isolated:
        isolated.open(problem, 4, op.source_hash("cpu"))
        first = isolated.time(spoils, None)
        assert not first.pruned
        assert len(isolated.time(dies, spoils).timing.rounds_us) == tiny.trial_rounds
        assert len(isolated.time(dies, spoils).timing.rounds_us) == tiny.trial_rounds
