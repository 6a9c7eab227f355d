"""A space whose configs were all measured, as a file: what any search would have found is looked up in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from autofuse.errors import BadInput
from autofuse.ops import Config, Problem, SearchSpace
from autofuse.ops.space import Constraint, Tunable

Outcome = float | str
"""µs of a call, or the status of a failed trial."""


@dataclass(frozen=True)
class RecordedSpace(SearchSpace):
    """The space whose points are the configs that were measured."""

    points: tuple[Config, ...] = ()

    def configs(self, problem: Problem, tokens: int) -> Iterator[Config]:
        return iter(self.points)


@dataclass(frozen=True)
class Recorded:
    """One bucket's measurements.

    Attributes:
        tunables: name → values, in the space's order.
        default: what our search tries first, with the op's guess where there is one.
        size: configs in the whole space; where ``outcomes`` has fewer, it is a random subset.
        outcomes: config → what came of it, in the space's order.
        provenance: of the machine, with the seed of the subset.
    """

    target: str
    problem: Problem
    tokens: int
    tunables: Mapping[str, tuple[int, ...]]
    default: Config
    size: int
    outcomes: Mapping[Config, Outcome]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def times(self) -> dict[Config, float]:
        """µs of what did not fail."""
        return {config: outcome for config, outcome in self.outcomes.items() if isinstance(outcome, float)}

    @cached_property
    def best_us(self) -> float:
        return min(self.times.values())

    @cached_property
    def space(self) -> SearchSpace:
        recorded = Constraint("it was not recorded", lambda config, problem, tokens: config in self.outcomes)
        tunables = tuple(Tunable(name, values, "") for name, values in self.tunables.items())
        return RecordedSpace(tunables, (recorded,), tuple(self.outcomes))

    @property
    def name(self) -> str:
        return f"{self.problem.op} T={self.tokens}"

    def save(self, path: Path) -> None:
        content = {
            "target": self.target,
            "problem": str(self.problem),
            "tokens": self.tokens,
            "provenance": dict(self.provenance),
            "tunables": {name: list(values) for name, values in self.tunables.items()},
            "default": str(self.default),
            "size": self.size,
            "outcomes": {str(config): outcome for config, outcome in self.outcomes.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Recorded:
        """Raises BadInput for a file that is none of ours."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            recorded = cls(
                content["target"],
                Problem.parse(content["problem"]),
                content["tokens"],
                {name: tuple(values) for name, values in content["tunables"].items()},
                Config.parse(content["default"]),
                content["size"],
                {Config.parse(text): outcome for text, outcome in content["outcomes"].items()},
                content["provenance"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path} is no recorded space: {type(error).__name__}: {error}") from None
        if not recorded.times:
            raise BadInput(f"{path} has no config that ran")
        return recorded
