"""Racing: a config that is far from the best so far is not timed to the end.

The rule: a config is given up if it takes more than ``race_margin`` times as long as the best config in what the length
of its rounds was found by, and again in each of ``race_pairs`` rounds, timed side by side with a round of the best.
What is nearer than that gets all of its rounds, none of them beside another config.

Why not optuna's ``WilcoxonPruner``, or any test of ranks: ranks of n pairs cannot say more than one in 2ⁿ, whatever
lies between them. At the usual 5 % it takes five pairs, ten rounds, to give up what seven rounds would have timed, be
it four times as slow. Here the distance counts as well: rounds of one config differ by 0.2 to 0.9 % (the interquartile
range on an H200), and half to three quarters of the trials there are further than 10 % from the best before them. That
a burst of other work reaches every round of a config and none of those beside them is what the pairs make unlikely.
"""

from __future__ import annotations

from dataclasses import dataclass

from autofuse.tuner.budgets import Effort
from autofuse.tuner.measure import Runner, Timing, interleave, time_alone

__all__ = ["Race", "race"]


@dataclass(frozen=True)
class Race:
    """How a config was timed.

    Attributes:
        pruned: whether it was given up; its timing is of the rounds that it had until then.
    """

    timing: Timing
    pruned: bool = False


def race(config: Runner, best: Runner | None, effort: Effort) -> Race:
    """Times a config, to the end only where it may be as fast as the best so far.

    Args: best: of the same bucket; None where there is none yet.
    """
    if best is not None and config.first_us > effort.race_margin * best.first_us:
        rounds_us: list[float] = []
        for pair in range(effort.race_pairs):
            of_config, of_best = (timing.median_us for timing in interleave([config, best], 1, seed=pair))
            rounds_us.append(of_config)
            if not of_config > effort.race_margin * of_best:
                break
        else:
            return Race(Timing(tuple(rounds_us)), pruned=True)
    config.warm(effort.warmup_rounds)
    return Race(time_alone(config, effort.trial_rounds))
