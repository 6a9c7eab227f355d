#!/usr/bin/env python3
"""Fuzzes the fused ops: random problems, configs, T, strides and data, each call compared with the fp64 reference.

    python scripts/fuzz_ops.py                                  # every op, 1,000 cases each, on the GPU if there is one
    python scripts/fuzz_ops.py --op mla_dual_rms_norm --seed 7 --cases 200
    python scripts/fuzz_ops.py --case 'mla_dual_rms_norm(...)|PDL=0,...|37|dense|123' # one that was wrong, once more

Calls go through torch.ops with a plan, as from a compiled graph. Checked are the results, that inputs and what lies
between their rows stay as they were, that two runs agree, that what is not written shows (fresh memory holds NaN), and
that nothing is written beside a result. Exits with 1 if any case is wrong.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autofuse.errors import AutofuseError, BadInput
from autofuse.ops import OPS, Config, FusedOp, Problem, SearchSpace, get_op
from autofuse.ops.binding import Result
from autofuse.runtime.dispatch import BoundPlan, bind_plan, registry
from autofuse.runtime.plan import Plan
from autofuse.targets import parse_device, target_of
from autofuse.tuner.compile_ahead import CompilePool, compile_pool
from autofuse.tuner.verify import WrongResult, verify_call

LAYOUTS = ("apart", "dense")  # rows of inputs lie apart, each tensor in its own way; or inputs are just their elements
MANY_TOKENS = 1 << 20  # configs are drawn for so many: constraints on small T do not bite
SOME_TOKENS = 70
MOST_TOKENS, MOST_BYTES = 4096, 4 << 20  # of the largest calls
PROBLEMS, TRIES = 20, 200  # random problems for a tunable's value, and for each random configs, until one is sound
SHOWN = 20  # wrong cases of an op that are printed
GUARD_BYTES = 512  # before and after each result
GUARD, UNWRITTEN = 0xA5, 0xFF  # UNWRITTEN is NaN in every dtype


@dataclass(frozen=True)
class Case:
    """One call. Its text is all that it takes to run it again.

    Attributes:
        layout: of LAYOUTS.
        seed: of its data.
    """

    problem: Problem
    config: Config
    tokens: int
    layout: str
    seed: int

    def __str__(self) -> str:
        return f"{self.problem}|{self.config}|{self.tokens}|{self.layout}|{self.seed}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads the text back. Raises BadInput."""
        try:
            problem, config, tokens, layout, seed = text.split("|")
            return cls(Problem.parse(problem), Config.parse(config), int(tokens), layout, int(seed))
        except ValueError as error:
            raise BadInput(f"case {text!r} is not of the form problem|config|tokens|layout|seed: {error}") from None


@dataclass
class Report:
    """What became of the cases of one op.

    Attributes:
        worst: the largest error of a case that was right, in units of what the tolerance allows.
        wrong: (case or kernel, why).
    """

    op: str
    kernels: int = 0
    cases: int = 0
    worst: float = 0.0
    wrong: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.op}: {self.cases} cases of {self.kernels} kernels, {len(self.wrong)} wrong, worst {self.worst:.3g} "
            f"of the tolerance, {self.seconds:.1f} s"
        )


def fuzz(op: FusedOp, device: torch.device, pool: CompilePool, *, kernels: int, cases: int, seed: int) -> Report:
    """Runs ``cases`` random cases, spread over ``kernels`` random pairs of a problem and a config."""
    start, report, target = time.perf_counter(), Report(op.name), target_of(device)
    source = random.Random(f"{op.name} {seed}")
    drawn = draw_kernels(op, target.kind, kernels, source)
    futures = pool.submit([op.spec(target.kind, problem, config) for problem, config in drawn])
    for (problem, config), future in zip(list(drawn), futures, strict=True):
        try:
            future.result()
        except AutofuseError as error:
            drawn.remove((problem, config))
            report.wrong.append((f"{problem}|{config}", f"does not compile: {error}"))
    report.kernels = len(drawn)
    bound = {kernel: _bind(op, *kernel, device) for kernel in drawn}
    for case in draw_cases(op, drawn, cases, source):
        report.cases += 1
        try:
            report.worst = max(report.worst, run_case(bound[case.problem, case.config], case, device))
        except Exception as error:  # WrongResult, or whatever a call raises
            report.wrong.append((str(case), f"{type(error).__name__}: {error}"))
            if not _alive(device):
                report.wrong.append((str(case), "the GPU takes no more calls after this case: the rest was not run"))
                break
    report.seconds = time.perf_counter() - start
    return report


def draw_kernels(op: FusedOp, kind: str, count: int, source: random.Random) -> list[tuple[Problem, Config]]:
    """Different pairs of a problem and one of its configs.

    A tunable's value comes first, then a problem that has a config with it: so values that suit only few problems, or
    few configs, come up as well.
    """
    kernels, drawn = op.kernel_sources(kind), dict[tuple[Problem, Config], None]()
    for _ in range(10 * count):
        space = (source.choice(kernels) if len(kernels) > 1 else kernels[0]).space
        tunable = source.choice(space.tunables)
        fixed = {tunable.name: source.choice(tunable.values)}
        for _ in range(PROBLEMS):
            problem = op.random_problem(source)
            if config := random_config(space, problem, source, fixed):
                drawn[problem, config] = None
                break
        if len(drawn) == count:
            break
    return list(drawn)


