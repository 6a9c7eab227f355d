"""Kernel Tuner's strategies on the same data, through its own simulation mode.

It is no dependency of autofuse: ``pip install --constraint constraints.txt kernel-tuner``.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autofuse.ops import Config
from search.recorded import Recorded
from search.strategies import Strategy

__all__ = ["STRATEGIES", "kernel_tuner_strategies"]

STRATEGIES = (
    "random_sample",
    "genetic_algorithm",
    "simulated_annealing",
    "greedy_ils",
    "greedy_mls",
    "mls",
    "diff_evo",
    "pso",
    "firefly_algorithm",
    "dual_annealing",
    "basinhopping",
    "bayes_opt",
)


def kernel_tuner_strategies() -> dict[str, Strategy]:
    """By name; none where Kernel Tuner is not installed."""
    try:
        import kernel_tuner  # noqa: F401
    except ImportError:
        return {}
    return {f"Kernel Tuner {name}": _strategy(name) for name in STRATEGIES}


def _strategy(name: str) -> Strategy:
    def strategy(recorded: Recorded, trials: int, seed: int) -> Iterator[Config]:
        import numpy
        from constraint import FunctionConstraint
        from kernel_tuner import tune_kernel

        names = list(recorded.tunables)
        points = {tuple(config[name] for name in names) for config in recorded.outcomes}

        def was_recorded(*values: int) -> bool:
            return values in points

        random.seed(seed)  # what it does not seed itself
        numpy.random.seed(seed)
        content = _cache(recorded)
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "cache.json"
            cache.write_text(json.dumps(content))
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # our tunables are not named as blocks
                results, _ = tune_kernel(
                    "recorded",
                    "",
                    1,
                    [],
                    {name: list(values) for name, values in recorded.tunables.items()},
                    strategy=name,
                    restrictions=[FunctionConstraint(was_recorded)],
                    strategy_options={"max_fevals": min(trials, len(recorded.outcomes))},
                    cache=str(cache),
                    simulation_mode=True,
                    lang="C",
                    quiet=True,
                    seed=seed,
                )
        configs = (Config.of({key: result[key] for key in recorded.tunables}) for result in results)
        yield from dict.fromkeys(configs)

    return strategy


def _cache(recorded: Recorded) -> dict[str, Any]:
    """The file that its simulation mode reads."""
    entries = {}
    for config in recorded.outcomes:
        values = {name: config[name] for name in recorded.tunables}
        time_us = recorded.times.get(config)
        entries[",".join(map(str, values.values()))] = {
            **values,
            "time": "RuntimeFailedConfig" if time_us is None else time_us / 1e3,
            **dict.fromkeys(("compile_time", "verification_time", "benchmark_time"), 1.0),
            **dict.fromkeys(("strategy_time", "framework_time"), 0.0),
            "times": [] if time_us is None else [time_us / 1e3],
            "timestamp": "",
        }
    return {
        "device_name": recorded.target,
        "kernel_name": "recorded",
        "problem_size": 1,
        "tune_params_keys": list(recorded.tunables),
        "tune_params": {name: list(values) for name, values in recorded.tunables.items()},
        "objective": "time",
        "cache": entries,
    }
