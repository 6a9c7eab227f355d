"""Tuning while ``torch.compile`` is at work: for ``untuned="tune"``, within a budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from autofuse.errors import AutofuseError
from autofuse.graph.notice import logger, warn_once
from autofuse.ops.buckets import buckets_serving
from autofuse.ops.problem import Problem

__all__ = ["Tuner", "TuningTime", "tune_in_process", "tuning_time"]

Tuner = Callable[[Problem, tuple[int, ...], torch.device, Path, float], None]
"""Tunes a problem at some T on a device into a database within so many seconds. Raises AutofuseError."""


class TuningTime:
    """How long all compilations of a process have tuned, and what they have tried.

    A server that compiles again and again, for one more shape each time, waits no longer for all of them than it was
    told to; and what could not be tuned once is not tried for every graph.
    """

    def __init__(self) -> None:
        self.spent_s = 0.0
        self._tried: dict[tuple[Path, Problem, torch.device, int, int], str] = {}

    def tune(
        self, tune: Tuner, problem: Problem, low: int, high: int, device: torch.device, database: Path, budget_s: float
    ) -> str:
        """Tunes ``problem`` for T from ``low`` to ``high`` if it was not tried before and there is time left.

        Returns: why it was not, or what went wrong, as part of a sentence; "" if all went well. Raises nothing but
        what the user raises: KeyboardInterrupt.
        """
        key = (database, problem, device, low, high)
        if key in self._tried:
            return self._tried[key]
        left_s = budget_s - self.spent_s
        if left_s <= 0:
            warn_once(
                f"autofuse has tuned for {self.spent_s:.0f} s in this process, and autofuse.tune_budget is "
                f"{budget_s:g} s: further sites stay unfused, and are remembered for `autofuse tune --captured`"
            )
            return f"the {budget_s:g} s of autofuse.tune_budget were over"
        tokens = buckets_serving(low, high)
        logger.info("tuning %s at T=%s on %s: %.0f s left", problem, ",".join(map(str, tokens)), device, left_s)
        begin = time.perf_counter()
        try:
            tune(problem, tokens, device, database, left_s)
            self._tried[key] = ""
        except Exception as error:  # a user's compilation must not end for want of a fusion
            said = str(error) if isinstance(error, AutofuseError) else f"{type(error).__name__}: {error}"
            warn_once(f"autofuse could not tune {problem}: {said}")
            self._tried[key] = f"tuning while compiling failed: {said}"
        finally:
            self.spent_s += time.perf_counter() - begin
        return self._tried[key]


tuning_time = TuningTime()


def tune_in_process(
    problem: Problem, tokens: tuple[int, ...], device: torch.device, database: Path, budget_s: float
) -> None:
    """``autofuse tune`` in a process of its own, each line of its progress logged."""
    from autofuse.tuner.api import tune_site  # here: without it, whoever compiles a tuned model needs no optuna

    tune_site(problem, tokens, device, database, budget_s, on_line=lambda line: logger.info("tuning: %s", line))
