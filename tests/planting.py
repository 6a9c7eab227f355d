"""Tuning an op whose kernels fail, or any op without the worker process."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from autofuse import kernels_src
from autofuse.cache_db import Trial, TunedDatabase
from autofuse.ops import OPS, Problem
from autofuse.targets import target_of
from autofuse.tuner import job
from autofuse.tuner.bench import Bench
from autofuse.tuner.budgets import Effort, Limits
from autofuse.tuner.turns import Turns

FOLDER = Path(__file__).parent / "faulty"
PROBLEM = Problem("faulty", (("dtype", "fp32"), ("width", 16)))


class Planted:
    """The op ``faulty``, with the configs of these faults.

    Attributes:
        module: the op's, which names the faults.
        finale: a file; once it exists, the config that waits for it dies.
    """

    def __init__(self, kernels: Path, monkeypatch: pytest.MonkeyPatch, finale: Path) -> None:
        for source in FOLDER.glob("faulty.c*"):
            shutil.copy(source, kernels)
        monkeypatch.syspath_prepend(FOLDER)
        monkeypatch.setenv("FAULTY_FINALE", str(finale))
        self.finale = finale
        self.module: ModuleType = import_module("faulty_op")
        op = OPS.pop("faulty", None) or self.module.Faulty()
        monkeypatch.setitem(OPS, "faulty", op)
        self._op = op
        self._monkeypatch = monkeypatch

    def names(self, device: torch.device) -> Sequence[str]:
        return tuple(self.module.CPU_FAULTS if device.type == "cpu" else self.module.GPU_FAULTS)

    def choose(self, device: torch.device, *faults: str) -> None:
        """Only the configs of these faults are in the space."""
        numbers = (str(self.names(device).index(fault)) for fault in faults)
        self._monkeypatch.setenv("FAULTY_CONFIGS", ",".join(numbers))

    def trials(self, database: TunedDatabase, device: torch.device, tokens: int) -> dict[str, Trial]:
        """Fault → trial."""
        kind = target_of(device).kind
        rows = database.trials(target_of(device), PROBLEM, tokens, self._op.source_hash(kind))
        return {self.names(device)[row.config["FAULT"]]: row for row in rows}


def impatient(effort: Effort, seconds: float) -> Effort:
    """``effort`` for spaces that are measured whole, and so many seconds for a candidate that never ends."""
    limits = Limits(verify_s=seconds, time_s=seconds, final_s=60.0)
    return replace(effort, exhaustive_up_to=1000, limits=limits)


def plant(edit_kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Planted:
    """``edit_kernels`` is the fixture, which has made a folder of kernels for this test alone."""
    return Planted(kernels_src.FOLDER, monkeypatch, tmp_path / "finale")


class _BenchHere(Bench):
    def __init__(self, device: torch.device, effort: Effort, turns: Path | None) -> None:
        super().__init__(device, effort, turns=Turns(turns))

    def __enter__(self) -> _BenchHere:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def tune_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the job measure in this process, where a test can look on."""
    monkeypatch.setattr(job, "IsolatedBench", _BenchHere)
