"""Search: which config to measure next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import optuna

from autofuse.ops import Config, FusedOp, KernelSource, Problem, SearchSpace
from autofuse.ops.languages import TRITON, language_of
from autofuse.tuner.budgets import Effort
from autofuse.tuner.sampler import ConfigSampler, Described

__all__ = ["ExhaustiveSearch", "LanguageSearch", "ModelSearch", "Search", "grid_size", "search_for", "search_in"]

optuna.logging.set_verbosity(optuna.logging.ERROR)  # it would tell of every trial


class Search:
    """Proposes configs in batches until it has seen enough.

    Use: ``ask`` until it gives nothing, measure one of what it gave, ``tell``, and again. Or ``batches``.
    """

    total: int
    """Configs it will propose at most, for a progress bar."""

    def ask(self) -> list[Config]:
        """What to measure besides what was asked for already, none of it twice. Empty where that has to be told first,
        and at the end.
        """
        raise NotImplementedError

    def batches(self) -> Iterator[list[Config]]:
        """The same, batch by batch, for those that tell everything of one before they want the next."""
        while batch := self.ask():
            yield batch

    def tell(self, config: Config, time_us: float | None) -> None:
        """The outcome of a proposed config; None if it failed."""
        raise NotImplementedError

    def hear(self, time_us: float) -> None:
        """What a config of another search for the same bucket takes: only what is faster is of any use."""


class ExhaustiveSearch(Search):
    """Every config that is not known yet, in the space's order."""

    def __init__(self, configs: Sequence[Config], known: Mapping[Config, float | None], batch: int) -> None:
        self._waiting = [config for config in configs if config not in known]
        self._batch = batch
        self._running: set[Config] = set()
        self.total = len(self._waiting)

    def ask(self) -> list[Config]:
        if self._running:
            return []
        batch, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
        self._running = set(batch)
        return batch

    def tell(self, config: Config, time_us: float | None) -> None:
        self._running.discard(config)


