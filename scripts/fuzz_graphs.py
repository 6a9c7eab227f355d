#!/usr/bin/env python3
"""Fuzzes the graph passes: random layers and mutants of their graphs, fused wherever a fusion matches, then compared.

    python scripts/fuzz_graphs.py --layers 200                 # seeds 0 to 199, and 9 mutants of each, on the CPU
    python scripts/fuzz_graphs.py --seed 5000 --layers 20 --mutants 0 --json fuzz.json
    python scripts/fuzz_graphs.py --layers 2000 --jobs 64      # in so many processes of one thread each
    python scripts/fuzz_graphs.py --inductor --layers 20       # with Inductor's own code for the rest of each graph
    python scripts/fuzz_graphs.py --case 4711                  # one layer: its text, its report, what differs
    python scripts/fuzz_graphs.py --case 4711/3                # its third mutant: its changes, its graph, its report

A layer (random_layers.py) is compiled with every fusion on, and compared with eager PyTorch: its results, and its
arguments, which it may have changed. Rows that are left as they were must be so to the bit. Without --inductor
everything of a compilation runs but Inductor's code generation: the graph that Inductor would get is run as it is. A
mutant (graph_mutants.py) is a layer's post-grad graph with some changes; run with the pass, it is compared with itself
run without. Its results may be badly conditioned, such as a softmax of large numbers: an element that differs by more
than the tolerance is wrong if it also differs by more than noise of one unit in the last place of all that the graph
computes moves it. --case cuts a wrong layer down to what it stays wrong with. A seed whose process dies is wrong. Exits
with 1 if any case is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch._dynamo
from rich.console import Console
from rich.table import Table
from torch._guards import detect_fake_mode
from torch._inductor.fx_passes.post_grad import decompose_auto_functionalized
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
from torch._inductor.fx_utils import FakeTensorUpdater
from torch._inductor.virtualized import V
from torch.fx import Graph, GraphModule

from autofuse.graph.backend import Watch, watching
from autofuse.graph.decide import Knowledge
from autofuse.graph.graph_pass import FusionPass
from autofuse.graph.origin import Origins
from autofuse.graph.report import GraphReport
from autofuse.graph.settings import Settings
from autofuse.runtime.dispatch import registry
from fuzz_workers import run_seeds
from graph_mutants import arguments_of, mutated, run_graph
from layer_dialects import TABLE_ROWS, layer_caches, layers_known
from random_layers import Layer, draw_layer

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from models import without_code_generation

CPU = torch.device("cpu")
FUSE = {"autofuse.level": "O3", "autofuse.untuned": "fuse"}
TOLERANCE = {"float32": 2e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""Of the error of an element, in units of its size plus the tensor's root mean square."""
FP8_STEP = 2.0**-3  # between neighbours, in units of the smaller
NOISY_RUNS = 8  # that show what roundings can do to an element
UNSEEN = 2.0  # so many times as far as in the worst of these runs it may move in another


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        case: ``seed`` of a layer, or ``seed/number`` of a mutant of it.
        reports: of the graphs that were compiled.
        wrong: what differs, or the exception that is not raised without the passes; "" if it is right.
        invalid: what is raised without them: the case counts for nothing.
        graph: before the passes.
        changes: of a mutant.
    """

    case: str
    reports: tuple[GraphReport, ...] = ()
    wrong: str = ""
    invalid: str = ""
    graph: Graph | None = None
    changes: tuple[str, ...] = ()


@dataclass
class Summary:
    """What became of many cases.

    Attributes:
        fused: sites by their op; ``refused``, ``missed``: sites and near misses by reason.
        wrong: (case, what) of each wrong one.
    """

    layers: int = 0
    mutants: int = 0
    invalid: int = 0
    fused: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def merge(self, other: Mapping[str, Any]) -> None:
        """Adds another summary, as ``vars`` has it."""
        for name in ("layers", "mutants", "invalid"):
            setattr(self, name, getattr(self, name) + other[name])
        for name in ("fused", "refused", "missed"):
            getattr(self, name).update(other[name])
        self.wrong += [(case, what) for case, what in other["wrong"]]

    def add(self, outcome: Outcome) -> None:
        self.layers += "/" not in outcome.case
        self.mutants += "/" in outcome.case
        self.invalid += bool(outcome.invalid)
        for report in outcome.reports:
            self.fused.update(site.op for site in report.sites if site.fused)
            self.refused.update(f"{site.op}: {_general(site.reason)}" for site in report.sites if not site.fused)
            self.missed.update(f"{miss.block}: {_general(miss.reason)}" for miss in report.near_misses)
        if outcome.wrong:
            self.wrong.append((outcome.case, outcome.wrong))


def fuzz(seeds: Sequence[int], mutants: int, inductor: bool = False) -> Iterator[Outcome]:
    """Runs the layers of these seeds, and so many mutants of each that has any."""
    for seed in seeds:
        layer = draw_layer(seed)
        outcome = run_layer(layer, inductor)
        yield outcome
        if outcome.graph is not None and not outcome.wrong and _has_mutants(layer, outcome.graph):
            for number in range(1, mutants + 1):
                yield run_mutant(layer, outcome.graph, number)


def run_layer(layer: Layer, inductor: bool = False) -> Outcome:
    """Compiles a layer and compares it with eager PyTorch, for each T that it is for."""
    function, calls = layer.function(), [layer.tokens, *([layer.more_tokens] if layer.more_tokens else [])]
    case, watch, kept = str(layer.seed), Watch(), list[Graph]()
    options = {**FUSE, "post_grad_custom_post_pass": lambda graph: kept.append(copy.deepcopy(graph))}
    token = watching.set(watch)
    try:
        with torch.no_grad(), layers_known(), _compiling(inductor):
            dynamic = None if len(calls) > 1 else False
            compiled = torch.compile(function, backend="autofuse", fullgraph=True, dynamic=dynamic, options=options)
            for tokens in calls:
                before = {**layer.arguments(tokens), **layer_caches()}
                expected = layer.arguments(tokens)
                after = {**expected, **layer_caches()}
                try:
                    right = function(**expected)
                except Exception as error:
                    return Outcome(case, invalid=f"{type(error).__name__}: {error}")
                results = layer.arguments(tokens)
                changed = {**results, **layer_caches()}
                for each in layer.inputs:
                    if each.dynamic:
                        torch._dynamo.maybe_mark_dynamic(results[each.name], 0)
                try:
                    given = compiled(**results)
                except Exception as error:
                    return Outcome(case, tuple(watch.reports), f"T={tokens}: {type(error).__name__}: {error}")
                wrong = [
                    *differences(layer, right, given, strides=inductor),
                    *changes(layer, before, after, changed),
                    *_faults(watch.reports),
                ]
                if wrong:
                    return Outcome(case, tuple(watch.reports), f"T={tokens}: " + "; ".join(wrong))
    finally:
        watching.reset(token)
    return Outcome(case, tuple(watch.reports), graph=kept[0] if kept else None)


def run_mutant(layer: Layer, graph: Graph, number: int) -> Outcome:
    """Changes a layer's graph, and compares what it computes with and without the pass; number 0 changes nothing."""
    case = f"{layer.seed}/{number}"
    made = mutated(graph, random.Random(case)) if number else (copy.deepcopy(graph), [])
    if made is None:
        return Outcome(case, invalid="nothing can be changed")
    mutant, what = made
    with torch.no_grad(), layers_known():
        layer.arguments(layer.tokens)
        old = {name: cache.clone() for name, cache in layer_caches().items()}
        arguments = valid_arguments(mutant, layer.seed)
        if arguments is None:
            return Outcome(case, invalid="no arguments suit it", graph=mutant, changes=tuple(what))
        right = _results_of(layer, mutant, arguments)
        if _apart(layer, right, _results_of(layer, in_place(copy.deepcopy(mutant)), arguments)):
            # Nobody returns what was written into an argument, but a mutant may.
            return Outcome(case, invalid="Inductor's own passes change it", graph=mutant, changes=tuple(what))
        reports: list[GraphReport] = []
        fused = copy.deepcopy(mutant)
        settings, _ = Settings.parse(FUSE)
        try:
            known = {CPU: Knowledge.of(CPU, settings)}
            FusionPass(settings, known, Origins({}), [], lambda identity: case, reports.append)(fused)
            fused.lint()
            given = _results_of(layer, in_place(fused), arguments)
        except Exception as error:
            return Outcome(case, tuple(reports), f"{type(error).__name__}: {error}", "", mutant, tuple(what))
        before = {**{f"argument {at}": value for at, value in enumerate(arguments)}, **old}
        wrong = [*_faults(reports), *_apart(layer, right, given), *changes(layer, before, right, given)]
        if wrong:
            moved = _moved_by_noise(layer, mutant, arguments, right)
            wrong = [*_faults(reports), *_apart(layer, right, given, moved)]
            wrong += changes(layer, before, right, given, moved)
    return Outcome(case, tuple(reports), "; ".join(wrong), "", mutant, tuple(what))


