"""Searches that are compared: ours, random, grid, and optuna's samplers. Each gives its configs in order, each once."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from autofuse.ops import OPS, Config
from autofuse.targets import Target
from autofuse.tuner.budgets import Effort
from autofuse.tuner.search import ModelSearch, grid_size
from search.recorded import Recorded

__all__ = ["OPTUNA", "SIMPLE", "Strategy"]

Strategy = Callable[[Recorded, int, int], Iterator[Config]]
"""(space, most trials, seed) → the configs in the order in which they would be measured."""

_ASKS = 40  # that may repeat, or miss the constraints, for one config that counts; then one is drawn at random


def autofuse(recorded: Recorded, trials: int, seed: int) -> Iterator[Config]:
    """Our search as a tuning with an empty database does it."""
    yield from _ours(recorded, trials, seed, _first_configs(recorded))


def without_default(recorded: Recorded, trials: int, seed: int) -> Iterator[Config]:
    """The same, but that it is told neither the op's default config nor its guess: what the others know."""
    yield from _ours(recorded, trials, seed, [])


def _first_configs(recorded: Recorded) -> list[Config]:
    """The default, and what the op takes for likely fast, where that was measured."""
    kind = Target.parse(recorded.target).kind
    kernels = OPS[recorded.problem.op].kernel_sources(kind) if recorded.problem.op in OPS else ()
    likely = [config for kernel in kernels for config in kernel.first_configs(recorded.problem, recorded.tokens)]
    return [recorded.default, *(config for config in likely if config in recorded.outcomes)]


def _ours(recorded: Recorded, trials: int, seed: int, first: list[Config]) -> Iterator[Config]:
    effort = replace(Effort(), trials=trials)
    problem, tokens = recorded.problem, recorded.tokens
    op = OPS.get(problem.op)  # None for a space that was made up
    described = grid_size(op, problem, tokens) if op else None
    search = ModelSearch(recorded.space, problem, tokens, {}, first, effort, seed, described=described)
    for batch in search.batches():
        for config in batch:
            yield config
            search.tell(config, recorded.times.get(config))


def at_random(recorded: Recorded, trials: int, seed: int) -> Iterator[Config]:
    yield from random.Random(seed).sample(list(recorded.outcomes), min(trials, len(recorded.outcomes)))


def grid(recorded: Recorded, trials: int, seed: int) -> Iterator[Config]:
    """The space's order, from a random place on."""
    configs = list(recorded.outcomes)
    start = random.Random(seed).randrange(len(configs))
    yield from (configs[start:] + configs[:start])[:trials]


def _sampled(make: Callable[[int], optuna.samplers.BaseSampler], *, ordinal: bool = False) -> Strategy:
    """optuna's ask and tell.

    Args: ordinal: tunables are places in the order of their values, for samplers that have no categories.
    """

    def strategy(recorded: Recorded, trials: int, seed: int) -> Iterator[Config]:
        distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(values) - 1) if ordinal else CategoricalDistribution(values)
            for name, values in recorded.tunables.items()
        }
        places = {name: sorted(values) for name, values in recorded.tunables.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some samplers are experimental
            study = optuna.create_study(sampler=make(seed))
        seen: set[Config] = set()
        left = list(recorded.outcomes)
        random.Random(seed).shuffle(left)

        def tell(trial: optuna.trial.Trial, config: Config) -> None:
            time_us = recorded.times.get(config)
            if time_us is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, time_us)

        while len(seen) < min(trials, len(recorded.outcomes)):
            for _ in range(_ASKS):
                trial = study.ask(distributions)
                config = Config.of(
                    {name: places[name][value] if ordinal else value for name, value in trial.params.items()}
                )
                if config in recorded.outcomes and config not in seen:
                    seen.add(config)
                    yield config
                    tell(trial, config)
                    break
                tell(trial, config)
            else:
                config = next(each for each in left if each not in seen)
                seen.add(config)
                yield config

    return strategy


SIMPLE: dict[str, Strategy] = {
    "autofuse": autofuse,
    "autofuse without default": without_default,
    "random": at_random,
    "grid": grid,
}

OPTUNA: dict[str, Strategy] = {
    "optuna TPE": _sampled(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "optuna TPE multivariate": _sampled(lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True)),
    "optuna GP": _sampled(lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "optuna CMA-ES": _sampled(lambda seed: optuna.samplers.CmaEsSampler(seed=seed), ordinal=True),
    "optuna QMC": _sampled(lambda seed: optuna.samplers.QMCSampler(seed=seed), ordinal=True),
    "optuna NSGA-II": _sampled(lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=10)),
    "optuna NSGA-III": _sampled(lambda seed: optuna.samplers.NSGAIIISampler(seed=seed, population_size=10)),
    "optuna brute force": _sampled(lambda seed: optuna.samplers.BruteForceSampler(seed=seed)),
}
"""Those that search one objective in a discrete space. GP needs scipy, CMA-ES the package cmaes, QMC scipy."""
