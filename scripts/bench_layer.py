#!/usr/bin/env python3
"""Times a decoder's MLA attention layer: eagerly, through torch.compile, and through torch.compile(backend="autofuse").

    python scripts/bench_layer.py --json benchmarks/h200/mla_layer.json      # DeepSeek-V3's widths, TP 8
    python scripts/bench_layer.py --tokens 1,16 --core without               # a part; rows of the file that are not
                                                                             # measured now stay
    python scripts/bench_layer.py --small --tokens 1,4 --effort quick        # on any machine, within minutes

The layer (scripts/mla_layer.py) is measured with attention over --context tokens and without. Its sites are tuned
first (into --database). Columns beside these three: the layer with each fusion alone ("+name"), on a GPU with the same
configs launched plainly, and its matrix products alone, which only fuse_mla_q_absorb and fuse_attn_quant can speed up.
What each kernel takes is recorded as well. All functions of a row are measured in turns, over weights and inputs that
rotate beyond the last-level cache; the median counts. On a GPU that is device time, by replaying a CUDA graph; on a CPU
it is the time of a call.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from autofuse.cache_db import TunedDatabase
from autofuse.graph.explain import explain
from autofuse.graph.fusions import FUSIONS
from autofuse.graph.report import GraphReport
from autofuse.graph.report_store import last_reports
from autofuse.ops import Problem, get_op
from autofuse.targets import Target, parse_device, target_of
from autofuse.tuner.budgets import EFFORTS, Effort
from autofuse.tuner.devices import tune_on_devices
from autofuse.tuner.job import Bucket, provenance_of
from autofuse.tuner.measure import Ring, gain, interleave, runner
from bench.chain import launched_plainly
from mla_layer import (
    DEEPSEEK_V3_TP8,
    SMALL,
    Inputs,
    Weights,
    Widths,
    gemms,
    mla_layer,
    random_inputs,
    random_weights,
)

TO_REACH = {1: 1.18, 16: 1.15, 64: 1.22, 256: 1.33}
"""The layer without attention on an H200: torch.compile's time ÷ autofuse's, by T."""
MOST_BYTES = 8 << 30  # of a row's weights and inputs
MOST_SETS = 8
UNTUNED: dict[str, Any] = {"autofuse.untuned": "skip"}
DTYPE = torch.bfloat16


class Layer(torch.nn.Module):
    """Holds a layer's weights as a model does: as parameters, which its graph knows to be constant."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for name, weight in weights._asdict().items():
            self.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))


Call = Callable[[Layer, Inputs], Any]


def layer_call(widths: Widths, core: bool) -> Call:
    """The layer as a function with a code object of its own: Dynamo keeps what it compiles by code object."""

    def call(layer: Layer, inputs: Inputs) -> Any:
        return mla_layer(widths, layer, inputs, core)

    return types.FunctionType(call.__code__.replace(), globals(), "layer", None, call.__closure__)


def compiled(widths: Widths, core: bool, options: dict[str, Any] | None) -> Call:
    """Through Inductor (``options`` None) or autofuse, with static shapes."""
    if options is None:
        return torch.compile(layer_call(widths, core), dynamic=False, fullgraph=True)
    return torch.compile(layer_call(widths, core), dynamic=False, fullgraph=True, backend="autofuse", options=options)