def _results_of(
    layer: Layer, graph: Graph, arguments: Sequence[torch.Tensor], noise: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """The results of a graph, and its arguments and the caches that it finds by names after the call."""
    layer.arguments(layer.tokens)  # fresh caches
    after = copies(arguments)
    results = {f"result {at}": value for at, value in enumerate(run_graph(graph, after, noise))}
    return results | {f"argument {at}": value for at, value in enumerate(after)} | layer_caches()


def _moved_by_noise(
    layer: Layer, graph: Graph, arguments: Sequence[torch.Tensor], right: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """How far noise may move each element of a graph's results, as far as some runs can show that."""
    noise = torch.Generator().manual_seed(layer.seed)
    runs = [_results_of(layer, graph, arguments, noise) for _ in range(NOISY_RUNS)]
    return {
        name: UNSEEN * torch.stack([(run[name].double() - one.double()).abs() for run in runs]).amax(0)
        for name, one in right.items()
        if one.is_floating_point()
    }


def _apart(
    layer: Layer,
    right: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor],
    moved: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> list[str]:
    """In what two runs of a graph differ, by more than noise has moved them."""
    wrong = []
    for name, one in right.items():
        odd = _unlike(one, given[name], strides=False)
        off = [] if odd else _off(name, one, given[name], TOLERANCE[layer.dtype], 0.0, moved.get(name))
        wrong += [f"{name}: {odd}"] if odd else off
    return wrong


def valid_arguments(graph: Graph, seed: int) -> list[torch.Tensor] | None:
    """Random ones that the graph can be run with; None if there are none."""
    for highest in (TABLE_ROWS, 1):
        arguments = arguments_of(graph, seed, highest)
        try:
            run_graph(graph, copies(arguments))
        except (IndexError, RuntimeError):
            continue
        return arguments
    return None


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype).copy_(each) for each in tensors]


