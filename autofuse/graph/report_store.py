"""Keeps reports beside Inductor's cache: a graph that is loaded from there runs no pass that could report."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from autofuse.graph.notice import logger
from autofuse.graph.report import GraphReport
from autofuse.paths import cache_folder

__all__ = [
    "KEPT_DAYS",
    "KEPT_IN_MEMORY",
    "KEPT_ON_DISK",
    "SPARED_DAYS",
    "ReportStore",
    "last_reports",
    "report_key",
    "store",
    "symbol_ranges",
]

KEPT_IN_MEMORY = 256  # reports

KEPT_DAYS = 180
"""A report that nobody wrote or read for so long is deleted: its graph has long been compiled anew."""

KEPT_ON_DISK = 4096
"""Of more reports than these, some tens of MB, those that were used least recently are deleted."""

SPARED_DAYS = 7
"""But none that was used since: Inductor's cache still has its graph, and there may be no other record of it."""

_SAVES_PER_PRUNING = 256
_DAY_S = 86400.0


class ReportStore:
    """Reports in ``reports/<key>.json`` of the cache folder, and the latest of this process in memory.

    Files are touched when they are read. The first report that a process writes, and each 256th after it, deletes what
    was not used for long, by ``KEPT_DAYS``, ``KEPT_ON_DISK`` and ``SPARED_DAYS``.
    """

    def __init__(self) -> None:
        self._latest: deque[GraphReport] = deque(maxlen=KEPT_IN_MEMORY)
        self._saved = 0

    @property
    def folder(self) -> Path:
        return cache_folder() / "reports"

    def latest(self) -> list[GraphReport]:
        return list(self._latest)

    def remember(self, report: GraphReport) -> None:
        """Keeps ``report`` in memory; a later one of the same key, from one compilation, takes its place."""
        for index, other in enumerate(self._latest):
            if other.key == report.key:
                del self._latest[index]
                break
        self._latest.append(report)

    def save(self, report: GraphReport) -> None:
        """Writes ``report`` for other processes; a failure is logged and nothing else."""
        path = self.folder / f"{report.key}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".json")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(report.to_json())
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            logger.info("report %s cannot be kept: %s", path, error)
            return
        if self._saved % _SAVES_PER_PRUNING == 0:
            self.prune()
        self._saved += 1

    def prune(self) -> None:
        """Deletes reports that were not used for long, and what processes that died left half-written.

        Other processes may do the same, or read and write reports meanwhile. What cannot be deleted stays.
        """
        now = time.time()
        for _, path in self._used(".*.json", before=now - _DAY_S):
            _delete(path)
        used = sorted(self._used("[!.]*.json", before=now), reverse=True)
        old, spared = now - KEPT_DAYS * _DAY_S, now - SPARED_DAYS * _DAY_S
        for place, (when, path) in enumerate(used):
            if when < old or (place >= KEPT_ON_DISK and when < spared):
                _delete(path)

    def _used(self, pattern: str, before: float = math.inf) -> list[tuple[float, Path]]:
        """(when it was used last, in seconds since 1970; a file)"""
        found: list[tuple[float, Path]] = []
        for path in self.folder.glob(pattern):
            with suppress(OSError):  # gone meanwhile
                when = path.stat().st_mtime
                found += [(when, path)] if when < before else []
        return found

    def load(self, key: str) -> GraphReport | None:
        """The report kept under ``key``, which becomes the most recent one; None if there is none that can be read."""
        path = self.folder / f"{key}.json"
        try:
            report = GraphReport.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            logger.info("no report for %s: %s", key, error)
            return None
        with suppress(OSError):  # another user's, perhaps
            os.utime(path)
        return report

    def recent(self, most: int) -> list[GraphReport]:
        """Of all processes, the ``most`` graphs that were compiled or taken from the cache last, the latest last."""
        reports: list[GraphReport] = []
        for _, path in sorted(self._used("[!.]*.json"), reverse=True):
            if len(reports) == most:
                break
            with suppress(OSError, ValueError):  # of another version
                reports.append(replace(GraphReport.from_json(path.read_text(encoding="utf-8")), from_cache=False))
        return reports[::-1]


def _delete(path: Path) -> None:
    with suppress(OSError):  # gone meanwhile, or another user's
        path.unlink()


store = ReportStore()


def last_reports() -> list[GraphReport]:
    """What the backend reported in this process, the latest last: one report per graph and settings."""
    return store.latest()


def report_key(gm: GraphModule, example_inputs: Sequence[Any], uuid: str) -> str:
    """Stands for a graph of Dynamo, what goes into it, and all that the pass depends on."""
    content = [gm.code, uuid, *(_describe(value) for value in example_inputs)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:32]


def symbol_ranges(example_inputs: Sequence[Any]) -> str:
    """The symbols among the inputs of a graph and what each may be, e.g. ``s77 in [2, int_oo]``."""
    symbols = {
        f"{value.node.expr} in {value.node.shape_env.bound_sympy(value.node.expr)}"
        for value in example_inputs
        if isinstance(value, torch.SymInt)
    }
    return ",".join(sorted(symbols))


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        layout = f"{list(value.shape)}{list(value.stride())}+{value.storage_offset()}"
        return f"{value.dtype}{layout}{value.device}{value.requires_grad}"
    return f"{type(value).__name__}={value}"
