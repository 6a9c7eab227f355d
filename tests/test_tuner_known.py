"""What the tuner takes for known: what was measured here, with this software, and nothing of others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planting import tune_here

from autofuse.cache_db import TIMED, Trial, TunedDatabase
from autofuse.cache_db.garbage import collect_garbage
from autofuse.ops import Config, Problem, get_op
from autofuse.targets import target_of
from autofuse.tuner.bench import Bench
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import Bucket, BucketDone, Event, TrialDone, known_of, provenance_of, tune_buckets
from autofuse.tuner.known import searched, still_searched

NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=96, kv_lora_rank=40, cast_before_weight=True)
CPU = torch.device("cpu")
HERE = target_of(CPU)
BUCKET = Bucket(PROBLEM, 4)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tune_here(monkeypatch)


def tuned(database: TunedDatabase, effort: Effort) -> list[Config]:
    """Tunes the bucket; the configs that were measured for it."""
    events: list[Event] = []
    tune_buckets([BUCKET], CPU, database, effort, on_event=events.append)
    return [event.trial.config for event in events if isinstance(event, TrialDone)]


def trials(database: TunedDatabase) -> list[Trial]:
    return database.trials(HERE, PROBLEM, BUCKET.tokens, NORMS.source_hash("cpu"))


def test_what_is_trusted_is_measured_here_all_the_same(tiny: Effort) -> None:
    with TunedDatabase() as database:
        configs = tuned(database, tiny)
        winner = database.winner(HERE, PROBLEM, BUCKET.tokens)
        assert winner is not None
        for trial in trials(database):
            database.record_trial(replace(trial, standing="trusted"))
        database.record_winner(replace(winner, standing="trusted", time_us=1e-3))
        assert set(tuned(database, tiny)) == set(configs)
        again = database.winner(HERE, PROBLEM, BUCKET.tokens)
        assert again is not None
        assert again.standing == "own"
        assert again.time_us > 1e-3
        assert {trial.standing for trial in trials(database)} == {"own"}


def test_what_comes_later_from_elsewhere_is_tried_though_all_trials_were_made(tiny: Effort) -> None:
    few = replace(tiny, exhaustive_up_to=1, trials=3)
    with TunedDatabase() as database:
        known = tuned(database, few)
        assert tuned(database, few) == []
        space = NORMS.kernel_source("cpu").space
        new = next(config for config in space.configs(PROBLEM, BUCKET.tokens) if config not in known)
        candidate = replace(trials(database)[0], config=new, time_us=0.5, standing="candidate")
        database.record_trial(candidate)
        assert tuned(database, few) == [new]
        assert tuned(database, few) == []


@pytest.mark.parametrize(
    ("changed", "status", "again"),
    [
        ({"sm_clock_mhz": 345.0}, "launch_error", False),
        ({"driver": "another"}, "launch_error", True),
        ({}, "out_of_memory", True),  # others may have had the memory
    ],
)
def test_a_failure_holds_as_long_as_its_cause_may(changed: dict[str, str | float], status: str, again: bool) -> None:
    present = {**provenance_of(CPU), "sm_clock_mhz": 1980.0}
    config = NORMS.default_config("cpu", PROBLEM, BUCKET.tokens)
    with TunedDatabase() as database:
        then = database.record_provenance({**present, **changed})
        source = NORMS.source_hash("cpu")
        database.record_trial(Trial(HERE, PROBLEM, 4, config, source, status, message="no", provenance=then))
        assert (config not in known_of(database, HERE, BUCKET, present).trials) == again


def test_what_was_timed_in_another_way_is_timed_again(tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    """As what an earlier autofuse timed back to back is, on a GPU."""
    with TunedDatabase() as database:
        configs = tuned(database, tiny)
        assert known_of(database, HERE, BUCKET, provenance_of(CPU)).fresh
        now = {**provenance_of(CPU), TIMED: "in another way"}
        before = known_of(database, HERE, BUCKET, now)
        assert (before.trials, before.fresh) == ({}, False)
        assert {trial.config for trial in before.outdated} == set(configs)
        monkeypatch.setattr("autofuse.tuner.job.provenance_of", lambda device: now)
        again = tuned(database, replace(tiny, exhaustive_up_to=1, trials=3))
        assert {trial.config for trial in trials(database)} == set(again)  # nothing of before is left
        assert set(configs) - set(again)
        after = known_of(database, HERE, BUCKET, now)
        assert (after.fresh, after.outdated) == (True, ())
        assert known_of(database, HERE, BUCKET, provenance_of(CPU)).fresh is False


def test_another_tuners_trial_is_left_alone_where_this_one_is_interrupted(
    tiny: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tuners share a database; the other one finishes a config while this one is at it."""

    def interrupted(bench: Bench, config: Config) -> float:
        key = Trial(HERE, PROBLEM, BUCKET.tokens, config, NORMS.source_hash("cpu"), "ok", time_us=1.0)
        database.record_trial(key)
        raise KeyboardInterrupt

    with TunedDatabase() as database:
        monkeypatch.setattr(Bench, "verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuned(database, tiny)
        assert [(trial.status, trial.time_us) for trial in trials(database)] == [("ok", 1.0)]


def test_rows_of_ops_that_are_not_here_are_no_garbage() -> None:
    mine = Problem("an_op_of_my_own", (("width", 8),))
    with TunedDatabase() as database:
        trial = database.record_trial(Trial(HERE, mine, 4, Config.of(THREADS=1), "abc", "ok", time_us=1.0))
        stale = replace(trial, problem=PROBLEM, source_hash="old")
        database.record_trial(stale)
        assert collect_garbage(database)["trials"] == 1
        assert database.every(Trial) == [trial]


def test_a_bucket_whose_search_came_to_its_end_is_done(tiny: Effort) -> None:
    """However few configs that took. A search of more effort, or a language that is new, is a reason to go on."""
    sources = NORMS.source_hashes("cpu")
    with TunedDatabase() as database:
        tune_buckets([BUCKET], CPU, database, tiny)
        before = known_of(database, HERE, BUCKET, provenance_of(CPU))
        assert before.is_done(tiny, sources, [])
        assert before.is_done(replace(tiny, trials=tiny.trials - 1), sources, list(before.trials))
        assert not before.is_done(replace(tiny, trials=tiny.trials + 1), sources, [])
        assert not before.is_done(replace(tiny, exhaustive_up_to=tiny.exhaustive_up_to + 1), sources, [])
        assert not before.is_done(tiny, [*sources, "of another language"], [])
        assert not before.is_done(tiny, sources, [Config.of(THREADS=99)])


def test_a_bucket_that_is_done_is_not_measured_again_where_its_search_had_trials_left(tiny: Effort) -> None:
    events: list[Event] = []
    settled = replace(tiny, exhaustive_up_to=0, trials=40, fewest_trials=2, settled=10.0, polish=0)
    with TunedDatabase() as database:
        (first,) = tune_buckets([BUCKET], CPU, database, settled)
        count = len(database.trials(HERE, PROBLEM, 4, NORMS.source_hash("cpu")))
        assert count < 40
        (again,) = tune_buckets([BUCKET], CPU, database, settled, on_event=events.append)
        assert again == first
        assert [event.measured for event in events if isinstance(event, BucketDone)] == [False]
        tune_buckets([BUCKET], CPU, database, replace(settled, trials=50), on_event=events.append)
        assert [event.measured for event in events if isinstance(event, BucketDone)] == [False, True]


def test_a_bucket_that_a_budget_cut_short_is_not_done(tiny: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autofuse.tuner.job.FINAL_SHARE", 1.0)  # no time for the search: it ends after one config
    with TunedDatabase() as database:
        (winner,) = tune_buckets([BUCKET], CPU, database, tiny, budget_s=600.0)
        before = known_of(database, HERE, BUCKET, provenance_of(CPU))
        assert before.winner == winner
        assert before.fresh
        assert not before.is_done(tiny, NORMS.source_hashes("cpu"), [])
        assert tuned(database, tiny)


def test_a_winner_that_is_measured_again_here_is_still_of_its_search(tiny: Effort) -> None:
    with TunedDatabase() as database:
        (winner,) = tune_buckets([BUCKET], CPU, database, tiny)
        assert still_searched(database, winner) == searched(tiny, NORMS.source_hashes("cpu"))
        assert still_searched(database, replace(winner, standing="trusted")) == {}
        assert still_searched(database, replace(winner, provenance="")) == {}
