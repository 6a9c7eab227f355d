"""Search: which config to measure next."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator, Mapping, Sequence

import optuna

from autofuse.ops import Config, KernelSource, Problem, SearchSpace
from autofuse.ops.languages import language_of
from autofuse.tuner.budgets import Effort

__all__ = ["ExhaustiveSearch", "LanguageSearch", "Search", "TpeSearch", "search_for", "search_in"]

optuna.logging.set_verbosity(optuna.logging.ERROR)  # it would warn whenever TPE has too few trials for a model
logger = logging.getLogger("autofuse.tuner")


class Search:
    """Proposes configs in batches until it has seen enough.

    Use: ``for batch in search.batches():`` measure each config of the batch and ``search.tell(config, time_us)``.
    """

    total: int
    """Configs it will propose at most, for a progress bar."""

    def batches(self) -> Iterator[list[Config]]:
        """Lists of configs to measure, none of them twice."""
        raise NotImplementedError

    def tell(self, config: Config, time_us: float | None) -> None:
        """The outcome of a proposed config; None if it failed."""
        raise NotImplementedError


class ExhaustiveSearch(Search):
    """Every config that is not known yet, in the space's order."""

    def __init__(self, configs: Sequence[Config], known: Mapping[Config, float | None], batch: int) -> None:
        self._waiting = [config for config in configs if config not in known]
        self._batch = batch
        self.total = len(self._waiting)

    def batches(self) -> Iterator[list[Config]]:
        for start in range(0, len(self._waiting), self._batch):
            yield self._waiting[start : start + self._batch]

    def tell(self, config: Config, time_us: float | None) -> None:
        pass


class TpeSearch(Search):
    """optuna's tree-structured Parzen estimator over the tunables, then the neighbours of the best that it found.

    TPE draws each tunable by how often its values were good, which finds the right region soon, and then seldom the
    one change that is left: on the H200 it missed the best by 4 to 6 % in large spaces. So the last trials are local
    search. What the database knows already is told to it first, so an interrupted search goes on where it was. The
    same seed and the same times give the same proposals.

    Args:
        known: config → µs, or None if it failed.
        first: configs to try before all others (the default config, winners of other buckets).
        seed: of the sampler.
        wanted: of ``first``, configs that are tried even if the effort's trials were made already.
    """

    def __init__(
        self,
        space: SearchSpace,
        problem: Problem,
        tokens: int,
        known: Mapping[Config, float | None],
        first: Sequence[Config],
        effort: Effort,
        seed: int,
        wanted: Sequence[Config] = (),
    ) -> None:
        self._space = space
        self._problem = problem
        self._tokens = tokens
        self._effort = effort
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            tunable.name: optuna.distributions.CategoricalDistribution(tunable.values) for tunable in space.tunables
        }
        sampler = optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=effort.startup_trials,
            multivariate=True,
            constant_liar=True,
        )
        self._study = optuna.create_study(sampler=sampler)
        self._seen = set(known)
        self._times = {config: time_us for config, time_us in known.items() if time_us is not None}
        self._configs = list(space.configs(problem, tokens))
        self._random = random.Random(seed)
        self._asked: dict[Config, optuna.trial.Trial] = {}  # TPE's own proposals
        for config, time_us in known.items():
            if not self._refused(config):
                self._study.add_trial(self._told(config, time_us))
        self._first = [
            config for config in dict.fromkeys(first) if config not in self._seen and not self._refused(config)
        ]
        left = sum(config not in self._seen for config in self._configs)
        trials = max(effort.trials - len(self._seen), sum(config in self._first for config in wanted))
        self.total = max(min(trials, left), 0)

    def _refused(self, config: Config) -> bool:
        return self._space.refusal(config, self._problem, self._tokens) is not None

    def batches(self) -> Iterator[list[Config]]:
        left = self.total
        while left > 0:
            batch = [config for _ in range(min(self._effort.batch, left)) if (config := self._ask())]
            if not batch:
                return
            left -= len(batch)
            yield batch

    def tell(self, config: Config, time_us: float | None) -> None:
        if time_us is not None:
            self._times[config] = time_us
        if (trial := self._asked.pop(config, None)) is None:
            self._study.add_trial(self._told(config, time_us))
        elif time_us is None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, time_us)

    def _told(self, config: Config, time_us: float | None) -> optuna.trial.FrozenTrial:
        """A finished trial that TPE did not propose."""
        return optuna.trial.create_trial(
            params=dict(config),
            distributions=self._distributions,
            value=time_us,
            state=optuna.trial.TrialState.COMPLETE if time_us is not None else optuna.trial.TrialState.FAIL,
        )

    def _ask(self) -> Config | None:
        """A new config; None if there are no more."""
        config = self._first.pop(0) if self._first else None
        if config is None and len(self._seen) >= self._effort.trials * (1 - self._effort.refinement):
            config = self._near_the_best()
        config = config or self._proposed() or self._any()
        if config:
            self._seen.add(config)
        return config

    def _proposed(self) -> Config | None:
        """TPE's; None where it insists on what is known."""
        for _ in range(self._effort.asks_per_trial):
            trial = self._study.ask(self._distributions)
            config = Config.of(trial.params)
            if config not in self._seen and not self._refused(config):
                self._asked[config] = trial
                return config
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None

    def _any(self) -> Config | None:
        left = [config for config in self._configs if config not in self._seen]
        return self._random.choice(left) if left else None

    def _near_the_best(self) -> Config | None:
        """A new config that differs in one tunable from one of the best; in two, if those are all known."""
        best = sorted(self._times, key=self._times.__getitem__)[: self._effort.finalists]
        for changes in (1, 2):
            near = [config for each in best for config in self._neighbours(each, changes)]
            if near:
                return self._random.choice(near)
        return None

    def _neighbours(self, config: Config, changes: int) -> Iterator[Config]:
        for tunables in itertools.combinations(self._space.tunables, changes):
            for values in itertools.product(*(tunable.values for tunable in tunables)):
                changed = {tunable.name: value for tunable, value in zip(tunables, values, strict=True)}
                near = Config.of(config, **changed)
                if near not in self._seen and not self._refused(near):
                    yield near


