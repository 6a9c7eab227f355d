"""What each tunable of a kernel is worth, by the trials that were made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autofuse.cache_db import Trial

__all__ = ["Worth", "worths"]

_LEAST_TRIALS = 20  # of fewer, a share says nothing
_TOP_SHARE = 0.1  # the trials that count as fast
_LEAST_TOP = 5  # but so many at least, as optuna advises


@dataclass(frozen=True)
class Worth:
    """One tunable of one problem's kernel.

    Attributes:
        tunable: its name.
        share: of how much it decides whether a config is among the fastest: all tunables together have 1.
        best: value → time of the best config that has it ÷ time of the best of all; the geometric mean over T.
    """

    tunable: str
    share: float
    best: Mapping[int, float]


def worths(trials: Iterable[Trial]) -> tuple[Worth, ...]:
    """Of the trials of one problem with one kernel source, at whatever T: the most important tunable first.

    The shares are optuna's PED-ANOVA importances (Watanabe, Bansal & Hutter, IJCAI 2023) of being among the fastest
    tenth, a config's time ÷ its bucket's best being what is judged. Empty for fewer than 20 timed trials.
    """
    buckets: dict[int, list[tuple[Trial, float]]] = {}
    for trial in trials:
        if not trial.failed and trial.time_us is not None:
            buckets.setdefault(trial.tokens, []).append((trial, trial.time_us))
    timed: list[tuple[Trial, float]] = []
    for bucket in buckets.values():
        best_us = min(time_us for _, time_us in bucket)
        timed += [(trial, time_us / best_us) for trial, time_us in bucket]
    values: dict[str, set[int]] = {}
    for trial, _ in timed:
        for name, value in trial.config.items():
            values.setdefault(name, set()).add(value)
    tried = {name: sorted(found) for name, found in values.items() if len(found) > 1}
    if len(timed) < _LEAST_TRIALS or not tried:
        return ()
    shares = _shares(timed, tried)
    found = [Worth(name, shares.get(name, 0.0), _best(timed, name, known)) for name, known in tried.items()]
    return tuple(sorted(found, key=lambda worth: (-worth.share, worth.tunable)))


def _best(timed: Sequence[tuple[Trial, float]], name: str, values: Sequence[int]) -> dict[int, float]:
    found = {}
    for value in values:
        at: dict[int, float] = {}
        for trial, ratio in timed:
            if trial.config.get(name) == value:
                at[trial.tokens] = min(ratio, at.get(trial.tokens, math.inf))
        found[value] = statistics.geometric_mean(at.values())
    return found


def _shares(timed: Sequence[tuple[Trial, float]], tried: Mapping[str, Sequence[int]]) -> dict[str, float]:
    import optuna  # here: it takes a second, which a page without trials need not

    # By places in the list of values: what one trades may be no matter of its size.
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution(tuple(range(len(values)))) for name, values in tried.items()
    }
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        for trial, ratio in timed:
            known = {name: values.index(trial.config[name]) for name, values in tried.items() if name in trial.config}
            mine = {name: distributions[name] for name in known}
            study.add_trial(optuna.create_trial(params=known, distributions=mine, value=ratio))
        top = min(max(_TOP_SHARE, _LEAST_TOP / len(timed)), 0.5)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=top)
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    finally:
        optuna.logging.set_verbosity(level)
