"""Every GPU kernel computes its op, run on the CPU without a GPU: several configs, ragged T, both warp widths."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import pytest
import torch
from emulation import BLOCK_ORDERS, EmulationError, emulate, run_ahead, unavailable, verify, wanted

from autofuse.ops import OPS, Config, FusedOp, Problem, get_op
from autofuse.ops.drawing import Coverage

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "can be emulated")

CPU = torch.device("cpu")
TOKENS = (1, 17, 45)  # the last is more than one block of every config
BUCKETS = (1 << 16, 1)  # the T that configs are drawn for: most constraints on T ask for many tokens, some for few
MOST_THREADS = 1024


@dataclass(frozen=True)
class Case:
    """One kernel: a config of a problem, at a warp width."""

    kind: str
    problem: Problem
    config: Config
    warp_size: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.warp_size}-{self.problem}-{self.config}"


def run(case: Case) -> None:
    op = get_op(case.problem.op)
    for tokens in TOKENS:
        args = op.example_args(case.problem, tokens, CPU, torch.Generator().manual_seed(tokens))
        verify(op, case.problem, case.config, args, kind=case.kind, warp_size=case.warp_size)


def fits(case: Case) -> bool:
    """Whether the config is of its space, and a block of that many lanes a warp of a size that GPUs have."""
    op = get_op(case.problem.op)
    space = op.kernel_source(case.kind).space
    if all(space.refusal(case.config, case.problem, tokens) for tokens in BUCKETS):
        return False
    spec = op.spec(case.kind, case.problem, case.config)
    return spec.block // int(spec.defines.get("WARP_SIZE", 32)) * case.warp_size <= MOST_THREADS


def covering(op: FusedOp, kind: str, warp_size: int, first_default: int) -> Iterator[Case]:
    """Cases, the same ones each time, with each sweep problem and each value of each tunable.

    Every other problem, from ``first_default`` on, has its default config.
    """
    source, problems = random.Random(f"{op.name} {kind} {warp_size}"), op.sweep_problems()
    coverage = Coverage(op.kernel_source(kind).space, source)

    def drawn(problem: Problem, **values: int) -> Case | None:
        default = op.default_config(kind, problem, 1)
        config = coverage.draw(lambda config: fits(Case(kind, problem, config, warp_size)), near=default, **values)
        return config and Case(kind, problem, config, warp_size)

    for problem in problems[first_default::2]:
        config = op.default_config(kind, problem, 1)
        coverage.take(config)
        yield Case(kind, problem, config, warp_size)
    for problem in problems[1 - first_default :: 2]:
        yield drawn(problem) or Case(kind, problem, op.default_config(kind, problem, 1), warp_size)
    for name, value in coverage.missing:
        if (name, value) in coverage.missing:
            problems_at_random = source.sample(problems, len(problems))
            yield from next(([case] for problem in problems_at_random if (case := drawn(problem, **{name: value}))), [])


def cases(op: FusedOp) -> Iterator[Case]:
    """CUDA's kernel at 32 lanes, AMD's at 64; CUDA's at 64 where AMD has none of its own."""
    for kind, warp_size in (("cuda", 32), ("hip" if "hip" in op.kernels else "cuda", 64)):
        if kind in op.kernels:
            yield from covering(op, kind, warp_size, first_default=int(warp_size == 64))


CASES = [case for op in OPS.values() for case in dict.fromkeys(cases(op))]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[Case, Future[None]]]:
    with run_ahead(run, wanted(request, "case")) as futures:
        yield futures


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_kernels_compute_their_op(case: Case, outcomes: dict[Case, Future[None]]) -> None:
    outcomes[case].result()


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_value_of_every_tunable_is_tested(op: FusedOp) -> None:
    tunables = [each for kind in ("cuda", "hip") if kind in op.kernels for each in op.kernels[kind].space.tunables]
    tested = {pair for case in CASES if case.problem.op == op.name for pair in case.config.items()}
    untested = {(tunable.name, value) for tunable in tunables for value in tunable.values} - tested
    assert not untested, f"no sweep problem takes {untested}"


NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="fp16", q_lora_rank=96, kv_lora_rank=40, cast_before_weight=True)
CONFIG = NORMS.default_config("cuda", PROBLEM, 1)


def norm_args(tokens: int) -> list[object]:
    return list(NORMS.example_args(PROBLEM, tokens, CPU, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("order", BLOCK_ORDERS)
def test_one_order_of_blocks_can_be_asked_for(order: str) -> None:
    args = norm_args(5)
    results = emulate(NORMS, PROBLEM, CONFIG, args, block_orders=[order])
    for result, again in zip(results, emulate(NORMS, PROBLEM, CONFIG, args), strict=True):
        assert torch.equal(result, again)


def test_no_tokens_launch_nothing() -> None:
    assert [result.shape[0] for result in emulate(NORMS, PROBLEM, CONFIG, norm_args(0))] == [0, 0]


def test_one_warp_width_may_do_without_named_barriers() -> None:
    config = Config.of(CONFIG, Q_WARPS=2, KV_WARPS=1, ROWS=2, VEC_BYTES=4)
    args = norm_args(5)
    results = emulate(NORMS, PROBLEM, config, args, warp_size=32, named_barriers=False)
    for result, right in zip(results, NORMS.exact(*args), strict=True):
        assert NORMS.tolerance(PROBLEM).error(result, right) <= 1.0


def test_arguments_that_the_kernel_is_not_launched_with_are_refused() -> None:
    args = norm_args(5)
    args[0] = torch.zeros(96, 5, dtype=torch.float16).T
    with pytest.raises(ValueError, match="is not launched with these arguments"):
        emulate(NORMS, PROBLEM, CONFIG, args)


def test_a_kernel_that_does_not_compile_is_one_clear_line() -> None:
    with pytest.raises(EmulationError, match=r"g\+\+ does not compile it: .*error"):
        emulate(NORMS, PROBLEM, Config.of(CONFIG, VEC_BYTES=32), norm_args(1))
