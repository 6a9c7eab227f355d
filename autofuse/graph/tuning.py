"""Tunes while a graph is being compiled: in a process of its own, as ``autofuse tune`` would.

The tuner compiles the unfused reference through Inductor to compare with it. Inside a running compilation that would
meet Inductor's state of that very compilation, our own pass included.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from autofuse.errors import BadInput, TargetUnavailable
from autofuse.graph.notice import logger
from autofuse.ops.problem import Problem

__all__ = ["TUNING_SECONDS", "tune_in_process"]

TUNING_SECONDS = 600.0
"""How long one problem may be tuned while compiling; what was measured by then is kept."""

EFFORT = "quick"


def tune_in_process(problem: Problem, tokens: tuple[int, ...], device: torch.device, database: Path) -> None:
    """Tunes ``problem`` at each T of ``tokens`` on ``device``, into ``database``.

    Raises: BadInput, TargetUnavailable with the last line that the tuner said.
    """
    logger.info("tuning %s at T=%s on %s", problem, ", ".join(map(str, tokens)), device)
    command = [sys.executable, "-m", __name__, str(problem), ",".join(map(str, tokens)), str(device), str(database)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TUNING_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise TargetUnavailable(f"it takes more than {TUNING_SECONDS:.0f} s; run `autofuse tune` first") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise BadInput(said[-1])


def _main(problem: str, tokens: str, device: str, database: str) -> None:
    from autofuse.cache_db import TunedDatabase
    from autofuse.tuner.budgets import effort
    from autofuse.tuner.job import Bucket, tune_buckets

    buckets = [Bucket(Problem.parse(problem), int(t)) for t in tokens.split(",")]
    with TunedDatabase(Path(database)) as opened:
        tune_buckets(buckets, torch.device(device), opened, effort(EFFORT))


if __name__ == "__main__":
    _main(*sys.argv[1:])
