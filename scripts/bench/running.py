"""Running: all rows of some tables, in this process or in one for each GPU, whatever becomes of single rows."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import autofuse
from autofuse.cache_db import TunedDatabase, rival_of
from autofuse.errors import AutofuseError, BadInput
from autofuse.ops import OPS, Problem
from autofuse.runtime.dispatch import registry
from autofuse.targets import target_of, toolchain
from autofuse.tuner.api import checked_problem
from autofuse.tuner.budgets import Effort
from autofuse.tuner.job import Bucket, BucketDone, BucketStarted, Event, tune_buckets
from bench.measuring import bandwidth, free_memory, measured_row
from bench.showing import line
from bench.tables import Results, Row, Table

__all__ = ["RowRun", "facts", "run_workers", "source_hash"]

DIED = "the process died while this row was tuned or measured"
BROKEN = 3  # exit code: a kernel has broken the GPU's context, and a new process must go on


class _BrokenContext(Exception):
    pass


def source_hash(problem: Problem, device: torch.device) -> str | None:
    """Of the kernels that may run the problem, joined by ``+``; None if its op is not known."""
    return "+".join(OPS[problem.op].source_hashes(target_of(device).kind)) if problem.op in OPS else None


def facts(problem: Problem, device: torch.device) -> dict[str, Any]:
    """What holds for all rows of a table."""
    target = target_of(device)
    return {
        "target": str(target),
        "provenance": {
            "host": platform.node(),
            "torch": torch.__version__,
            "autofuse": autofuse.__version__,
            "source_hash": source_hash(problem, device),
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            **toolchain(target.kind).provenance(device),
        },
    }


@dataclass
class RowRun:
    """Measures rows one after the other, each as soon as it is tuned, and records each at once.

    Attributes:
        compile_plus: measure that column, which takes the longest.
    """

    device: torch.device
    effort: Effort
    database: TunedDatabase
    results: Results
    compile_plus: bool = True
    say: Callable[[str], None] = print
    _facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, rows: Sequence[tuple[Table, int]]) -> int:
        """Measures the rows that are not recorded yet; returns an exit code: 0 or BROKEN."""
        waiting = [row for row in rows if not self.results.has(*row) and self._known(*row)]
        if not waiting:
            return 0
        registry.go_native()  # calls are timed as a compiled graph makes them
        bytes_per_us = bandwidth(self.device, self.effort)
        total, started = len(waiting), time.perf_counter()

        def finish(row: Row) -> None:
            nonlocal started
            table, tokens = waiting.pop(0)
            broken = self._broken()
            if broken:
                row = {"error": f"{row.get('error', 'measured')}; then {broken}"}
            self._record(table, tokens, row)
            verdict = table.on(target_of(self.device).device_name).verdict(tokens, row)
            said = line(verdict) if verdict else f"{table.name} T={tokens}: {row['error']}"
            self.say(f"{total - len(waiting)}/{total} {said} ({time.perf_counter() - started:.1f} s)")
            started = time.perf_counter()
            if broken:
                raise _BrokenContext

        def on_event(event: Event) -> None:
            if isinstance(event, BucketStarted):
                self._record(*waiting[0], {"error": DIED})
            elif isinstance(event, BucketDone):
                finish(self._row(event, bytes_per_us, time.perf_counter() - started))

        try:
            while waiting:  # a bucket that cannot be tuned ends tune_buckets
                try:
                    buckets = [Bucket(table.problem, tokens) for table, tokens in waiting]
                    tune_buckets(buckets, self.device, self.database, self.effort, on_event=on_event)
                except _BrokenContext:
                    raise
                except Exception as error:  # whatever the op, a compiler or the GPU raises
                    finish({"error": f"{type(error).__name__}: {error}"})
        except _BrokenContext:
            return BROKEN
        return 0

    def _row(self, done: BucketDone, bytes_per_us: float, tune_s: float) -> Row:
        if done.winner is None:
            return {"error": "no config is right and runs"}
        try:
            with torch.no_grad():  # as the baselines were compiled: else Dynamo does it again
                row = measured_row(done.winner, self.device, self.effort, bytes_per_us, self.compile_plus)
        except Exception as error:  # whatever the op, Inductor or the GPU raises
            return {"error": f"{type(error).__name__}: {error}"}
        row["seconds"]["tune"] = tune_s
        if rival := rival_of(self.database, done.winner):
            # As the search measured both; the row's own time is of other rounds.
            row["other_language"] = {
                "language": rival.language,
                "config": str(rival.config),
                "us": rival.time_us,
                "ratio": rival.ratio,
            }
        return row

    def _known(self, table: Table, tokens: int) -> bool:
        """Whether its op knows the problem; where not, the row says why."""
        try:
            checked_problem(table.problem)
        except AutofuseError as error:
            self._record(table, tokens, {"error": f"{type(error).__name__}: {error}"})
            return False
        return True

    def _record(self, table: Table, tokens: int, row: Row) -> None:
        if table.problem.op not in self._facts:  # asking nvidia-smi takes a while
            self._facts[table.problem.op] = facts(table.problem, self.device)
        self.results.record(table, tokens, row, self._facts[table.problem.op])

    def _broken(self) -> str:
        """What the GPU says if it takes no more calls."""
        try:
            free_memory(self.device)
        except RuntimeError as error:
            return str(error)
        return ""


def run_workers(command: Sequence[str], results: Results, rows: Sequence[tuple[Table, int]], gpus: int) -> None:
    """Runs ``command --shard I/GPUS`` for each of the first ``gpus`` visible GPUs, side by side: it measures
    ``rows[I::GPUS]``. One that dies is started again as long as it has recorded rows. Raises BadInput.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    if gpus > len(visible):
        raise BadInput(f"--gpus {gpus}: only {','.join(visible)} are visible")

    def start(shard: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible[shard]}
        return subprocess.Popen([*command, "--shard", f"{shard}/{gpus}"], env=environment)

    def recorded(shard: int) -> int:
        return sum(results.has(*row) for row in rows[shard::gpus])

    workers = {shard: (start(shard), recorded(shard)) for shard in range(gpus)}
    while workers:
        time.sleep(0.2)
        for shard, (worker, before) in list(workers.items()):
            if worker.poll() is None:
                continue
            del workers[shard]
            if worker.returncode and recorded(shard) > before:
                workers[shard] = (start(shard), recorded(shard))