def rings(
    widths: Widths, tokens: int, context: int, device: torch.device, effort: Effort
) -> tuple[Ring, tuple[Layer, Inputs]]:
    """Layers and inputs for consecutive calls, beyond the last-level cache if they fit memory; the first of them."""
    generator = torch.Generator(device).manual_seed(1)

    def one() -> tuple[Layer, Inputs]:
        inputs = random_inputs(widths, tokens, context, DTYPE, device, generator)
        return Layer(random_weights(widths, DTYPE, device, generator)), inputs

    first = one()
    size = sum(tensor.nbytes for tensor in (*first[0].parameters(), *first[1]))
    count = min(-(-effort.ring_bytes // size) + 1, MOST_BYTES // size, MOST_SETS)
    return Ring.of([first, *(one() for _ in range(count - 1))], device), first


def tuned_fusions(
    call: Call, args: tuple[Layer, Inputs], options: dict[str, Any], device: torch.device, effort: Effort
) -> list[str]:
    """Tunes what the layer's graph has, into the database that ``options`` names; the fusions that match there."""
    explanation = explain(torch.compile(call, backend="autofuse", dynamic=False, options=options), *args)
    sites = [site for graph in explanation.graphs for site in graph.sites]
    found = (Bucket(Problem.parse(site.problem), int(site.tokens)) for site in sites if site.problem)
    buckets = list(dict.fromkeys(found))
    with TunedDatabase(options.get("autofuse.database")) as database:
        tune_on_devices(buckets, [device], database, effort)
    return [*dict.fromkeys(site.fusion for site in sites)]


def plainly_launched(database: Path | None, to: Path, target: Target) -> None:
    """Copies a device's winners into another database, without programmatic launch."""
    with TunedDatabase(database) as source, TunedDatabase(to) as copy:
        provenance = copy.record_provenance({"launched": "plainly"})
        for winner in source.winners(target=target):
            config = winner.config
            if config.get("PDL", 0):
                config = launched_plainly(get_op(winner.problem.op), winner.problem, config)
            copy.record_winner(replace(winner, config=config, provenance=provenance))


def measured_row(
    widths: Widths, tokens: int, context: int, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """One row: µs by column, the gain over torch.compile, and what became of each site."""
    effort, core = EFFORTS[options.effort], context > 0
    database = {} if options.database is None else {"autofuse.database": str(options.database)}
    everything = {"autofuse.level": "O3", **UNTUNED, **database}
    ring, first = rings(widths, tokens, context, device, effort)
    names = tuned_fusions(layer_call(widths, core), first, everything, device, effort)

    variants: dict[str, dict[str, Any] | None] = {"compile": None, "autofuse": everything}
    if not options.no_single:
        variants |= {f"+{name}": {**everything, "autofuse.level": "O0", f"autofuse.{name}": True} for name in names}
    if device.type == "cuda":
        plain = Path(tempfile.mkdtemp()) / "plain.db"
        plainly_launched(options.database, plain, target_of(device))
        variants["launched plainly"] = {**everything, "autofuse.database": str(plain)}
    calls: dict[str, Callable[..., Any]] = {"eager": layer_call(widths, core)}
    reports: dict[str, GraphReport] = {}
    expected = calls["eager"](*first)
    errors = {}
    for name, settings in variants.items():
        calls[name] = compiled(widths, core, settings)
        errors[name] = _error(calls[name](*first), expected)
        if settings is not None:
            reports[name] = last_reports()[-1]
    # Where nothing was fused, the code is torch.compile's.
    calls = {name: call for name, call in calls.items() if name not in reports or reports[name].fused}
    calls["GEMMs alone"] = lambda layer, inputs: gemms(widths, layer, inputs)

    prepared = [runner(call, ring, device, effort) for call in calls.values()]
    timings = dict(zip(calls, interleave(prepared, effort.final_rounds), strict=True))
    timings.setdefault("autofuse", timings["compile"])
    ratio = gain(timings["compile"], timings["autofuse"])
    report = reports["autofuse"]
    return {
        "us": {name: timing.median_us for name, timing in timings.items()},
        "spread_us": {name: timing.spread_us for name, timing in timings.items()},
        "gain": ratio.median,
        "gain_low": ratio.low,
        "gain_high": ratio.high,
        "to_reach": None if core or widths is not DEEPSEEK_V3_TP8 else TO_REACH.get(tokens),
        "error": errors,
        "kernels_us": {name: kernel_times(calls[name], ring) for name in ("compile", "autofuse") if name in calls},
        "context": context,
        "sets": len(ring.sets),
        "sites": [
            {key: site[key] for key in ("fusion", "op", "fused", "plan_text", "rule", "reason", "gain")}
            for site in map(asdict, report.sites)
        ],
        "near_misses": [str(miss) for miss in report.near_misses],
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "provenance": provenance(device),
    }


def kernel_times(call: Call, ring: Ring) -> dict[str, float]:
    """What each kernel of a call takes on the GPU, in µs, the longest first; kernels of one name together.

    Without the gaps between them, which the CUDA graph's time has. Empty without a GPU.
    """
    if ring.pool is None:
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for args in ring.sets:
            call(*args)
    times: Counter[str] = Counter()
    for event in recorded.events() or ():
        if event.device_type == DeviceType.CUDA:
            times[event.name] += event.device_time / len(ring.sets)
    return dict(times.most_common())


def _error(results: Any, expected: Any) -> float:
    """The largest difference of two results, relative to the largest element: roundings of bf16 and FP8 differ."""
    return max(
        ((out.float() - right.float()).abs().max() / right.float().abs().max()).item()
        for out, right in zip(results, expected, strict=True)
    )


def facts(widths: Widths, device: torch.device) -> dict[str, Any]:
    """What holds for all rows."""
    return {"widths": widths.__dict__, "dtype": "bf16", "target": str(target_of(device))}


def provenance(device: torch.device) -> dict[str, Any]:
    """Of a row: rows of one file may be of several days and machines."""
    ops = [fusion.op for fusion in FUSIONS if fusion.op]
    hashes = {op: get_op(op).source_hash(target_of(device).kind) for op in ops}
    return {**provenance_of(device), "source_hashes": hashes}


def record(path: Path, known: dict[str, Any], section: str, tokens: int, row: dict[str, Any]) -> None:
    """Adds or replaces one row of a file, whose other rows stay."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    rows = content["rows"]
    rows.setdefault(section, {})[str(tokens)] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**known, "rows": rows}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def shown(title: str, rows: dict[int, dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row["us"]))
    table = Table(title=title)
    for column in ("T", *columns, "gain", "to reach", "fused"):
        table.add_column(column, justify="right")
    for tokens, row in rows.items():
        fused = [site["op"] for site in row["sites"] if site["fused"]]
        table.add_row(
            str(tokens),
            *(f"{row['us'][name]:.4g}" if name in row["us"] else "–" for name in columns),
            f"{row['gain']:.3f} [{row['gain_low']:.3f}, {row['gain_high']:.3f}]",
            f"{row['to_reach']:.2f}" if row["to_reach"] else "–",
            f"{len(fused)} of {len(row['sites'])}",
        )
    return table


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,16,64,256")
    parser.add_argument("--core", default="both", choices=("both", "with", "without"), help="the attention itself")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each sequence")
    parser.add_argument("--small", action="store_true", help="narrow widths, for a machine without a GPU")
    parser.add_argument("--no-single", action="store_true", help="leave out the columns of each fusion alone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--effort", default="default", choices=sorted(EFFORTS))
    parser.add_argument("--database", type=Path)
    parser.add_argument("--json", type=Path, help="the file of the results; its rows that are not measured now stay")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    device, widths = parse_device(options.device), SMALL if options.small else DEEPSEEK_V3_TP8
    known, console = facts(widths, device), Console(width=220)
    sections = {"without core": 0, f"with core, {options.context} tokens": options.context}
    chosen = {"both": (0, 1), "without": (0,), "with": (1,)}[options.core]
    with torch.no_grad():
        for section, context in [list(sections.items())[index] for index in chosen]:
            rows = {}
            for tokens in map(int, options.tokens.split(",")):
                rows[tokens] = measured_row(widths, tokens, context, options, device)
                if options.json:
                    record(options.json, known, section, tokens, rows[tokens])
                error = max(rows[tokens]["error"].values())
                print(f"{section}, T={tokens}: {rows[tokens]['gain']:.3f}×, error {error:.2g}", flush=True)
            console.print(shown(f"MLA layer {section} on {target_of(device)}, µs", rows))


if __name__ == "__main__":
    main()
