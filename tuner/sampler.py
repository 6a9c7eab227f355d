"""An optuna sampler for finite spaces with constraints: Bayesian optimisation over a list of configs.

optuna's own samplers draw each tunable by itself: what they propose may break a constraint or be known already, and is
asked again. Here all configs that are allowed are enumerated (there are some thousands), a Gaussian process learns the
logarithm of the times, and the config with the largest expected improvement is proposed, each once. A config is a point
whose coordinates are its tunables and whatever else is told of it: that twice the rows in half the warps make the same
number of blocks is not to be seen from the tunables. Every third time it is the config that would be the fastest if all
went as well as may be: a model that is too sure of itself would never look elsewhere. On request, it is one that is
like the best but for one tunable: where times change abruptly, the model cannot tell which of these are faster.
Proposals that are still running are taken to be as fast as the process believes, and so several can be asked for at a
time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from autofuse.ops import Config
from autofuse.tuner.gaussian_process import GaussianProcess, Points, Posterior

__all__ = ["ConfigSampler", "Described"]

Described = Callable[[Config], Sequence[float]]
"""Coordinates of a config besides its tunables."""

_FEWEST = 2  # measured configs, before there is anything to learn
_EXPLORE_EACH = 3  # proposals


class ConfigSampler(BaseSampler):
    """Proposes configs of a list, each at most once. Values of the study are µs, and are minimised.

    A trial of a config outside the list is ignored. A failed one counts as slow as the slowest: what is like it is not
    tried soon. Where nothing is left, ``Study.ask`` raises ValueError.

    Args:
        configs: what may be proposed.
        startup_trials: so many trials, however they came about, before a random config gives way to a model's.
        seed: the same seed and the same outcomes give the same proposals.
        described: a config → more of its coordinates, always as many.
    """

    def __init__(
        self, configs: Sequence[Config], startup_trials: int, seed: int, described: Described | None = None
    ) -> None:
        self._configs = list(configs)
        self._places = {config: place for place, config in enumerate(self._configs)}
        values = {name: sorted({config[name] for config in self._configs}) for name in self._configs[0]}
        self.distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(each) for name, each in values.items()
        }
        """For ``Study.ask``: of all tunables, with the values that some config has."""
        self._values = values
        self._described = described
        self._startup_trials = startup_trials
        self._random = random.Random(seed)
        self._learnt: frozenset[int] = frozenset()  # trials that the posterior is of
        self._posterior: Posterior | None = None
        self._believed: set[int] = set()  # places
        self.to_beat_us = math.inf
        """What something else takes that is no config of the list: an improvement is to be faster than that as well."""
        self.polishing = False
        """Whether to propose what differs from the best config in one tunable only, as long as there is any."""
        self.expected_gain = math.inf
        """By what share the most promising config is expected to be faster than the best: 0.01 for 1 %. Infinite before
        there is a model."""

    @cached_property
    def _points(self) -> Points:
        """Of all configs. They take a while, and a search that is never asked for a model's proposal needs none."""
        ranks = {name: {value: at for at, value in enumerate(each)} for name, each in self._values.items()}
        described = self._described or (lambda config: ())
        return np.array(
            [[*(rank[config[name]] for name, rank in ranks.items()), *described(config)] for config in self._configs],
            dtype=np.float64,
        )

    @cached_property
    def _process(self) -> GaussianProcess:
        return GaussianProcess(self._points.shape[1])

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        if "fixed_params" in trial.system_attrs:  # it was enqueued
            return {}
        trials = [each for each in study.get_trials(deepcopy=False) if each.number != trial.number]
        taken = {place: each for each in trials if (place := self._place(each)) is not None}
        left = np.array([place for place in range(len(self._configs)) if place not in taken])
        if not len(left):
            raise ValueError("every config was proposed")
        finished = {place: each for place, each in taken.items() if each.state.is_finished()}
        times = {place: math.log(each.value) for place, each in finished.items() if each.value is not None}
        if len(taken) < self._startup_trials or len(times) < _FEWEST:
            return dict(self._configs[self._random.choice(left)])
        self._learn(finished, times)
        running, best = set(taken) - set(finished), min(times, key=times.__getitem__)
        if self.polishing and len(near := left[self._steps(left, best) == 1]):
            return dict(self._configs[self._most_promising(near, running, self._to_beat(times), explore=False)])
        return dict(self._configs[self._most_promising(left, running, self._to_beat(times))])

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise ValueError(f"{param_name} is no tunable of this space")

    def _place(self, trial: FrozenTrial) -> int | None:
        params = trial.system_attrs.get("fixed_params", trial.params)  # a waiting trial has no params yet
        return self._places.get(Config.of(params))

    def _learn(self, finished: Mapping[int, FrozenTrial], times: Mapping[int, float]) -> None:
        learnt = frozenset(finished)
        if learnt == self._learnt:
            return
        slowest = max(times.values())
        places = sorted(finished)
        self._process.fit(self._points[places], np.array([times.get(place, slowest) for place in places]))
        self._posterior = self._process.posterior(self._points)
        self._learnt, self._believed = learnt, set()

    def _steps(self, places: np.ndarray, best: int) -> np.ndarray:
        """In how many tunables the configs at these places differ from the one at ``best``."""
        tunables = self._points[:, : len(self._values)]
        steps: np.ndarray = (tunables[places] != tunables[best]).sum(1)
        return steps

    def _to_beat(self, times: Mapping[int, float]) -> float:
        best = min(times.values())
        return best if math.isinf(self.to_beat_us) else min(best, math.log(self.to_beat_us))

    def _most_promising(self, left: np.ndarray, running: set[int], best: float, explore: bool = True) -> int:
        posterior = self._posterior
        assert posterior is not None
        for place in sorted(running - self._believed):
            posterior.believe(place)
            self._believed.add(place)
        improvement = posterior.expected_improvement(best)[left]
        self.expected_gain = float(improvement.max())
        explore = explore and len(left) % _EXPLORE_EACH == 0
        at = np.argmin(posterior.optimistic()[left]) if explore else np.argmax(improvement)
        return int(left[at])