def in_place(graph: Graph) -> Graph:
    """The graph after those of Inductor's passes that make it write into its arguments."""
    mode = detect_fake_mode([node.meta["val"] for node in graph.find_nodes(op="placeholder")])
    gm = GraphModule({}, graph)
    takes_module = "gm" in inspect.signature(FakeTensorUpdater).parameters  # from PyTorch 2.13 on
    with V.set_fake_mode(mode):
        reinplace_inplaceable_ops(FakeTensorUpdater(gm if takes_module else gm.graph), gm.graph)  # type: ignore[arg-type]
        decompose_auto_functionalized(gm.graph)
    return gm.graph


def _has_mutants(layer: Layer, graph: Graph) -> bool:
    """Half precision before FP8 would leave open which results are right."""
    values = [node.meta.get("val") for node in graph.nodes]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    static = not any(isinstance(value, torch.SymInt) for value in values)
    return static and (layer.dtype == "float32" or all(value.dtype != torch.float8_e4m3fn for value in tensors))


def _faults(reports: Sequence[GraphReport]) -> list[str]:
    """What the passes could not do."""
    notes = [report.note for report in reports if report.note]
    sites = [site.reason for report in reports for site in report.sites]
    return [f"fault: {text}" for text in (*notes, *sites) if text.startswith("autofuse leaves")]


@contextlib.contextmanager
def _compiling(inductor: bool) -> Iterator[None]:
    torch._dynamo.reset()
    if inductor:
        with torch._inductor.config.patch(force_disable_caches=True):
            yield
    else:
        with without_code_generation():
            yield


# ---- comparing ------------------------------------------------------------------------------------------------------


