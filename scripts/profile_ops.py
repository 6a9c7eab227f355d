#!/usr/bin/env python3
"""Asks Nsight Compute what limits the recorded configs of scripts/bench_ops.py.

    python scripts/profile_ops.py --json benchmarks/h200                            # all rows that miss their mark
    python scripts/profile_ops.py --tables mla_v_up_quant_h16 --json benchmarks/h200

One launch of each row is profiled by ``ncu``, with cold caches, at whatever clocks the GPU has, and alone: what
programmatic dependent launch overlaps does not show. Shares are of what the GPU could do in that time, the launch
included. Results go into ncu.json in the folder of the rows.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Grid

from autofuse.ops import OPS, Config, get_op
from autofuse.runtime.plan import Plan
from autofuse.targets import parse_device, target_of
from bench.running import facts
from bench.tables import PEERS, Results, Table, load_tables

PERCENT = "avg.pct_of_peak_sustained_elapsed"
METRICS = {  # what Nsight Compute calls it → what the results do
    "gpu__time_duration.sum": "us",
    f"dram__throughput.{PERCENT}": "dram_percent",
    f"lts__throughput.{PERCENT}": "l2_percent",
    f"l1tex__throughput.{PERCENT}": "l1_percent",
    f"sm__inst_issued.{PERCENT}": "issue_percent",
    f"sm__inst_executed_pipe_alu.{PERCENT}": "alu_percent",
    f"sm__inst_executed_pipe_fma.{PERCENT}": "fma_percent",
    f"sm__inst_executed_pipe_xu.{PERCENT}": "xu_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent",
    "sm__inst_executed.sum": "instructions",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
    "launch__block_size": "threads",
}
STALL, STALL_END = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"

Rows = Sequence[tuple[Table, int, Config]]


def recorded_rows(tables: Sequence[Table], results: Results, missed_only: bool) -> Rows:
    rows = []
    for table in tables:
        for key, row in results.read(table.name)["rows"].items():
            verdict = table.verdict(int(key), row)
            if verdict is not None and (verdict.miss or not missed_only):
                rows.append((table, int(key), Config.parse(row["config"])))
    return rows


def launch_each(rows: Rows, device: torch.device) -> None:
    """What ncu watches: of each row one launch, once everything is compiled and loaded."""
    cudart = torch.cuda.cudart()
    for table, tokens, config in rows:
        op, generator = get_op(table.problem.op), torch.Generator(device).manual_seed(0)
        args = op.example_args(table.problem, tokens, device, generator)
        plan = str(Plan(target_of(device).arch, table.problem, ((tokens, config),)))
        overload = getattr(torch.ops.autofuse, op.name).default
        overload(*args, plan)
        torch.cuda.synchronize()
        cudart.cudaProfilerStart()
        overload(*args, plan)
        torch.cuda.synchronize()
        cudart.cudaProfilerStop()


def profiled(command: Sequence[str]) -> list[dict[str, Any]]:
    """Metrics of each launch of one of our kernels, in order."""
    ncu = shutil.which("ncu") or sys.exit("profile_ops.py: ncu (Nsight Compute) is not on PATH")
    options = [
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
    ]
    kernels = ["--kernel-name", f"regex:^({'|'.join(OPS)})$"]
    metrics = ["--metrics", ",".join([*METRICS, f"regex:{STALL}.*{STALL_END}"])]
    done = subprocess.run([ncu, *options, *kernels, *metrics, *command], stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or not lines:
        sys.exit(f"profile_ops.py: ncu failed:\n{done.stdout[-2000:]}")
    first, *rest = csv.DictReader(io.StringIO("\n".join(lines)))
    del first  # units
    return [_of_launch(row) for row in rest]


def _of_launch(row: Mapping[str, str]) -> dict[str, Any]:
    values = {name: float(row[metric].replace(",", "")) for metric, name in METRICS.items() if row.get(metric)}
    values["us"] /= 1e3  # of ns
    stalls = {
        name.removeprefix(STALL).removesuffix(STALL_END): float(value)
        for name, value in row.items()
        if name.startswith(STALL) and not name.startswith(f"{STALL}selected")
    }
    total = sum(stalls.values()) or 1.0
    most = sorted(stalls, key=lambda name: -stalls[name])[:3]
    return {**values, "stalls": {name: round(stalls[name] / total, 3) for name in most}}


def shown(rows: Sequence[Mapping[str, Any]]) -> Grid:
    names = [name for name in METRICS.values() if name != "instructions"]
    grid = Grid("row", *names, "stalls", box=None)
    for row in rows:
        stalls = ", ".join(f"{name} {share:.0%}" for name, share in row["stalls"].items())
        grid.add_row(
            f"{row['table']} T={row['tokens']}", *(f"{row.get(name, float('nan')):.3g}" for name in names), stalls
        )
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", help="only those of these names, all their rows")
    parser.add_argument("--json", type=Path, default=PEERS.parent, help="folder of bench_ops.py's results")
    parser.add_argument("--launch", action="store_true", help="launch the rows: what ncu runs")
    options = parser.parse_args()
    device, results = parse_device("cuda"), Results(options.json)
    names = options.tables.split(",") if options.tables else None
    tables = [table for table in load_tables() if names is None or table.name in names]
    rows = recorded_rows(tables, results, missed_only=names is None)
    if not rows:
        sys.exit(f"profile_ops.py: no such row in {options.json}")
    if options.launch:
        launch_each(rows, device)
        return
    child = [sys.executable, __file__, "--launch", "--json", str(options.json)]
    found = profiled([*child, *(["--tables", options.tables] if options.tables else [])])
    if len(found) != len(rows):
        sys.exit(f"profile_ops.py: {len(rows)} rows, but {len(found)} launches were profiled")
    of_rows = [
        {"table": table.name, "tokens": tokens, "config": str(config), **metrics}
        for (table, tokens, config), metrics in zip(rows, found, strict=True)
    ]
    Console(width=240).print(shown(of_rows))
    results.write(results.folder / "ncu.json", {**facts(rows[0][0].problem, device), "rows": of_rows})


if __name__ == "__main__":
    main()
