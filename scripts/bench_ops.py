#!/usr/bin/env python3
"""Times fused ops beside eager PyTorch, torch.compile, torch.compile with every tuning option, and recorded peers.

    python scripts/bench_ops.py --tokens 1,64,2048                     # one op of a model, or --problem '...'
    python scripts/bench_ops.py --tables --json benchmarks/h200        # every table of benchmarks/h200/peers.json
    python scripts/bench_ops.py --tables --gpus 4 --effort quick       # its rows shared out over four GPUs
    python scripts/bench_ops.py --tables --recorded --effort quick     # all rows anew, from the recorded configs on
    python scripts/bench_ops.py --tables rope_kv_cache_8_1,mla_v_up_quant_h16 --resume --json benchmarks/h200
    python scripts/bench_ops.py --tables --device cpu --tokens 1,64 --effort quick --no-compile-plus --json benchmarks/cpu
    python scripts/bench_ops.py --chain --json benchmarks/h200         # recorded configs between GEMMs, PDL on and off
    python scripts/bench_ops.py --markdown                             # writes the results into docs/performance.md

What is not tuned yet is tuned first (into --database). All functions of a row are measured in turns, over inputs that
rotate beyond the last-level cache; the median counts. On a GPU that is device time, by replaying a CUDA graph; on a
CPU it is the time of a call. docs/performance.md says what each column means. Rows are recorded as they are measured;
one that fails, be it by taking the process down, is a row with an error, and the rest goes on.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from autofuse.cache_db import TunedDatabase, Winner
from autofuse.errors import BadInput
from autofuse.models import model_config
from autofuse.ops import Config, Problem, get_op
from autofuse.targets import parse_device, target_of
from autofuse.tuner.budgets import EFFORTS
from bench.chain import chain_times
from bench.measuring import free_memory
from bench.running import RowRun, facts, run_workers, source_hash
from bench.showing import DOCUMENT, markdown, replace_generated, summary_lines, terminal_table
from bench.tables import PEERS, SMALL_TOKENS, Results, Table, load_tables, summary


def measure(tables: list[Table], results: Results, options: argparse.Namespace) -> int:
    """Measures this process's share of the rows; returns an exit code."""
    device, (shard, shards) = parse_device(options.device), map(int, (options.shard or "0/1").split("/"))
    with TunedDatabase(options.database) as database:
        run = RowRun(device, EFFORTS[options.effort], database, results, not options.no_compile_plus)
        run.say = lambda text: print(f"{shard}: {text}" if shards > 1 else text, flush=True)
        return run.run(all_rows(tables)[shard::shards])


def propose(tables: list[Table], results: Results, options: argparse.Namespace) -> None:
    """Lets the tuner begin with the recorded configs: it takes winners of other sources for proposals."""
    target = target_of(parse_device(options.device))
    with TunedDatabase(options.database) as database:
        provenance = database.record_provenance({"config": "recorded"})
        for table, tokens in all_rows(tables):
            row = results.read(table.name)["rows"].get(str(tokens), {})
            if "config" in row:
                times = (row["us"]["ours"], row["spread_us"], "eager", row["us"]["eager"], 1.0, 1.0, 1.0)
                config = Config.parse(row["config"])
                winner = Winner(target, table.problem, tokens, config, "recorded", *times, provenance)
                database.record_winner(winner)


def all_rows(tables: list[Table]) -> list[tuple[Table, int]]:
    return [(table, tokens) for table in tables for tokens in table.tokens]


def worker_command(tables: list[Table], results: Results, options: argparse.Namespace) -> list[str]:
    """What ``run_workers`` runs: this script again."""
    command = [sys.executable, __file__, "--tables", ",".join(table.name for table in tables)]
    command += ["--peers", str(options.peers), "--json", str(results.folder)]
    command += ["--device", options.device, "--effort", options.effort]
    command += ["--tokens", options.tokens] if options.tokens else []
    command += ["--no-compile-plus"] if options.no_compile_plus else []
    return [*command, *(["--database", str(options.database)] if options.database else [])]


def chains(tables: list[Table], results: Results, options: argparse.Namespace) -> None:
    """Times the recorded configs that launch programmatically between GEMMs, with and without that."""
    device, rows = parse_device(options.device), []
    for table in tables:
        for key, row in results.read(table.name)["rows"].items():
            config = Config.parse(row.get("config", ""))
            if int(key) > SMALL_TOKENS or not config.get("PDL", 0):
                continue
            times = chain_times(table.problem, int(key), config, device, EFFORTS[options.effort])
            free_memory(device)
            rows.append({"table": table.name, "tokens": int(key), **times})
            us = times["us"]
            print(f"{table.name} T={key}: plain {us['plain']:.3g} µs, PDL {us['pdl']:.3g}, GEMMs {us['gemm']:.3g}")
    Results.write(results.folder / "chain.json", {**facts(tables[0].problem, device), "rows": rows})


