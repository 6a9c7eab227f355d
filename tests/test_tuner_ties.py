"""Ties: two tunings agree where nothing tells their finalists apart. Times are made up; no kernel runs here."""

from __future__ import annotations

import random
from collections.abc import Sequence

from autofuse.ops import Config, Problem, SearchSpace
from autofuse.ops.space import Tunable
from autofuse.tuner.measure import Timing
from autofuse.tuner.ties import choose, simplicity

SPACE = SearchSpace((Tunable("WARPS", (4, 1, 8), ""), Tunable("UNROLL", (1, 2, 4), ""), Tunable("VEC", (16, 8), "")))
ALL = list(SPACE.configs(Problem("op", (("width", 512),)), 64))
PLAIN, WIDE, UNROLLED, ODD = (
    Config.of(WARPS=4, UNROLL=1, VEC=16),
    Config.of(WARPS=8, UNROLL=1, VEC=16),
    Config.of(WARPS=4, UNROLL=4, VEC=16),
    Config.of(WARPS=1, UNROLL=2, VEC=8),
)


def measured(times_us: Sequence[float], source: random.Random, noise: float, rounds: int = 25) -> list[Timing]:
    """Paired rounds: the machine's clock drifts for all of them, and each has noise of its own."""
    table = []
    for _ in range(rounds):
        drift = source.lognormvariate(0.0, 0.05)
        table.append([time_us * drift * source.lognormvariate(0.0, noise) for time_us in times_us])
    return [Timing(tuple(column)) for column in zip(*table, strict=True)]


def chosen(
    times_us: Sequence[float], seed: int, noise: float = 0.01, tie: float = 0.005, widest_tie: float = 0.015
) -> Config:
    """By a tuning of its own, which has its finalists in an order of its own."""
    source = random.Random(seed)
    order = list(zip((UNROLLED, ODD, PLAIN, WIDE), times_us, strict=True))
    source.shuffle(order)
    timings = measured([time_us for _, time_us in order], source, noise)
    return choose([config for config, _ in order], timings, [SPACE], tie, widest_tie)


def test_simpler_is_nearer_to_the_ordinary_values() -> None:
    ordered = sorted(ALL, key=lambda config: simplicity(SPACE, config))
    assert ordered[0] == PLAIN
    assert ordered.index(WIDE) < ordered.index(ODD)
    assert ordered.index(Config.of(WARPS=4, UNROLL=2, VEC=16)) < ordered.index(UNROLLED)
    assert len({simplicity(SPACE, config) for config in ALL}) == len(ALL)  # so the rule always decides


def test_equally_fast_configs_give_the_simplest_nearly_every_time() -> None:
    assert sum(chosen((10.0, 10.0, 10.0, 10.0), seed) == PLAIN for seed in range(200)) >= 190


def test_a_difference_that_is_clear_beats_simplicity() -> None:
    assert all(chosen((10.0, 10.5, 10.3, 10.5), seed, noise=0.005) == UNROLLED for seed in range(200))


def test_a_difference_that_is_small_but_clear_in_one_process_is_still_a_tie() -> None:
    assert all(chosen((10.0, 10.5, 10.03, 10.5), seed, noise=0.0001) == PLAIN for seed in range(50))
    assert all(chosen((10.0, 10.5, 10.03, 10.5), seed, noise=0.0001, tie=0.0) == UNROLLED for seed in range(50))


def test_what_is_slow_in_most_rounds_ties_with_nothing_however_noisy_that_makes_it() -> None:
    """At one of three addresses the simpler config is as fast; at the others it takes 5 % longer."""
    for places in ((1.0, 1.05, 1.05), (1.05, 1.0, 1.05), (1.05, 1.05, 1.0)):
        source = random.Random(0)
        steady = [10.0 * source.lognormvariate(0.0, 0.001) for _ in range(25)]
        moody = [10.0 * places[round_ % 3] * source.lognormvariate(0.0, 0.001) for round_ in range(25)]
        timings = [Timing(tuple(steady)), Timing(tuple(moody))]
        assert choose([ODD, PLAIN], timings, [SPACE], 0.005, 0.015) == ODD
        assert choose([ODD, PLAIN], timings, [SPACE], 0.005, 0.06) == PLAIN


def test_what_is_simpler_but_slower_beyond_the_noise_stays_out() -> None:
    assert all(chosen((10.0, 10.0, 11.0, 12.0), seed) in (UNROLLED, ODD) for seed in range(50))


def test_the_tunings_of_a_noisy_machine_agree_more_often_than_by_the_fastest_median() -> None:
    def fastest(seed: int) -> Config:
        source = random.Random(seed)
        configs = [UNROLLED, ODD, PLAIN, WIDE]
        timings = measured((10.0, 10.0, 10.01, 10.0), source, 0.02)
        return min(zip(configs, timings, strict=True), key=lambda pair: pair[1].median_us)[0]

    times_us = (10.0, 10.0, 10.01, 10.0)
    by_rule = [chosen(times_us, seed, noise=0.02) for seed in range(100)]
    by_time = [fastest(seed) for seed in range(100)]
    assert by_rule.count(PLAIN) >= 90 > 60 > max(by_time.count(config) for config in by_time)
