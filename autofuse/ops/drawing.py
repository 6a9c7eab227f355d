"""Drawing configs at random so that few of them have every value of every tunable."""

from __future__ import annotations

import random
from collections.abc import Callable

from autofuse.ops.problem import Config
from autofuse.ops.space import SearchSpace

__all__ = ["Coverage"]

_DRAWS = 200  # random configs of which the best is taken


class Coverage:
    """Draws configs of one space, each with as many values as possible that no earlier one had.

    Example:
        >>> from autofuse.ops import Tunable
        >>> space = SearchSpace((Tunable("A", (1, 2, 3), ""), Tunable("B", (0, 1), "")))
        >>> coverage = Coverage(space, random.Random(0))
        >>> configs = [coverage.draw(lambda config: True, near=Config.of(A=1, B=0)) for _ in range(3)]
        >>> coverage.missing
        []
    """

    def __init__(self, space: SearchSpace, source: random.Random) -> None:
        self._space = space
        self._source = source
        self.missing = [(tunable.name, value) for tunable in space.tunables for value in tunable.values]
        """(tunable, value) that no config has had so far."""

    def draw(self, fits: Callable[[Config], bool], near: Config, **wanted: int) -> Config | None:
        """A config that ``fits``, with the values ``wanted``; None if none is found.

        ``near``: one that fits, and of which some values are kept: where constraints leave few combinations, most that
        fit are like another one that does.
        """
        drawn = [Config.of(near, **{**self._some_values(), **wanted}) for _ in range(_DRAWS)]
        best = max(filter(fits, drawn), key=lambda config: len(config.items() & self.missing), default=None)
        if best is not None:
            self.take(best)
        return best

    def take(self, config: Config) -> None:
        """Counts a config that was not drawn."""
        self.missing = [pair for pair in self.missing if pair not in config.items()]

    def _some_values(self) -> dict[str, int]:
        tunables = self._space.tunables
        some = self._source.sample(tunables, self._source.randint(1, len(tunables)))
        return {tunable.name: self._source.choice(tunable.values) for tunable in some}
