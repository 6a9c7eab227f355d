#!/usr/bin/env python3
"""Times the graph pass, by phase, and the whole compilation of decoders of 4, 16 and 61 layers.

    python scripts/bench_pass.py --json benchmarks/cpu/graph_pass.json
    python scripts/bench_pass.py --layers 4,16 --whole 4 --profile   # where the time of the largest pass goes

A layer is scripts/mla_layer.py's attention, without its core, with small widths and a residual around it; each has
weights and a cache of its own. All times are CPU time, which other processes on the machine do not change. The pass is
timed while everything of a compilation runs but Inductor's code generation, the least of --repeats counts; the whole
compilation, the C++ compiler's runs included, with nothing cached, once, only for up to --whole layers. Kernels of
autofuse are left out of both.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import os
import platform
import pstats
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table as RichTable

from autofuse.graph import graph_pass
from autofuse.graph.backend import Watch, watching
from autofuse.graph.decide import Decider
from autofuse.graph.fusions import FUSIONS
from autofuse.graph.graph_pass import FusionPass
from autofuse.graph.report import GraphReport
from autofuse.runtime.dispatch import registry
from mla_layer import SMALL, Inputs, Weights, mla_layer, random_inputs, random_weights

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from models import without_code_generation

LAYERS = (4, 16, 61)
MOST_SHARE = 0.02
"""The pass ÷ the whole compilation, at most."""
FUSE = {"autofuse.level": "O3", "autofuse.untuned": "fuse"}
PHASES = ("recognise", "match", "decide", "rewrite", "report")
TOKENS = 4


@dataclass
class Row:
    """What was measured of a graph.

    Attributes:
        nodes: of the graph, as the pass gets it.
        fused: sites.
        pass_ms: the whole pass; ``phases_ms``: by phase.
        whole_s: the compilation with Inductor's code generation; None if not measured.
    """

    layers: int
    nodes: int = 0
    fused: int = 0
    pass_ms: float = 0.0
    phases_ms: dict[str, float] = field(default_factory=dict)
    whole_s: float | None = None

    @property
    def share(self) -> float | None:
        return None if self.whole_s is None else self.pass_ms * 1e-3 / self.whole_s


def decoder(layers: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(a function of hidden states, all layers' weights and inputs; its arguments)"""
    generator = torch.Generator().manual_seed(0)
    device, dtype = torch.device("cpu"), torch.bfloat16
    weights = [random_weights(SMALL, dtype, device, generator) for _ in range(layers)]
    first = random_inputs(SMALL, TOKENS, 0, dtype, device, generator)
    caches = [first.kv_cache.clone() for _ in range(layers)]

    def model(hidden: torch.Tensor, weights: list[Weights], shared: Inputs, caches: list[torch.Tensor]) -> Any:
        queries = []
        for each, cache in zip(weights, caches, strict=True):
            inputs = shared._replace(hidden=hidden, kv_cache=cache)
            added, query = mla_layer(SMALL, each, inputs, core=False)
            hidden = hidden + added
            queries.append(query)
        return hidden, queries

    return model, (first.hidden, weights, first, caches)


def measure_pass(layers: int, repeats: int, profile: cProfile.Profile | None = None) -> Row:
    """The fastest of ``repeats`` passes over the graph of so many layers."""
    rows = []
    for _ in range(repeats):
        model, args = decoder(layers)
        clock = _Clock(profile)
        with clock.running(), without_code_generation(), torch.no_grad():
            report = _compiled(model, args)
        clock.seconds["decide"] -= clock.seconds["kernels"]
        phases = {phase: 1e3 * clock.seconds[phase] for phase in PHASES}
        whole = 1e3 * (clock.seconds["pass"] - clock.seconds["kernels"])
        rows.append(Row(layers, clock.nodes, report.fused, whole, phases))
    return min(rows, key=lambda row: row.pass_ms)


