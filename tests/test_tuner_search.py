"""Search: reproducible, inside the space, and never the same config twice. No kernel runs here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from autofuse.errors import BadInput
from autofuse.ops import Config, get_op
from autofuse.tuner.budgets import EFFORTS, Effort, effort
from autofuse.tuner.measure import Timing, gain
from autofuse.tuner.sampler import Described
from autofuse.tuner.search import ExhaustiveSearch, ModelSearch, Search, grid_size, search_in

NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
SPACE = NORMS.kernel_source("cuda").space
TOKENS = 1024
SIZE = sum(1 for _ in SPACE.configs(PROBLEM, TOKENS))
EFFORT = Effort(trials=40, settled=0.0, startup_trials=10, batch=4)


def pretended_time(config: Config) -> float:
    """A landscape with one best corner, in µs."""
    return 1.0 + abs(config["ROWS"] - 2) + abs(config["Q_WARPS"] - 3) + (16 - config["VEC_BYTES"]) / 4


def new_search(known: Mapping[Config, float | None] | None = None, seed: int = 0, effort: Effort = EFFORT) -> Search:
    default = NORMS.default_config("cuda", PROBLEM, TOKENS)
    return search_in(SPACE, PROBLEM, TOKENS, known or {}, [default], effort, seed)


def run(search: Search) -> dict[Config, float]:
    times: dict[Config, float] = {}
    for batch in search.batches():
        for config in batch:
            assert config not in times, "proposed twice"
            times[config] = pretended_time(config)
            search.tell(config, times[config])
    return times


def test_a_large_space_is_searched_by_a_model_and_a_small_one_whole() -> None:
    assert isinstance(new_search(), ModelSearch)
    assert isinstance(new_search(effort=EFFORTS["exhaustive"]), ExhaustiveSearch)


def test_the_same_seed_proposes_the_same_configs() -> None:
    assert list(run(new_search(seed=7))) == list(run(new_search(seed=7)))
    assert list(run(new_search(seed=7))) != list(run(new_search(seed=8)))


def test_the_default_config_is_measured_first() -> None:
    assert next(iter(run(new_search()))) == NORMS.default_config("cuda", PROBLEM, TOKENS)


def test_every_proposal_is_a_point_of_the_space() -> None:
    times = run(new_search())
    assert len(times) == EFFORT.trials
    assert [SPACE.refusal(config, PROBLEM, TOKENS) for config in times] == [None] * EFFORT.trials


def test_a_resumed_search_proposes_only_what_is_left() -> None:
    first = dict(list(run(new_search()).items())[:15])
    rest = run(new_search(known=first))
    assert len(rest) == EFFORT.trials - 15
    assert not rest.keys() & first.keys()
    assert run(new_search(known=first | rest)) == {}


def test_failed_configs_are_not_proposed_again() -> None:
    failed = dict.fromkeys(list(run(new_search()))[:10])
    assert not run(new_search(known=failed)).keys() & failed.keys()


def test_an_exhaustive_search_proposes_every_config_that_is_not_known() -> None:
    everything = list(SPACE.configs(PROBLEM, 1))
    known = dict.fromkeys(everything[:3], 1.0)
    search = search_in(SPACE, PROBLEM, 1, known, [], replace(EFFORT, exhaustive_up_to=len(everything)), 0)
    assert search.total == len(everything) - 3
    assert list(run(search)) == everything[3:]


def test_a_model_finds_the_best_corner_sooner_than_chance() -> None:
    best = sorted(run(new_search(effort=replace(EFFORT, trials=80))).values())[:5]
    assert best == [1.0] * 5


def test_it_ends_when_nothing_is_expected_to_be_faster_and_not_before_the_fewest_trials() -> None:
    patient = replace(EFFORT, trials=400, fewest_trials=60, settled=0.01)
    times = run(new_search(effort=patient))
    assert min(times.values()) == 1.0
    assert 60 <= len(times) < 200
    known = dict(list(times.items())[:70])
    assert len(run(new_search(known=known, effort=patient))) < 130  # what is known counts


def test_a_config_that_failed_keeps_the_search_away_from_what_is_like_it() -> None:
    search, failures = new_search(effort=replace(EFFORT, trials=80)), 0
    for batch in search.batches():
        for config in batch:
            failed = config["VEC_BYTES"] != 16
            failures += failed
            search.tell(config, None if failed else pretended_time(config))
    share = sum(config["VEC_BYTES"] != 16 for config in SPACE.configs(PROBLEM, TOKENS)) / SIZE
    assert failures / 80 < share / 2


def test_configs_of_a_batch_are_not_all_alike() -> None:
    """What is still running is believed to be as fast as the model says, so the next proposal is elsewhere."""
    search, apart = new_search(effort=replace(EFFORT, trials=60)), []
    for batch in search.batches():
        assert len(set(batch)) == len(batch)
        apart.append(max(sum(one[name] != other[name] for name in one) for one in batch for other in batch))
        for config in batch:
            search.tell(config, pretended_time(config))
    assert sum(apart[3:]) / len(apart[3:]) >= 2


def test_what_is_tried_first_is_tried_even_by_a_search_that_was_nearly_done() -> None:
    known = dict(list(run(new_search(seed=3)).items())[:36])
    best_elsewhere = next(config for config in SPACE.configs(PROBLEM, TOKENS) if config not in known)
    search = search_in(SPACE, PROBLEM, TOKENS, known, [best_elsewhere], EFFORT, 0)
    assert next(iter(run(search))) == best_elsewhere


def test_the_model_is_told_what_a_launch_comes_to() -> None:
    described = grid_size(NORMS, PROBLEM, TOKENS)
    config = NORMS.default_config("cuda", PROBLEM, TOKENS)
    assert 2 ** described(config)[0] == pytest.approx(NORMS.launch_shape(PROBLEM, config).blocks(TOKENS))

    def seen(described: Described | None) -> list[Config]:
        search = ModelSearch(SPACE, PROBLEM, TOKENS, {}, [config], EFFORT, seed=0, described=described)
        return list(run(search))

    told, untold = seen(described), seen(None)
    assert told == seen(described)
    random = EFFORT.startup_trials
    assert told[:random] == untold[:random]
    assert told != untold


def test_no_blocks_are_as_many_as_one() -> None:
    described = grid_size(NORMS, PROBLEM, 0)
    assert described(NORMS.default_config("cuda", PROBLEM, 1)) == (0.0,)


def test_a_search_does_not_stop_before_it_has_measured_enough_or_everything() -> None:
    space = NORMS.kernel_source("cpu").space
    small = list(space.configs(PROBLEM, 4))
    for trials in (3, len(small) // 2, len(small) + 10):
        search = ModelSearch(space, PROBLEM, 4, {}, [], replace(EFFORT, trials=trials, startup_trials=2), seed=0)
        proposed = [config for batch in search.batches() for config in batch if not search.tell(config, 1.0)]
        assert len(proposed) == search.total == min(trials, len(small))


def test_a_search_ends_sooner_where_something_else_is_known_to_be_much_faster() -> None:
    patient = replace(EFFORT, trials=200, fewest_trials=20, settled=0.001)
    search = new_search(effort=patient)
    search.hear(0.01)
    assert 20 <= len(run(search)) < 30 < len(run(new_search(effort=patient)))


def test_a_search_ends_with_configs_that_are_like_the_best_but_for_one_tunable() -> None:
    search = new_search(effort=replace(EFFORT, trials=40, polish=8, batch=1))
    times: dict[Config, float] = {}
    for (config,) in search.batches():
        if len(times) >= 32:
            best = min(times, key=times.__getitem__)
            assert sum(config[name] != best[name] for name in config) == 1
        times[config] = pretended_time(config)
        search.tell(config, times[config])
    assert len(times) == search.total == 40


def test_what_is_much_slower_than_something_else_is_not_polished() -> None:
    patient = replace(EFFORT, trials=200, fewest_trials=20, settled=0.001, polish=50)
    search = new_search(effort=patient)
    search.hear(0.01)
    assert len(run(search)) < 30


def test_a_search_that_has_settled_and_does_not_polish_measures_nothing_when_repeated() -> None:
    patient = replace(EFFORT, trials=200, fewest_trials=20, settled=0.001, polish=0)
    known = run(new_search(effort=patient))
    assert len(known) < 200
    assert run(new_search(known, effort=patient)) == {}


def test_unknown_efforts_are_refused() -> None:
    with pytest.raises(BadInput, match="effort 'huge' is none of quick, default, exhaustive"):
        effort("huge")


def test_the_gain_is_the_median_of_paired_rounds_and_its_interval_spans_the_noise() -> None:
    candidate = Timing((1.0,) * 25)
    steady = gain(Timing((2.0,) * 25), candidate)
    assert (steady.low, steady.median, steady.high) == (2.0, 2.0, 2.0)
    noisy = gain(Timing(tuple(2.0 + 0.1 * (i % 5 - 2) for i in range(25))), candidate)
    assert noisy.low < noisy.median == 2.0 < noisy.high


def test_a_gain_of_few_rounds_spans_all_of_them() -> None:
    few = gain(Timing((1.0, 2.0, 3.0)), Timing((1.0, 1.0, 1.0)))
    assert (few.low, few.median, few.high) == (1.0, 2.0, 3.0)
