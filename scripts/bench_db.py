"""How long the tuned-config database takes to answer, by how many winners it holds.

    python scripts/bench_db.py [--winners 100,10000,100000] [--json PATH]

``first``: from a path to the first answer, in a process that has asked another database before; ``again``: the same
question once more, as each further graph of a process asks it; ``other``: the first question about another problem.
Times are medians by the clock, and in brackets the least. The file is in the page cache, so nothing waits for a disk.
The thread's CPU time is measured beside it and printed last: what the clock shows above it is the machine's other work.

benchmarks/cpu/database_lookup.json is what docs/database.md shows; scripts/database_tables.py --markdown puts it there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from autofuse.cache_db import Snapshot, TunedDatabase, Winner
from autofuse.ops import Config, Problem
from autofuse.targets import Target
from bench.machine import machine_facts
from bench.progress import Progress

TARGET = Target("cuda", "sm_90a", "NVIDIA H200")
BUCKETS = (1, 16, 64, 256, 1024, 8192)
SOURCE = "0123456789abcdef"
REPETITIONS = 50
CALLS = 10_000  # in a row; one by itself is shorter than a clock's step

Answer = TypeVar("Answer")
Seconds = tuple[float, float]
"""By the clock, and of the thread's CPU time."""


def problem(number: int) -> Problem:
    params = (("dtype", "bf16"), ("q_lora_rank", 64 * (number + 1)), ("kv_lora_rank", 512), ("cast_before_weight", 1))
    return Problem("mla_dual_rms_norm", params)


def fill(path: Path, winners: int) -> int:
    """Makes a database of so many winners; returns for how many problems."""
    config = Config.of(KV_WARPS=2, PDL=1, PREFETCH=0, Q_WARPS=6, READ_ONCE=0, ROWS=1, UNROLL=1, VEC_BYTES=16)
    made = Winner(TARGET, problem(0), 1, config, SOURCE, 1.03, 0.02, "compile", 2.15, 2.09, 2.01, 2.16)
    progress = Progress(f"winners of {path.name}", winners)
    with TunedDatabase(path) as database, database.transaction():
        for number in range(winners):
            each = replace(made, problem=problem(number // len(BUCKETS)), tokens=BUCKETS[number % len(BUCKETS)])
            database.record_winner(each)
            progress.advance()
    return -(-winners // len(BUCKETS))


def measure(path: Path, problems: int) -> dict[str, float]:
    """Times of a lookup in µs."""
    first, other, again = [], [], []
    progress = Progress(f"openings of {path.name}", REPETITIONS)
    for repetition in range(REPETITIONS):
        seconds, snapshot = timed(partial(_opened, path, problem(repetition % problems)))
        first.append(seconds)
        other.append(timed(partial(snapshot.lookup, problem((repetition + 1) % problems), 2, 64, SOURCE))[0])
        progress.advance()
    snapshot.lookup(problem(0), 64, 64, SOURCE)
    for _ in range(10):
        clock, cpu = timed(partial(_repeat, snapshot, problem(0)))[0]
        again.append((clock / CALLS, cpu / CALLS))
    times = {}
    for name, found in (("first", first), ("other", other), ("again", again)):
        clocks, cpus = zip(*found, strict=True)
        times[f"{name}_us"] = statistics.median(clocks) * 1e6
        times[f"{name}_best_us"] = min(clocks) * 1e6
        times[f"{name}_cpu_us"] = statistics.median(cpus) * 1e6
    return times


def _opened(path: Path, asked: Problem) -> Snapshot:
    snapshot = Snapshot.load(path, TARGET)
    assert snapshot.lookup(asked, 64, 64, SOURCE).rule in ("exact", "nearest", "between", "untuned")
    return snapshot


def _repeat(snapshot: Snapshot, asked: Problem) -> None:
    for _ in range(CALLS):
        snapshot.lookup(asked, 64, 64, SOURCE)


def timed(work: Callable[[], Answer]) -> tuple[Seconds, Answer]:
    clock, cpu = time.perf_counter(), time.thread_time()
    answer = work()
    return (time.perf_counter() - clock, time.thread_time() - cpu), answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--winners", default="100,10000,100000", help="how many winners, a list")
    parser.add_argument("--json", type=Path, help="write the times here")
    args = parser.parse_args()
    facts, rows = machine_facts(), []
    with tempfile.TemporaryDirectory(prefix="autofuse-bench-") as name:
        warm = Path(name) / "warm.db"
        measure(warm, fill(warm, 6))
        print(f"{'winners':>10} {'MiB':>8} {'first ms':>16} {'other ms':>16} {'again µs':>16} {'CPU':>24}", flush=True)
        for winners in (int(count) for count in args.winners.split(",")):
            path = Path(name) / f"{winners}.db"
            problems = fill(path, winners)
            times, size = measure(path, problems), path.stat().st_size
            rows.append({"winners": winners, "bytes": size, **times})
            scales = {"first": 1e3, "other": 1e3, "again": 1.0}
            cells = [
                f"{times[f'{name}_us'] / scale:.3f} ({times[f'{name}_best_us'] / scale:.3f})"
                for name, scale in scales.items()
            ]
            cpu = " ".join(f"{times[f'{name}_cpu_us'] / scale:.3f}" for name, scale in scales.items())
            print(
                f"{winners:>10} {size / 2**20:>8.1f} " + " ".join(f"{cell:>16}" for cell in cells) + f" {cpu:>24}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