def measure_whole(layers: int) -> float:
    """Seconds of a compilation from Dynamo to loaded code."""
    model, args = decoder(layers)
    torch._dynamo.reset()
    # Without workers: what they take is only known once they end.
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1), torch.no_grad():
        begin = _cpu_seconds()
        _compiled(model, args)
        return _cpu_seconds() - begin


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _compiled(model: Callable[..., Any], args: tuple[Any, ...]) -> GraphReport:
    watch = Watch()
    token = watching.set(watch)
    try:
        torch.compile(model, backend="autofuse", fullgraph=True, dynamic=False, options=FUSE)(*args)
    finally:
        watching.reset(token)
    (report,) = watch.reports
    return report


class _Clock:
    """Adds up the time of the pass's phases while ``running``."""

    def __init__(self, profile: cProfile.Profile | None) -> None:
        self.seconds: Counter[str] = Counter()
        self.nodes = 0
        self._profile = profile

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(graph_pass, "recognise", self._timed("recognise", graph_pass.recognise)))
            stack.enter_context(patch.object(graph_pass, "_rewrite", self._timed("rewrite", graph_pass._rewrite)))
            for phase, name in (("decide", "decide"), ("kernels", "_with_kernels")):
                stack.enter_context(patch.object(Decider, name, self._timed(phase, getattr(Decider, name))))
            for name in ("_site_report", "_near_miss_reports"):
                stack.enter_context(patch.object(FusionPass, name, self._timed("report", getattr(FusionPass, name))))
            for fusion in FUSIONS:
                for name in ("match", "near_misses"):
                    timed = self._timed("match", getattr(type(fusion), name))
                    stack.enter_context(patch.object(type(fusion), name, timed))
            stack.enter_context(patch.object(FusionPass, "_run", self._counted(FusionPass._run)))
            yield

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[phase] += time.thread_time() - begin

        return call

    def _counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(this: FusionPass, graph: torch.fx.Graph) -> Any:
            self.nodes = len(graph.nodes)
            with self._profile or contextlib.nullcontext():
                return self._timed("pass", run)(this, graph)

        return call


def show(console: Console, rows: list[Row]) -> None:
    table = RichTable(title="The pass, ms", title_justify="left")
    for column in ("layers", "nodes", "fused", *PHASES, "pass", "a layer", "whole, s", "share"):
        table.add_column(column, justify="right")
    for row in rows:
        phases = [f"{row.phases_ms[phase]:.1f}" for phase in PHASES]
        whole = "–" if row.whole_s is None else f"{row.whole_s:.1f}"
        share = "–" if row.share is None else f"{row.share:.2%}"
        counts = [str(row.layers), str(row.nodes), str(row.fused)]
        table.add_row(*counts, *phases, f"{row.pass_ms:.1f}", f"{row.pass_ms / row.layers:.2f}", whole, share)
    console.print(table)
    for row in rows:
        if row.share is not None and row.share > MOST_SHARE:
            console.print(f"{row.layers} layers: the pass takes more than {MOST_SHARE:.0%} of the compilation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=",".join(map(str, LAYERS)))
    parser.add_argument("--whole", type=int, default=max(LAYERS), help="whole compilations of up to so many layers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print where the time of the largest pass goes")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()

    registry.go_native()
    measure_pass(1, 1)  # what is compiled or loaded but once is no part of it
    rows = []
    for layers in sorted(map(int, options.layers.split(","))):
        row = measure_pass(layers, options.repeats)
        if layers <= options.whole:
            row.whole_s = measure_whole(layers)
        rows.append(row)
        print(f"{layers} layers measured", file=sys.stderr, flush=True)
    show(Console(width=None if sys.stdout.isatty() else 160), rows)
    if options.profile:
        profile = cProfile.Profile(time.thread_time)
        measure_pass(rows[-1].layers, 1, profile)
        pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
    if options.json:
        facts = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        content = {**facts, "torch": torch.__version__, "rows": [{**asdict(row), "share": row.share} for row in rows]}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