def differences(layer: Layer, right: Sequence[torch.Tensor], given: Sequence[torch.Tensor], strides: bool) -> list[str]:
    """What is wrong with results; it is Inductor that gives them their strides."""
    found, at, tolerance = [], 0, TOLERANCE[layer.dtype]
    for output in layer.outputs:
        count = 2 if output.kind == "quant" else 1
        pairs = [*zip(right[at : at + count], given[at : at + count], strict=True)]
        at += count
        if odd := next((why for pair in pairs if (why := _unlike(*pair, strides))), ""):
            found.append(f"{output.text}: {odd}")
        elif output.kind == "quant":
            sides = [_dequantised(*side, output.group) for side in zip(*pairs, strict=True)]
            found += _off(output.text, sides[0], sides[1], tolerance, FP8_STEP)
        else:
            found += _off(output.text, *pairs[0], tolerance, FP8_STEP if output.kind == "fp8" else 0.0)
    return found


def changes(
    layer: Layer,
    before: Mapping[str, torch.Tensor],
    right: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor],
    moved: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> list[str]:
    """What is wrong with arguments after a call; ``moved``: by how much noise has moved them."""
    found = []
    for name, old in before.items():
        found += _off(name, right[name], given[name], TOLERANCE[layer.dtype], 0.0, moved.get(name))
        kept = (_bytes(right[name]) == _bytes(old)).flatten(1).all(1)
        touched = (_bytes(given[name]) != _bytes(old)).flatten(1).any(1)
        if bool((kept & touched).any()):
            found.append(f"{name}: rows {(kept & touched).nonzero().flatten().tolist()[:8]} were to stay as they are")
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, bytes of a row]"""
    rows = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
    return rows.reshape(-1, rows.shape[-1]) if tensor.dim() > 1 else rows.reshape(-1, tensor.element_size())


def _unlike(right: torch.Tensor, given: torch.Tensor, strides: bool) -> str:
    for what, one, other in (
        ("shape", right.shape, given.shape),
        ("dtype", right.dtype, given.dtype),
        ("strides", *((_strides(right), _strides(given)) if strides else (0, 0))),
    ):
        if one != other:
            return f"its {what} is {other}, not {one}"
    return ""


def _strides(tensor: torch.Tensor) -> list[int]:
    """Those that count."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]


