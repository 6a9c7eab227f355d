"""SearchSpace: the tunables of a kernel, and which combinations make sense."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
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
    """A condition every config must meet, and the reason for it."""

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

    def configs(self, problem: Problem, tokens: int) -> Iterator[Config]:
        """All configs that meet the constraints, in a fixed order."""
        names = [tunable.name for tunable in self.tunables]
        for values in itertools.product(*(tunable.values for tunable in self.tunables)):
            config = Config.of(dict(zip(names, values, strict=True)))
            if self.refusal(config, problem, tokens) is None:
                yield config
