#!/usr/bin/env python3
"""Times fused ops beside eager PyTorch, torch.compile, and torch.compile with every tuning option, in one run.

    python scripts/bench_ops.py --tokens 1,16,64,256,1024,8192,32768 --json benchmarks/h200/mla_dual_rms_norm.json

What is not tuned yet is tuned first (into --database). All functions of a row are measured in turns, over inputs that
rotate beyond the last-level cache; the median counts. On a GPU that is device time, by replaying a CUDA graph; on a
CPU it is the time of a call. "floor" is the bytes that must move ÷ the bandwidth of an elementwise kernel, measured in
the same run. "compile+" is torch.compile with coordinate descent, and on a GPU the better of with and without
programmatic dependent launch.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import autofuse
from autofuse.cache_db import BASELINE_KINDS, TunedDatabase
from autofuse.models import model_config
from autofuse.ops import FusedOp, Problem, get_op
from autofuse.runtime.plan import Plan
from autofuse.targets import parse_device, target_of, toolchain
from autofuse.tuner.api import checked_problem
from autofuse.tuner.baselines import baseline_calls, compiled_reference
from autofuse.tuner.budgets import EFFORTS, Effort
from autofuse.tuner.job import Bucket, tune_buckets
from autofuse.tuner.measure import Ring, example_ring, gain, interleave, runner

PEERS = Path(__file__).resolve().parents[1] / "benchmarks" / "h200" / "peers.json"
TUNED_COMPILE = [
    {"coordinate_descent_tuning": True},
    {"coordinate_descent_tuning": True, "triton.enable_pdl": True},
]


def bandwidth(device: torch.device, effort: Effort) -> float:
    """Bytes per µs, read plus written, of an elementwise kernel over 1 GiB (CPU: 256 MiB)."""
    elements = (1 << 28) if device.type == "cuda" else (1 << 26)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    prepared = runner(lambda x: torch.neg(x, out=target), Ring.of([(source,)] * 4, device), device, effort)
    return 8 * elements / min(prepared.round_us() for _ in range(10))


def host_us(call: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> float:
    """Host time of one call with the allocation of its results: the median of 30 rounds of 100 calls."""
    rounds = []
    for _ in range(31):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(100):
            call(*args)
        rounds.append((time.perf_counter_ns() - start) / 1e5)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return statistics.median(rounds[1:])


def measure(
    op: FusedOp, problem: Problem, tokens: int, plan: Plan, device: torch.device, effort: Effort
) -> dict[str, Any]:
    """One row of the table: µs by column, and the gain over the better baseline."""
    ring = example_ring(op, problem, tokens, device, effort)
    overload, text = getattr(torch.ops.autofuse, op.name).default, str(plan)
    calls: dict[str, Callable[..., Any]] = {
        "ours": lambda *args: overload(*args, text),
        **baseline_calls(op, ring.sets[0]),
    }
    variants = TUNED_COMPILE if device.type == "cuda" else TUNED_COMPILE[:1]
    for number, options in enumerate(variants):
        calls[f"compile+ {number}"] = compiled_reference(op, ring.sets[0], options)[0]
    prepared = [runner(call, ring, device, effort) for call in calls.values()]
    timings = dict(zip(calls, interleave(prepared, effort.final_rounds), strict=True))
    row = {name: timing.median_us for name, timing in timings.items()}
    row["compile+"] = min(row.pop(f"compile+ {number}") for number in range(len(variants)))
    better = min((kind for kind in BASELINE_KINDS if kind in row), key=lambda kind: row[kind])
    ratio = gain(timings[better], timings["ours"])
    worst = max(
        op.tolerance(problem, index).error(out, exact)
        for index, (out, exact) in enumerate(zip(calls["ours"](*ring.sets[0]), op.exact(*ring.sets[0]), strict=False))
    )
    return {
        "us": row,
        "spread_us": timings["ours"].spread_us,
        "gain": ratio.median,
        "gain_low": ratio.low,
        "gain_high": ratio.high,
        "gain_over": better,
        "error_in_tolerances": worst,
        "host_us": host_us(calls["ours"], ring.sets[0], device),
        "bytes": op.bytes_moved(problem, tokens),
        "config": str(plan.config_for(tokens)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="mla_dual_rms_norm")
    parser.add_argument("--model", default="deepseek-v3")
    parser.add_argument(
        "--problem", default=None, help="a problem as `autofuse show` prints it, instead of --op and --model"
    )
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--tokens", default="1,64,2048")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--effort", default="default", choices=sorted(EFFORTS))
    parser.add_argument("--database", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()

    device, effort = parse_device(options.device), EFFORTS[options.effort]
    target = target_of(device)
    tokens = [int(count) for count in options.tokens.split(",")]
    if options.problem:
        problem = checked_problem(Problem.parse(options.problem))
        op = get_op(problem.op)
    else:
        op = get_op(options.op)
        (problem, *_) = op.model_problems(model_config(options.model), options.dtype)
    with TunedDatabase(options.database) as database:
        winners = tune_buckets([Bucket(problem, count) for count in tokens], device, database, effort)
    plan = Plan(target.arch, problem, tuple(sorted((winner.tokens, winner.config) for winner in winners)))

    peers = json.loads(PEERS.read_text(encoding="utf-8")).get(str(problem), {}) if "H200" in target.device_name else {}
    with torch.no_grad():
        bytes_per_us = bandwidth(device, effort)
        rows = {count: measure(op, problem, count, plan, device, effort) for count in tokens}

    columns = [*next(iter(rows.values()))["us"], "floor", *peers]
    table = Table(title=f"{problem} on {target}, µs per call")
    for column in ("T", *columns, "gain", "host µs"):
        table.add_column(column, justify="right")
    for count, row in rows.items():
        row["us"]["floor"] = row["bytes"] / bytes_per_us
        cells = [row["us"].get(name, peers.get(name, {}).get(str(count))) for name in columns]
        table.add_row(
            str(count),
            *("–" if cell is None else f"{cell:.3g}" for cell in cells),
            f"{row['gain']:.2f} [{row['gain_low']:.2f}, {row['gain_high']:.2f}] {row['gain_over']}",
            f"{row['host_us']:.1f}",
        )
    Console(width=200).print(table)
    if options.json:
        report = {
            "problem": str(problem),
            "target": str(target),
            "bandwidth_bytes_per_us": bytes_per_us,
            "provenance": {
                "host": platform.node(),
                "torch": torch.__version__,
                "autofuse": autofuse.__version__,
                "source_hash": op.source_hash(target.kind),
                "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                **toolchain(target.kind).provenance(device),
            },
            "rows": {str(count): row for count, row in rows.items()},
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