def _dequantised(values: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    return (values.float().unflatten(-1, (-1, group)) * scales.reshape(*scales.shape, 1)).flatten(-2)


def _off(
    name: str,
    right: torch.Tensor,
    given: torch.Tensor,
    tolerance: float,
    step: float,
    moved: torch.Tensor | None = None,
) -> list[str]:
    """Whether two tensors differ by more than roundings.

    Args:
        step: relative, of values that were in FP8.
        moved: how far roundings were seen to move each element; None if that was not looked at.
    """
    if not right.is_floating_point():
        return [] if torch.equal(right, given) else [f"{name} differs"]
    if step or right.dtype == torch.float8_e4m3fn:
        step, tolerance = FP8_STEP, TOLERANCE["bfloat16"]
    one, other = right.double(), given.double()
    finite = one[one.isfinite()]
    size = finite.square().mean().sqrt().item() if finite.numel() else 0.0
    error = (one - other).abs() - step * torch.minimum(one.abs(), other.abs())
    error = (error if moved is None else error - moved) / (one.abs() + size + 1e-12)
    error = torch.where((one == other) | (one.isnan() & other.isnan()), torch.zeros_like(error), error)
    worst = error.max().item() if error.numel() else 0.0
    if worst <= tolerance:  # false for NaN
        return []
    wrong = int((~(error <= tolerance)).sum())
    return [f"{name} is off by {worst:.3g} (allowed {tolerance:g}) in {wrong} of {error.numel()} elements"]


# ---- cutting down ---------------------------------------------------------------------------------------------------


def cut_down(layer: Layer, inductor: bool = False) -> Layer:
    """The layer without whatever it stays wrong without."""
    while True:
        for part in (*layer.outputs, *reversed(layer.lines)):
            shorter = layer.without(part)
            if _is_wrong(shorter, inductor):
                layer = shorter
                break
        else:
            return layer


def _is_wrong(layer: Layer, inductor: bool) -> bool:
    outcome = run_layer(layer, inductor)
    return bool(outcome.wrong) and not outcome.invalid


# ---- the command ----------------------------------------------------------------------------------------------------


def _general(reason: str) -> str:
    """A reason without the names and numbers of its graph."""
    reason = re.sub(r"\[[^\]]*\]", "[…]", reason)
    reason = re.sub(r"\b(?=\w*_)\w+\b(?<!_cache)|\b\w*\d\w*\b", "…", reason)
    return re.sub(r"…(?:[., ]*…)+", "…", reason)[:160]


def show(console: Console, summary: Summary) -> None:
    for title, counts in (("fused", summary.fused), ("refused", summary.refused), ("near misses", summary.missed)):
        table = Table(title=title, title_justify="left")
        table.add_column("sites", justify="right")
        table.add_column("op" if title == "fused" else "why", overflow="fold")
        for what, count in counts.most_common():
            table.add_row(str(count), what)
        console.print(table)
    console.print(
        f"{summary.layers} layers and {summary.mutants} mutants ({summary.invalid} of them invalid), "
        f"{sum(summary.fused.values())} sites fused, {sum(summary.refused.values())} refused, "
        f"{len(summary.wrong)} wrong, {summary.seconds:.0f} s",
        markup=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the first layer")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--mutants", type=int, default=9, help="of each layer")
    parser.add_argument("--case", metavar="SEED[/NUMBER]", help="one case, as it was reported")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--inductor", action="store_true", help="generate code as torch.compile does: seconds a layer")
    parser.add_argument("--json", type=Path, help="write the summary to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

    warnings.filterwarnings("ignore", module="torch")
    seeds = range(options.seed, options.seed + options.layers)
    if options.case:
        registry.go_native()
        sys.exit(_one(*map(int, options.case.split("/")), inductor=options.inductor))
    if options.worker:
        _work(seeds, options.mutants, options.inductor)
        return
    begin = time.perf_counter()
    summary = _run(seeds, options)
    summary.seconds = time.perf_counter() - begin
    show(Console(width=None if sys.stdout.isatty() else 160), summary)
    if options.json:
        options.json.write_text(json.dumps(vars(summary), indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(summary.wrong))


def _run(seeds: range, options: argparse.Namespace) -> Summary:
    summary = Summary()
    rest = [f"--mutants={options.mutants}", "--worker", *(["--inductor"] if options.inductor else [])]

    def command(first: int, count: int) -> list[str]:
        return [sys.executable, __file__, f"--seed={first}", f"--layers={count}", *rest]

    def received(case: Mapping[str, Any]) -> None:
        summary.merge(case)
        for number, what in case["wrong"]:
            print(f"case {number} is wrong: {what[:2000]}", flush=True)
        if case["layers"] and summary.layers % 20 == 0:
            print(f"{summary.layers} layers, {summary.mutants} mutants, {len(summary.wrong)} wrong", flush=True)

    def died(seed: int, why: str) -> None:
        summary.wrong.append((str(seed), why))
        print(f"case {seed} is wrong: {why}", flush=True)

    run_seeds(command, seeds, options.jobs, received, died)
    return summary


def _work(seeds: range, mutants: int, inductor: bool) -> None:
    """As one of several processes: prints what ``fuzz_workers`` reads."""
    torch.set_num_threads(1)
    registry.go_native()
    for seed in seeds:
        print(f"begin {seed}", flush=True)
        for outcome in fuzz([seed], mutants, inductor):
            summary = Summary()
            summary.add(outcome)
            print(json.dumps({"case": outcome.case, **vars(summary)}), flush=True)


def _one(seed: int, number: int = 0, *, inductor: bool) -> bool:
    """Prints all there is to know of one case; whether it is wrong."""
    layer = draw_layer(seed)
    print(layer)
    outcome = run_layer(layer, inductor)
    if number and outcome.graph is not None:
        outcome = run_mutant(layer, outcome.graph, number)
    print(outcome.graph, *outcome.changes, *outcome.reports, sep="\n")
    print(outcome.wrong or outcome.invalid or "right")
    if outcome.wrong and not number:
        print("cut down:", cut_down(layer, inductor), sep="\n")
    return bool(outcome.wrong)


if __name__ == "__main__":
    main()