def draw_cases(
    op: FusedOp, kernels: Sequence[tuple[Problem, Config]], count: int, source: random.Random
) -> Iterator[Case]:
    """Cases of each kernel in turn. T is up to 70, and now and then so large that a GPU has not room for all blocks."""
    for number in range(count if kernels else 0):
        problem, config = kernels[number % len(kernels)]
        tokens = source.randint(0, SOME_TOKENS)
        if source.random() < 0.03:
            most = min(MOST_TOKENS, MOST_BYTES // op.bytes_moved(problem, 1))
            tokens = source.randint(SOME_TOKENS, max(SOME_TOKENS, most))
        yield Case(problem, config, tokens, source.choice(LAYOUTS), source.getrandbits(32))


def run_case(bound: BoundPlan, case: Case, device: torch.device) -> float:
    """Runs one case of a loaded kernel; returns its error as ``verify`` does. Raises WrongResult, RuntimeError."""
    op, (variant,) = bound.op, bound.variants
    args = op.check_args(case.problem, case.tokens, device, torch.Generator(device).manual_seed(case.seed))
    if not (bound.binding.accepts(args) and bound.binding.launchable(args, variant.shape.align)):
        raise WrongResult("the kernel is not launched with check_args: the reference would run")
    dense = tuple(arg.clone(memory_format=torch.contiguous_format) if _is_tensor(arg) else arg for arg in args)
    if case.layout == "dense" and bound.binding.launchable(dense, variant.shape.align):
        args = dense
    plan, overload = str(_plan(case.problem, case.config, device)), getattr(torch.ops.autofuse, op.name).default
    call: Callable[..., Any] = lambda *call_args: overload(*call_args, plan)  # noqa: E731
    if case.seed % 2:
        args = _without_rows_beyond(op, args)
    elif op.bounds:
        call = bound  # what kernels do with rows beyond a cache, the dispatcher would refuse
    error = verify_call(op, case.problem, args, call)
    if case.tokens:
        _check_beside_results(bound, args, case.tokens)
    return error


def _without_rows_beyond(op: FusedOp, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments, padded where they name a row that there is not."""
    changed = list(args)
    for bound in op.bounds:
        values, rows = changed[bound.index], changed[bound.of]
        if bound.padded and values is not None and rows is not None:
            count = math.prod(rows.shape[: bound.dims])
            # No row's even where negative numbers count from the end.
            changed[bound.index] = values.masked_fill(values >= count, -1 - count)
    return tuple(changed)


def _check_beside_results(bound: BoundPlan, args: tuple[Any, ...], tokens: int) -> None:
    """Launches the kernel with results inside larger buffers. Raises WrongResult if these are written elsewhere."""
    (variant,), device = bound.variants, bound.device
    shaped = [_guarded(result, tokens, device) for result in bound.binding.results]
    variant.kernel.launch(variant.shape.blocks(tokens), *bound.binding.params(args, [view for view, _, _ in shaped]))
    for index, (_, buffer, owned) in enumerate(shaped):
        if bool(((buffer != GUARD) & ~owned).any()):
            raise WrongResult(f"memory beside result {index} was written")


def _guarded(result: Result, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A result to write into, the bytes around and in it, and which of these are its own."""
    like = result.allocate(tokens, device)
    size = like.element_size()
    span = size * (1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True)))
    buffer = torch.full((2 * GUARD_BYTES + -(-span // 16) * 16,), GUARD, dtype=torch.uint8, device=device)
    owned = torch.zeros_like(buffer, dtype=torch.bool)
    if like.numel():
        shape, strides = (*like.shape, size), (*(size * stride for stride in like.stride()), 1)
        owned.as_strided(shape, strides, GUARD_BYTES).fill_(True)
        buffer.as_strided(shape, strides, GUARD_BYTES).fill_(UNWRITTEN)
    view = buffer[GUARD_BYTES:-GUARD_BYTES].view(like.dtype).as_strided(like.shape, like.stride(), GUARD_BYTES // size)
    return view, buffer, owned


def random_config(
    space: SearchSpace, problem: Problem, source: random.Random, fixed: Mapping[str, int]
) -> Config | None:
    """A config with the ``fixed`` values that is sound for any T; None if none was found."""
    for _ in range(TRIES):
        values = {tunable.name: source.choice(tunable.values) for tunable in space.tunables}
        config = Config.of(values, **fixed)
        if space.refusal(config, problem, MANY_TOKENS) is None:
            return config
    return None


def _plan(problem: Problem, config: Config, device: torch.device) -> Plan:
    return Plan(target_of(device).arch, problem, ((1, config),))


def _bind(op: FusedOp, problem: Problem, config: Config, device: torch.device) -> BoundPlan:
    return bind_plan(op, _plan(problem, config, device), device)


def _is_tensor(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor)


def _alive(device: torch.device) -> bool:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=sorted(OPS), help="may be given several times; default: all")
    parser.add_argument("--cases", type=int, default=1000, help="of each op")
    parser.add_argument("--kernels", type=int, default=48, help="of each op: pairs of a problem and a config")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=Case.parse, help="one case, as it was reported")
    options = parser.parse_args()

    device = parse_device(options.device)
    registry.go_native()
    if options.case:
        case = options.case
        print(run_case(_bind(get_op(case.problem.op), case.problem, case.config, device), case, device))
        return
    wrong, target = False, target_of(device)
    with compile_pool(target.kind, target.arch) as pool:
        for name in options.op or OPS:
            report = fuzz(get_op(name), device, pool, kernels=options.kernels, cases=options.cases, seed=options.seed)
            print(report, flush=True)
            for case, why in report.wrong[:SHOWN]:
                print(f"  {case}\n    {why}", flush=True)
            wrong = wrong or bool(report.wrong)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
