"""SearchSpace: the tunables of a kernel, and which combinations make sense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autofuse.ops.problem import Config, Problem

__all__ = ["Constraint", "SearchSpace", "Tunable"]


@dataclass(frozen=True)
class Tunable:
    """A parameter of a kernel, passed to its compiler as ``-DNAME=value``.

    Attributes:
        values: what it may be, the most ordinary value first.
        trades: what a larger value buys and what it costs.
    """

    name: str
    values: tuple[int, ...]
    trades: str


@dataclass(frozen=True)
class Constraint:
    """A condition every config must meet, and the reason for it.

    Attributes:
        holds: whether a config meets it for a problem and a T; it goes by the values that it reads, and nothing else.
    """

    reason: str
    holds: Callable[[Config, Problem, int], bool]


@dataclass(frozen=True)
class SearchSpace:
    """The configs of one kernel. ``tokens`` below is the T of the bucket that is tuned."""

    tunables: tuple[Tunable, ...]
    constraints: tuple[Constraint, ...] = ()

    def is_of(self, config: Config) -> bool:
        """Whether ``config`` has this space's tunables, with whatever values."""
        return set(config) == {tunable.name for tunable in self.tunables}

    def refusal(self, config: Config, problem: Problem, tokens: int) -> str | None:
        """Why ``config`` is not a point of this space for that problem and T; None where it is one."""
        if not self.is_of(config):
            return (
                f"its tunables are {', '.join(sorted(config))}, the space's {', '.join(t.name for t in self.tunables)}"
            )
        for tunable in self.tunables:
            if config[tunable.name] not in tunable.values:
                return f"{tunable.name}={config[tunable.name]} is not one of {', '.join(map(str, tunable.values))}"
        for constraint in self.constraints:
            if not constraint.holds(config, problem, tokens):
                return constraint.reason
        return None

    def with_less(self, config: Config, name: str, problem: Problem, tokens: int) -> Config:
        """``config``; where it is no point of this space, with the largest smaller value of that tunable that makes it
        one, if any does.
        """
        (tunable,) = (each for each in self.tunables if each.name == name)
        values = sorted((value for value in tunable.values if value <= config[name]), reverse=True)
        fitting = (Config.of(config, **{name: value}) for value in values)
        return next((each for each in fitting if self.refusal(each, problem, tokens) is None), config)

    def towards(self, config: Config, wishes: Mapping[str, int], problem: Problem, tokens: int) -> Config:
        """``config`` with other values, if it is a point of this space then; else with those of them that leave it one,
        tried one after the other.
        """
        whole = Config.of(config, **wishes)
        if self.refusal(whole, problem, tokens) is None:
            return whole
        for name, value in wishes.items():
            changed = Config.of(config, **{name: value})
            if self.refusal(changed, problem, tokens) is None:
                config = changed
        return config

    def configs(self, problem: Problem, tokens: int) -> Iterator[Config]:
        """All configs that meet the constraints, in a fixed order.

        Tunables get their values one after the other, and a constraint is decided as soon as those that it reads have
        one: what breaks it is never completed. A space has some thousands of configs out of a hundred times as many
        combinations.
        """
        chosen = _Chosen(frozenset(tunable.name for tunable in self.tunables))
        yield from self._completed(chosen, 0, self.constraints, problem, tokens)

    def _completed(
        self, chosen: _Chosen, place: int, undecided: Sequence[Constraint], problem: Problem, tokens: int
    ) -> Iterator[Config]:
        """The configs that begin with these values. Tunables from ``place`` on have none yet."""
        if place == len(self.tunables):
            config = Config.of(chosen.values_of)
            if all(constraint.holds(config, problem, tokens) for constraint in undecided):
                yield config
            return
        left = []
        for constraint in undecided:
            try:
                if not constraint.holds(chosen, problem, tokens):
                    return
            except _Undecided:
                left.append(constraint)
        tunable = self.tunables[place]
        for value in tunable.values:
            chosen.values_of[tunable.name] = value
            yield from self._completed(chosen, place + 1, left, problem, tokens)
        del chosen.values_of[tunable.name]


class _Undecided(Exception):
    """What was asked for depends on tunables that have no value yet."""


class _Chosen(Config):
    """A config whose tunables get their values one by one. Whoever asks for what has none yet gets ``_Undecided``."""

    _names: frozenset[str]
    values_of: dict[str, int]

    def __init__(self, names: frozenset[str]) -> None:
        object.__setattr__(self, "_names", names)  # configs are frozen
        object.__setattr__(self, "values_of", {})

    @property
    def pairs(self) -> tuple[tuple[str, int], ...]:
        raise _Undecided

    def __eq__(self, other: object) -> bool:
        raise _Undecided

    def __hash__(self) -> int:
        raise _Undecided

    def __getitem__(self, name: str) -> int:
        if name in self.values_of:
            return self.values_of[name]
        if name in self._names:
            raise _Undecided
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)
