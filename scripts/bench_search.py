#!/usr/bin/env python3
"""Compares the tuner's search with others on spaces whose configs were all measured, and records such spaces.

    python scripts/bench_search.py                                    # replay benchmarks/search/*/*.json
    python scripts/bench_search.py --spaces benchmarks/search/cpu --strategies autofuse,random --seeds 10
    python scripts/bench_search.py --record mla_v_up_quant --tokens 64 --most 400 --model deepseek-v3

A replay looks up in the file what a config took; no kernel runs. Counted are the configs that a search measures until
one is within 3 % of the best of the file: the median over --seeds seeds, the share of them that get there within
--trials. Kernel Tuner's strategies run in its own simulation mode (pip install --constraint constraints.txt
kernel-tuner), and optuna's samplers, where their needs are installed (scipy, cmaes).

--record measures every config of an op's space as the tuner does, correctness first, or a random subset of --most;
the file holds µs, or how the config failed, and where it was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autofuse.errors import AutofuseError, BadInput
from search.kernel_tuner import kernel_tuner_strategies
from search.recorded import Recorded
from search.recording import record
from search.strategies import OPTUNA, SIMPLE, Strategy

FOLDER = Path(__file__).parents[1] / "benchmarks" / "search"
NEAR = 1.03


def trials_to_near(recorded: Recorded, strategy: Strategy, trials: int, seed: int) -> float:
    """How many configs are measured until one is near the best; infinite if none is within ``trials``."""
    for count, config in enumerate(strategy(recorded, trials, seed), 1):
        if recorded.times.get(config, math.inf) <= NEAR * recorded.best_us:
            return count
        if count >= trials:
            break
    return math.inf


def replay(spaces: Sequence[Recorded], strategies: dict[str, Strategy], options: argparse.Namespace) -> list[Any]:
    rows = []
    for recorded in spaces:
        for name, strategy in strategies.items():
            start = time.perf_counter()
            try:
                counts = [trials_to_near(recorded, strategy, options.trials, seed) for seed in range(options.seeds)]
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            reached = sum(count < math.inf for count in counts) / len(counts)
            median = statistics.median_high(counts)
            rows.append(
                {
                    "space": recorded.name,
                    "problem": str(recorded.problem),
                    "target": recorded.target,
                    "strategy": name,
                    "median_trials": None if math.isinf(median) else median,
                    "reached": reached,
                    "seconds": time.perf_counter() - start,
                }
            )
    return rows


def show(rows: Sequence[dict[str, Any]], spaces: Sequence[Recorded], trials: int) -> None:
    console = Console(width=max(100, Console().width))
    for recorded in spaces:
        subset = "" if len(recorded.outcomes) == recorded.size else f", a random subset of {recorded.size}"
        near = sum(time_us <= NEAR * recorded.best_us for time_us in recorded.times.values())
        title = f"{recorded.name} on {recorded.target}: {len(recorded.outcomes)} configs{subset}, {near} near the best"
        table = Table("strategy", "median trials", "reached", title=title)
        mine = [row for row in rows if row["problem"] == str(recorded.problem) and row["space"] == recorded.name]
        for row in sorted(mine, key=lambda row: (row["median_trials"] or math.inf, -row["reached"])):
            table.add_row(row["strategy"], str(row["median_trials"] or f"> {trials}"), f"{row['reached']:.0%}")
        console.print(table)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", type=Path, nargs="*", default=[FOLDER], help="files, or folders of them")
    parser.add_argument("--strategies", help="names, separated by commas; all unless given")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--trials", type=int, default=96)
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--record", metavar="OPS", help="measure these ops' spaces, separated by commas")
    parser.add_argument("--tokens", default="64", help="with --record: token counts, separated by commas")
    parser.add_argument("--model", default="deepseek-v3", help="with --record: whose problems")
    parser.add_argument("--most", type=int, default=400, help="with --record: configs of a space at most")
    parser.add_argument("--device", default="auto", help="with --record")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="with --record: where the files go")
    return parser.parse_args()


def loaded(paths: Sequence[Path]) -> list[Recorded]:
    files = [file for path in paths for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise BadInput(f"no spaces in {', '.join(map(str, paths))}: record some with --record")
    return [Recorded.load(file) for file in files]


def chosen(names: str | None) -> dict[str, Strategy]:
    every = {**SIMPLE, **OPTUNA, **kernel_tuner_strategies()}
    if names is None:
        return every
    wanted = [name.strip() for name in names.split(",")]
    if unknown := set(wanted) - every.keys():
        raise BadInput(f"strategy {min(unknown)!r} is none of {', '.join(every)} (installed ones)")
    return {name: every[name] for name in wanted}


def main() -> None:
    options = parsed()
    try:
        if options.record:
            for path in record(options):
                print(path)
            return
        spaces = loaded(options.spaces)
        rows = replay(spaces, chosen(options.strategies), options)
    except AutofuseError as error:
        sys.exit(f"bench_search: {error}")
    show(rows, spaces, options.trials)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
