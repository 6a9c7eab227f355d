"""Ties: which of the finalists wins where no difference between them can be told.

Several configs of a space are often equally fast. The fastest of one measurement is then a matter of luck, and two
tunings of one machine would disagree for no reason. So a config that is not slower than the fastest beyond the noise is
as good as it, and of these the simplest wins, by a rule that knows no times.
"""

from __future__ import annotations

from collections.abc import Sequence

from autofuse.ops import Config, SearchSpace
from autofuse.tuner.measure import Timing, gain

__all__ = ["choose", "simplicity"]


def choose(
    configs: Sequence[Config],
    timings: Sequence[Timing],
    spaces: Sequence[SearchSpace],
    tie: float,
    widest_tie: float,
) -> Config:
    """The simplest of those that tie with the fastest; of several languages, one in the first.

    A config ties with the fastest if the 95 % interval of the ratio of their times, over paired rounds, begins at
    1 + ``tie`` or below, and their median is 1 + ``widest_tie`` or below.

    Args:
        timings: of ``configs``, in paired rounds.
        spaces: of the kernel in each of its languages.
        tie: the share by which processes differ that time the same kernel (addresses, clocks); the rounds of one
            process do not know of it.
        widest_tie: what a tie may cost. A config that is slow on every second round, or at two of three addresses, has
            an interval that begins where it is fast.
    """
    fastest = min(timings, key=lambda timing: timing.median_us)

    def ties(timing: Timing) -> bool:
        ratio = gain(timing, fastest)
        return ratio.low <= 1.0 + tie and ratio.median <= 1.0 + widest_tie

    level = [config for config, timing in zip(configs, timings, strict=True) if timing is fastest or ties(timing)]
    return min(level, key=lambda config: _simplicity_in(spaces, config))


def _simplicity_in(spaces: Sequence[SearchSpace], config: Config) -> tuple[int, ...]:
    place, space = next((place, space) for place, space in enumerate(spaces) if space.is_of(config))
    return (place, *simplicity(space, config))


def simplicity(space: SearchSpace, config: Config) -> tuple[int, ...]:
    """Smaller is simpler: the fewer tunables are away from their most ordinary value, then the less far these are in
    all, then the order of the space.
    """
    places = tuple(tunable.values.index(config[tunable.name]) for tunable in space.tunables)
    return (sum(place > 0 for place in places), sum(places), *places)