class LanguageSearch(Search):
    """The kernel's language as the first choice of all: a search in each language's own space, batch by batch in turns.

    Each gets a whole effort of trials. What was measured in one language says nothing of the tunables of another, and
    whether a language wins only shows when its own best is found: a sampler that shared the trials out by early luck
    would make the old kernel's search worse and the new one's result doubtful.

    Args:
        searches: language → its search.
    """

    def __init__(self, searches: Mapping[str, Search]) -> None:
        self._searches = searches
        self.total = sum(search.total for search in searches.values())

    def batches(self) -> Iterator[list[Config]]:
        waiting = [search.batches() for search in self._searches.values()]
        while waiting:
            for batches in list(waiting):
                if batch := next(batches, None):
                    yield batch
                else:
                    waiting.remove(batches)

    def tell(self, config: Config, time_us: float | None) -> None:
        self._searches[language_of(config)].tell(config, time_us)


def search_for(
    kernels: Sequence[KernelSource],
    problem: Problem,
    tokens: int,
    known: Mapping[Config, float | None],
    first: Sequence[Config],
    effort: Effort,
    seed: int,
    wanted: Sequence[Config] = (),
) -> Search:
    """The search for a bucket, in each of the op's ``kernels``. Other arguments as for TpeSearch."""
    searches = {}
    for kernel in kernels:
        mine = {config: time_us for config, time_us in known.items() if language_of(config) == kernel.language}
        searches[kernel.language] = search_in(kernel.space, problem, tokens, mine, first, effort, seed, wanted)
    return LanguageSearch(searches)


def search_in(
    space: SearchSpace,
    problem: Problem,
    tokens: int,
    known: Mapping[Config, float | None],
    first: Sequence[Config],
    effort: Effort,
    seed: int,
    wanted: Sequence[Config] = (),
) -> Search:
    """Exhaustive where the space is small enough, TPE otherwise. Arguments as for TpeSearch."""
    configs = list(space.configs(problem, tokens))
    if len(configs) <= effort.exhaustive_up_to:
        return ExhaustiveSearch(configs, known, effort.batch)
    return TpeSearch(space, problem, tokens, known, first, effort, seed, wanted)
