#!/usr/bin/env python3
"""Fuzzes the graph passes: random layers (random_layers.py), each compiled with every fusion on and compared with eager.

    python scripts/fuzz_graphs.py --cases 2000                 # seeds 0 to 1999, on the CPU
    python scripts/fuzz_graphs.py --seed 5000 --cases 200 --json fuzz.json
    python scripts/fuzz_graphs.py --inductor --cases 20        # with Inductor's own code for the rest of each graph
    python scripts/fuzz_graphs.py --case 4711                  # one case: its text, its graph, its report, what differs

Compared are the results and all arguments, which a layer may have changed; rows that eager PyTorch leaves as they were
must be so to the bit. Without --inductor everything of a compilation runs but Inductor's code generation: the graph
that Inductor would get is run as it is. --case cuts a wrong layer down to what it stays wrong with. Exits with 1 if any
case is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from rich.console import Console
from rich.table import Table

import autofuse  # noqa: F401  (registers the backend)
from autofuse.graph.backend import Watch, watching
from autofuse.graph.report import GraphReport
from autofuse.runtime.dispatch import registry
from random_layers import Layer, draw_layer

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from models import without_code_generation

FUSE = {"autofuse.level": "O3", "autofuse.untuned": "fuse"}
TOLERANCE = {"float32": 2e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""Of the error of an element, in units of its size plus the tensor's root mean square."""
FP8_STEP = 2.0**-3  # between neighbours, in units of the smaller


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        reports: of the graphs that were compiled.
        wrong: what differs, or the exception that eager PyTorch does not raise; "" if it is right.
        invalid: what eager PyTorch raises: the case counts for nothing.
    """

    layer: Layer
    reports: tuple[GraphReport, ...] = ()
    wrong: str = ""
    invalid: str = ""


@dataclass
class Summary:
    """What became of many cases.

    Attributes:
        fused: sites by their op; ``refused``, ``missed``: sites and near misses by reason.
        wrong: (seed, what) of each wrong case.
    """

    cases: int = 0
    invalid: int = 0
    graphs: int = 0
    fused: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        self.cases += 1
        self.invalid += bool(outcome.invalid)
        for report in outcome.reports:
            self.graphs += 1
            self.fused.update(site.op for site in report.sites if site.fused)
            self.refused.update(f"{site.op}: {_general(site.reason)}" for site in report.sites if not site.fused)
            self.missed.update(f"{miss.block}: {_general(miss.reason)}" for miss in report.near_misses)
        if outcome.wrong:
            self.wrong.append((outcome.layer.seed, outcome.wrong))


def fuzz(seeds: Sequence[int], inductor: bool = False) -> Iterator[Outcome]:
    """Runs the layers of these seeds."""
    for seed in seeds:
        yield run_case(draw_layer(seed), inductor)


def run_case(layer: Layer, inductor: bool = False) -> Outcome:
    """Compiles a layer and compares it with eager PyTorch, for each T that it is for."""
    function, calls = layer.function(), [layer.tokens, *([layer.more_tokens] if layer.more_tokens else [])]
    watch = Watch()
    token = watching.set(watch)
    try:
        with torch.no_grad(), _compiling(inductor):
            compiled = torch.compile(
                function, backend="autofuse", fullgraph=True, dynamic=None if len(calls) > 1 else False, options=FUSE
            )
            for tokens in calls:
                expected, results = layer.arguments(tokens), layer.arguments(tokens)
                try:
                    right = function(**expected)
                except Exception as error:
                    return Outcome(layer, invalid=f"{type(error).__name__}: {error}")
                for each in layer.inputs:
                    if each.dynamic:
                        torch._dynamo.maybe_mark_dynamic(results[each.name], 0)
                try:
                    given = compiled(**results)
                except Exception as error:
                    return Outcome(layer, tuple(watch.reports), f"T={tokens}: {type(error).__name__}: {error}")
                wrong = [
                    *differences(layer, right, given, strides=inductor),
                    *changes(layer, layer.arguments(tokens), expected, results),
                ]
                wrong += [f"fault: {report.note}" for report in watch.reports if report.note]
                wrong += [f"fault: {site.reason}" for report in watch.reports for site in report.sites if _faulty(site)]
                if wrong:
                    return Outcome(layer, tuple(watch.reports), f"T={tokens}: " + "; ".join(wrong))
    finally:
        watching.reset(token)
    return Outcome(layer, tuple(watch.reports))


def _faulty(site: Any) -> bool:
    return "leaves a site of" in site.reason


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
) -> list[str]:
    """What is wrong with arguments after a call."""
    found = []
    for name, old in before.items():
        found += _off(name, right[name], given[name], TOLERANCE[layer.dtype], 0.0)
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


def _off(name: str, right: torch.Tensor, given: torch.Tensor, tolerance: float, step: float) -> list[str]:
    """Whether two tensors differ by more than roundings; ``step``: relative, of values that were in FP8."""
    if not right.is_floating_point():
        return [] if torch.equal(right, given) else [f"{name} differs"]
    if step or right.dtype == torch.float8_e4m3fn:
        step, tolerance = FP8_STEP, TOLERANCE["bfloat16"]
    one, other = right.double(), given.double()
    finite = one[one.isfinite()]
    size = finite.square().mean().sqrt().item() if finite.numel() else 0.0
    error = (one - other).abs() - step * torch.minimum(one.abs(), other.abs())
    error = error / (one.abs() + size + 1e-12)
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
    outcome = run_case(layer, inductor)
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
        f"{summary.cases} cases ({summary.invalid} of them invalid), {summary.graphs} graphs, "
        f"{sum(summary.fused.values())} sites fused, {sum(summary.refused.values())} refused, "
        f"{len(summary.wrong)} wrong, {summary.seconds:.0f} s",
        markup=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--case", type=int, metavar="SEED", help="one case, as it was reported")
    parser.add_argument("--inductor", action="store_true", help="generate code as torch.compile does: seconds a case")
    parser.add_argument("--json", type=Path, help="write the summary to this file")
    options = parser.parse_args()

    console = Console(width=None if sys.stdout.isatty() else 160)
    registry.go_native()
    if options.case is not None:
        sys.exit(_one(options.case, options.inductor))
    summary, begin = Summary(), time.perf_counter()
    for outcome in fuzz(range(options.seed, options.seed + options.cases), options.inductor):
        summary.add(outcome)
        if outcome.wrong:
            print(f"case {outcome.layer.seed} is wrong: {outcome.wrong[:2000]}", flush=True)
        elif summary.cases % 100 == 0:
            print(f"{summary.cases} cases, {len(summary.wrong)} wrong", flush=True)
    summary.seconds = time.perf_counter() - begin
    show(console, summary)
    if options.json:
        options.json.write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(summary.wrong))


def _one(seed: int, inductor: bool) -> bool:
    """Prints all there is to know of one case; whether it is wrong."""
    layer = draw_layer(seed)
    print(layer)
    outcome = run_case(layer, inductor)
    for report in outcome.reports:
        print(report)
    print(outcome.wrong or outcome.invalid or "right")
    if outcome.wrong:
        print("cut down:", cut_down(layer, inductor), sep="\n")
    return bool(outcome.wrong)


if __name__ == "__main__":
    main()
