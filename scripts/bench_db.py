"""How long the tuned-config database takes to answer, by how many winners it holds.

    python scripts/bench_db.py [--winners 100,10000,100000] [--json PATH]

``first``: from a path to the first answer, in a process that has asked another database before; ``again``: the same
question once more, as each further graph of a process asks it; ``other``: the first question about another problem.
Times are medians of the thread's CPU time, and in brackets the least: the file is in the page cache, so nothing waits
for a disk, and whatever else the machine runs does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import timeit
from dataclasses import replace
from pathlib import Path

from autofuse.cache_db import Snapshot, TunedDatabase, Winner
from autofuse.ops import Config, Problem
from autofuse.targets import Target

TARGET = Target("cuda", "sm_90a", "NVIDIA H200")
BUCKETS = (1, 16, 64, 256, 1024, 8192)
SOURCE = "0123456789abcdef"
REPETITIONS = 50
CALLS = 100_000


def problem(number: int) -> Problem:
    params = (("dtype", "bf16"), ("q_lora_rank", 64 * (number + 1)), ("kv_lora_rank", 512), ("cast_before_weight", 1))
    return Problem("mla_dual_rms_norm", params)


def fill(path: Path, winners: int) -> int:
    """Makes a database of so many winners; returns for how many problems."""
    config = Config.of(KV_WARPS=2, PDL=1, PREFETCH=0, Q_WARPS=6, READ_ONCE=0, ROWS=1, UNROLL=1, VEC_BYTES=16)
    made = Winner(TARGET, problem(0), 1, config, SOURCE, 1.03, 0.02, "compile", 2.15, 2.09, 2.01, 2.16)
    with TunedDatabase(path) as database, database.transaction():
        for number in range(winners):
            each = replace(made, problem=problem(number // len(BUCKETS)), tokens=BUCKETS[number % len(BUCKETS)])
            database.record_winner(each)
    return -(-winners // len(BUCKETS))


def measure(path: Path, problems: int) -> dict[str, float]:
    """Times of a lookup in µs."""
    first, other = [], []
    for repetition in range(REPETITIONS):
        asked, next_asked = problem(repetition % problems), problem((repetition + 1) % problems)
        begin = time.thread_time()
        snapshot = Snapshot.load(path, TARGET)
        assert snapshot.lookup(asked, 64, 64, SOURCE).rule in ("exact", "nearest", "between", "untuned")
        middle = time.thread_time()
        snapshot.lookup(next_asked, 2, 64, SOURCE)
        other.append(time.thread_time() - middle)
        first.append(middle - begin)
    asked = problem(0)
    calls = timeit.repeat(
        lambda: snapshot.lookup(asked, 64, 64, SOURCE), timer=time.thread_time, number=CALLS // 10, repeat=10
    )
    calls = [seconds / (CALLS // 10) for seconds in calls]
    return {
        f"{name}{suffix}_us": summary(seconds) * 1e6
        for name, seconds in (("first", first), ("other", other), ("again", calls))
        for suffix, summary in (("", statistics.median), ("_best", min))
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--winners", default="100,10000,100000", help="how many winners, a list")
    parser.add_argument("--json", type=Path, help="write the times here")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="autofuse-bench-") as name:
        warm = Path(name) / "warm.db"
        measure(warm, fill(warm, 6))
        print(f"{'winners':>10} {'MiB':>8} {'first ms':>16} {'other ms':>16} {'again µs':>16}")
        for winners in (int(count) for count in args.winners.split(",")):
            path = Path(name) / f"{winners}.db"
            problems = fill(path, winners)
            times, size = measure(path, problems), path.stat().st_size
            rows.append({"winners": winners, "bytes": size, **times})
            cells = [
                f"{times[f'{name}_us'] / scale:.3f} ({times[f'{name}_best_us'] / scale:.3f})"
                for name, scale in (("first", 1e3), ("other", 1e3), ("again", 1))
            ]
            print(f"{winners:>10} {size / 2**20:>8.1f} " + " ".join(f"{cell:>16}" for cell in cells))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