def spent(tables: list[Table], results: Results) -> str:
    """What the rows took to make, in a line: s of all processes together."""
    rows = [row for table in tables for row in results.read(table.name)["rows"].values()]
    sums = {name: sum(row.get("seconds", {}).get(name, 0) for row in rows) for name in ("tune", "compile", "measure")}
    return "spent: " + ", ".join(f"{seconds:.0f} s to {name}" for name, seconds in sums.items())


def chosen_tables(options: argparse.Namespace) -> list[Table]:
    """The tables that were asked for. Raises BadInput."""
    tables = load_tables(options.peers)
    if options.tables is not None or options.chain or options.markdown:
        names = [name for name in (options.tables or "").split(",") if name] or [table.name for table in tables]
        if unknown := set(names) - {table.name for table in tables}:
            raise BadInput(f"--tables: {options.peers} has no {', '.join(sorted(unknown))}")
        chosen = [table for table in tables if table.name in names]
        return [replace(table, tokens=tokens_of(options.tokens)) for table in chosen] if options.tokens else chosen
    if options.problem:
        problem = Problem.parse(options.problem)
    else:
        (problem, *_) = get_op(options.op).model_problems(model_config(options.model), options.dtype)
    known = next((table for table in tables if table.problem == problem), Table(problem.op, problem, ()))
    return [replace(known, tokens=tokens_of(options.tokens or "1,64,2048"))]


def tokens_of(text: str) -> tuple[int, ...]:
    """``1,64`` as numbers. Raises BadInput."""
    try:
        return tuple(int(count) for count in text.split(","))
    except ValueError:
        raise BadInput(f"--tokens {text!r} is not a list of numbers such as 1,64") from None


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one = parser.add_argument_group("one problem")
    one.add_argument("--op", default="mla_dual_rms_norm")
    one.add_argument("--model", default="deepseek-v3")
    one.add_argument("--problem", help="a problem as `autofuse show` prints it, instead of --op and --model")
    one.add_argument("--dtype", default="bf16")
    many = parser.add_argument_group("tables")
    many.add_argument("--tables", nargs="?", const="", help="all tables, or those of these names")
    many.add_argument("--peers", type=Path, default=PEERS, help="the file that lists them")
    many.add_argument("--gpus", type=int, default=1, help="GPUs that share the rows")
    many.add_argument("--resume", action="store_true", help="keep rows of the present kernels that did not fail")
    many.add_argument("--recorded", action="store_true", help="tune beginning with the recorded configs, all rows anew")
    many.add_argument("--shard", help="I/N: measure only this process's rows; what --gpus starts")
    many.add_argument("--chain", action="store_true", help="time recorded configs between GEMMs, with and without PDL")
    many.add_argument("--markdown", action="store_true", help=f"write the results in --json into {DOCUMENT.name}")
    parser.add_argument("--tokens", help="T of the rows, such as 1,64: in place of a table's own, or of 1,64,2048")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--effort", default="default", choices=sorted(EFFORTS))
    parser.add_argument("--no-compile-plus", action="store_true", help="leave out that column, which takes the longest")
    parser.add_argument("--database", type=Path)
    parser.add_argument("--json", type=Path, help="folder of the results: a file for each table, and summary.json")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(format="%(message)s")
    options = parsed()
    tables = chosen_tables(options)
    if options.markdown:
        results = Results(options.json or PEERS.parent)
        generated = markdown(tables, results)
        DOCUMENT.write_text(replace_generated(DOCUMENT.read_text(encoding="utf-8"), generated), encoding="utf-8")
        results.write(results.folder / "summary.json", summary(tables, results))
        return
    with tempfile.TemporaryDirectory() as scratch:
        results = Results(options.json or Path(scratch))
        if options.shard:
            sys.exit(measure(tables, results, options))
        if options.chain:
            chains(tables, results, options)
            return
        device = parse_device(options.device)
        if options.recorded:
            options.database = options.database or Path(scratch) / "tuned.db"
            propose(tables, results, options)
        for table in tables:
            results.keep(table.name, source_hash(table.problem, device) if options.resume else None)
        if options.tables is None:
            measure(tables, results, options)
        else:
            run_workers(worker_command(tables, results, options), results, all_rows(tables), options.gpus)
        console = Console(width=200)
        for table in tables:
            console.print(terminal_table(table, results))
        found = summary(tables, results)
        print("\n".join([*summary_lines(found), spent(tables, results)]))
        if options.tables is not None:
            results.write(results.folder / "summary.json", found)


if __name__ == "__main__":
    main()