class ModelSearch(Search):
    """A Gaussian process learns which configs are fast, and proposes what is expected to gain most; see
    ``ConfigSampler``. When the effort's trials are used up but for ``polish``, or nothing is expected to gain anything
    any more, configs that are like the best one but for one tunable are tried, ``polish`` at most, and it ends; at once
    where something else is faster than its best by ``race_margin``.

    What the database knows already is told to it first, so an interrupted search goes on where it was. The same seed
    and the same times give the same proposals.

    Args:
        known: config → µs, or None if it failed.
        first: configs to try before all others (the default, what is likely fast, winners of other buckets).
        seed: of the sampler.
        wanted: of ``first``, configs that are tried even if the effort's trials were made already.
        described: see ``ConfigSampler``; ``grid_size``.
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
        described: Described | None = None,
    ) -> None:
        self._effort = effort
        configs = list(space.configs(problem, tokens))
        allowed = set(configs)
        self._sampler = ConfigSampler(configs, effort.startup_trials, seed, described)
        self._study = optuna.create_study(sampler=self._sampler)
        self._asked: dict[Config, optuna.trial.Trial] = {}
        for config, time_us in known.items():
            if config in allowed:
                self._study.add_trial(self._told(config, time_us))
        first = [config for config in dict.fromkeys(first) if config in allowed and config not in known]
        for config in first:
            self._study.enqueue_trial(dict(config))
        self._first = len(first)
        left = sum(config not in known for config in configs)
        trials = max(effort.trials - len(known), sum(config in first for config in wanted))
        self._known = len(known)
        self._proposed = 0
        self._best_us = min(filter(None, known.values()), default=math.inf)
        self.total = max(min(trials, left), 0)
        self._polish_from = max(self.total - effort.polish, self._first)  # proposals

    def ask(self) -> list[Config]:
        if self._asked:
            return []
        while len(self._asked) < self._effort.batch and self._proposed < self.total:
            self._sampler.polishing = self._proposed >= self._polish_from
            trial = self._study.ask(self._sampler.distributions)
            if self._first <= self._proposed < self._polish_from and self._is_settled():
                close = self._best_us <= self._effort.race_margin * self._sampler.to_beat_us
                if not (close and self._effort.polish):
                    self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    self.total = self._proposed
                    break
                self._polish_from = self._proposed + 1
                self.total = min(self.total, self._polish_from + self._effort.polish)
            self._asked[Config.of(trial.params)] = trial
            self._proposed += 1
        return list(self._asked)

    def tell(self, config: Config, time_us: float | None) -> None:
        trial = self._asked.pop(config)
        if time_us is None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, time_us)
            self._best_us = min(self._best_us, time_us)

    def hear(self, time_us: float) -> None:
        self._sampler.to_beat_us = min(self._sampler.to_beat_us, time_us)

    def _told(self, config: Config, time_us: float | None) -> optuna.trial.FrozenTrial:
        """A finished trial that was not asked for."""
        return optuna.trial.create_trial(
            params=dict(config),
            distributions=self._sampler.distributions,
            value=time_us,
            state=optuna.trial.TrialState.COMPLETE if time_us is not None else optuna.trial.TrialState.FAIL,
        )

    def _is_settled(self) -> bool:
        enough = self._known + self._proposed >= self._effort.fewest_trials
        return enough and self._sampler.expected_gain < self._effort.settled


class LanguageSearch(Search):
    """The kernel's language as the first choice of all: a search in each language's own space, side by side.

    Each gets a whole effort of trials: what was measured in one language says nothing of the tunables of another. But
    each knows the best of all of them, and ends where it does not expect to be any faster.

    Args:
        searches: language → its search.
    """

    def __init__(self, searches: Mapping[str, Search]) -> None:
        self._searches = searches
        self._turns = itertools.cycle(searches)
        self.total = sum(search.total for search in searches.values())

    def ask(self) -> list[Config]:
        for _ in self._searches:
            if batch := self._searches[next(self._turns)].ask():
                return batch
        return []

    def tell(self, config: Config, time_us: float | None) -> None:
        self._searches[language_of(config)].tell(config, time_us)
        if time_us is not None:
            self.hear(time_us)

    def hear(self, time_us: float) -> None:
        for search in self._searches.values():
            search.hear(time_us)


def search_for(
    kernels: Sequence[KernelSource],
    problem: Problem,
    tokens: int,
    known: Mapping[Config, float | None],
    first: Sequence[Config],
    effort: Effort,
    seed: int,
    wanted: Sequence[Config] = (),
    described: Described | None = None,
) -> Search:
    """The search for a bucket, in each of the op's ``kernels``. Other arguments as for ModelSearch."""
    searches = {}
    for kernel in kernels:
        share = effort
        if kernel.language == TRITON:
            share = replace(
                effort,
                batch=2 * effort.batch,
                fewest_trials=effort.triton_fewest,
                settled=effort.triton_settled,
                polish=effort.triton_polish,
            )
        mine = {config: time_us for config, time_us in known.items() if language_of(config) == kernel.language}
        searches[kernel.language] = search_in(
            kernel.space, problem, tokens, mine, first, share, seed, wanted, described
        )
    search = LanguageSearch(searches)
    for time_us in filter(None, known.values()):
        search.hear(time_us)
    return search


def search_in(
    space: SearchSpace,
    problem: Problem,
    tokens: int,
    known: Mapping[Config, float | None],
    first: Sequence[Config],
    effort: Effort,
    seed: int,
    wanted: Sequence[Config] = (),
    described: Described | None = None,
) -> Search:
    """Exhaustive where the space is small enough, by a model otherwise. Arguments as for ModelSearch."""
    configs = list(space.configs(problem, tokens))
    if len(configs) <= effort.exhaustive_up_to:
        return ExhaustiveSearch(configs, known, effort.batch)
    return ModelSearch(space, problem, tokens, known, first, effort, seed, wanted, described)


def grid_size(op: FusedOp, problem: Problem, tokens: int) -> Described:
    """How many blocks a launch has, as a power of two: what follows from several tunables at once, and from T.

    Told only the tunables, the model is far too sure of itself. Of the configs within 5 % of the best that one tuning
    of 64 buckets on an H200 came across and another did not, a model of the other's trials took 14 % for slower than
    they are by more than three of its standard deviations; knowing the blocks, and with shorter lengths, 8 %.
    """

    def described(config: Config) -> tuple[float]:
        return (math.log2(max(op.launch_shape(problem, config).blocks(tokens), 1)),)

    return described
