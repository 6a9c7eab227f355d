"""Measuring one row: the fused op, tuned, beside the unfused code in every form that torch.compile gives it."""

from __future__ import annotations

import gc
import itertools
import logging
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import torch

from autofuse.cache_db import BASELINE_KINDS, Winner
from autofuse.ops import FusedOp, Problem, get_op
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of
from autofuse.tuner.baselines import baseline_calls, compiled_reference
from autofuse.tuner.budgets import Effort
from autofuse.tuner.measure import Ring, example_ring, gain, interleave, runner
from bench.tables import LARGE_TOKENS

__all__ = ["bandwidth", "free_memory", "host_us", "measured_row", "ours"]

logger = logging.getLogger("autofuse.bench")

TUNED_COMPILE = [
    {"coordinate_descent_tuning": True},
    {"coordinate_descent_tuning": True, "triton.enable_pdl": True},
]

Call = Callable[..., Any]


def bandwidth(device: torch.device, effort: Effort) -> float:
    """Bytes per µs, read plus written, of an elementwise kernel over 1 GiB (CPU: 256 MiB)."""
    elements = (1 << 28) if device.type == "cuda" else (1 << 26)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    prepared = runner(lambda x: torch.neg(x, out=target), Ring.of([(source,)] * 4, device), device, effort)
    return 8 * elements / min(prepared.round_us() for _ in range(10))


def measured_row(
    winner: Winner, device: torch.device, effort: Effort, bytes_per_us: float, compile_plus: bool
) -> dict[str, Any]:
    """One row, its op run with the winner's config: µs by column, the gain over the better baseline, and the rest."""
    problem, tokens, op = winner.problem, winner.tokens, get_op(winner.problem.op)
    start = time.perf_counter()
    ring = example_ring(op, problem, tokens, device, effort)
    plan = Plan(target_of(device).arch, problem, ((tokens, winner.config),))
    calls = {"ours": ours(op, plan), **baseline_calls(op, ring.sets[0])}
    if compile_plus:
        calls |= _tuned_compile(op, ring, device)
    if tokens >= LARGE_TOKENS:
        calls |= _copies(op.bytes_moved(problem, tokens), len(ring.sets), device)
    compiled = time.perf_counter()
    prepared = [runner(call, ring, device, effort) for call in calls.values()]
    timings = dict(zip(calls, interleave(prepared, effort.final_rounds), strict=True))
    times = {name: timing.median_us for name, timing in timings.items()}
    variants = [times.pop(name) for name in list(times) if name.startswith("compile+ ")]
    if variants:
        times["compile+"] = min(variants)
    copies = [times.pop(name) for name in list(times) if name.startswith("copy ")]
    if copies:
        times["copy"] = min(copies)
    moved = op.bytes_moved(problem, tokens)
    times["floor"] = moved / bytes_per_us
    better = min((kind for kind in BASELINE_KINDS if kind in times), key=lambda kind: times[kind])
    ratio = gain(timings[better], timings["ours"])
    row = {
        "us": times,
        "spread_us": timings["ours"].spread_us,
        "gain": ratio.median,
        "gain_low": ratio.low,
        "gain_high": ratio.high,
        "gain_over": better,
        "error_in_tolerances": _error(op, problem, calls["ours"], ring.sets[0]),
        "host_us": host_us(calls["ours"], args=ring.sets[0])[0] if device.type == "cuda" else None,
        "bytes": moved,
        "bandwidth_bytes_per_us": bytes_per_us,
        "config": str(winner.config),
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return {**row, "seconds": {"compile": compiled - start, "measure": time.perf_counter() - compiled}}


def free_memory(device: torch.device) -> None:
    """Gives back what the last row held. Raises RuntimeError where a kernel has broken the GPU's context."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def ours(op: FusedOp, plan: Plan) -> Call:
    """The fused op with a plan's configs, as a compiled graph calls it."""
    overload, text = getattr(torch.ops.autofuse, op.name).default, str(plan)
    return lambda *args: overload(*args, text)


def _tuned_compile(op: FusedOp, ring: Ring, device: torch.device) -> dict[str, Call]:
    calls = {}
    for number, options in enumerate(TUNED_COMPILE if device.type == "cuda" else TUNED_COMPILE[:1]):
        try:
            calls[f"compile+ {number}"] = compiled_reference(op, ring.sets[0], options)[0]
        except Exception as error:  # whatever Inductor or Triton raises: a column less, not a row
            logger.warning("%s: torch.compile fails with %s: %s", op.name, options, error)
    return calls


def _copies(moved: int, sets: int, device: torch.device) -> dict[str, Call]:
    """What moves as many bytes and does nothing else, over memory that rotates as the inputs do: two kernels."""
    pairs = [tuple(torch.ones(moved // 8, device=device) for _ in range(2)) for _ in range(sets)]
    turn = itertools.cycle(pairs)

    def negated(*args: Any) -> None:
        source, target = next(turn)
        torch.neg(source, out=target)

    def copied(*args: Any) -> None:
        source, target = next(turn)
        target.copy_(source)

    return {"copy neg": negated, "copy copy_": copied}


def _error(op: FusedOp, problem: Problem, call: Call, args: tuple[Any, ...]) -> float:
    pairs = zip(call(*args), op.exact(*args), strict=False)
    return max(op.tolerance(problem, index).error(out, exact) for index, (out, exact) in enumerate(pairs))


def host_us(*calls: Call, args: tuple[Any, ...]) -> list[float]:
    """Host time of a call of each, with the allocation of its results: medians of 30 rounds of 100 calls, in turns."""
    rounds: list[list[float]] = [[] for _ in calls]
    for _ in range(31):
        for call, mine in zip(calls, rounds, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            for _ in range(100):
                call(*args)
            mine.append((time.perf_counter_ns() - start) / 1e5)
    torch.cuda.synchronize()
    return [statistics.median(mine[1:]) for mine in rounds]
