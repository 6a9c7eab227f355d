"""Every GPU kernel computes its op, run on the CPU without a GPU: several configs, ragged T, both warp widths."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from emulation import BLOCK_ORDERS, EmulationError, build, emulate, unavailable

from autofuse.ops import OPS, Config, Problem, get_op

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "can be emulated")

CPU = torch.device("cpu")
TOKENS = (1, 3, 17, 45)  # the last is more than one block of every config
LARGE = 1 << 16  # the T that configs are drawn for: constraints on small T do not bite
TRIES = 300  # random configs until one has a wanted value and meets the constraints
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


def fits(kind: str, problem: Problem, config: Config, warp_size: int) -> bool:
    spec = get_op(problem.op).spec(kind, problem, config)
    return spec.block // int(spec.defines.get("WARP_SIZE", 32)) * warp_size <= MOST_THREADS


def sampled(kind: str, op_name: str) -> Iterator[tuple[Problem, Config]]:
    """For each value of each tunable a config that has it, of some problem; the same ones each time."""
    op, source = get_op(op_name), random.Random(f"{op_name} {kind}")
    space, problems = op.kernel_source(kind).space, op.sweep_problems()
    covered: set[tuple[str, int]] = set()
    for tunable in space.tunables:
        for value in tunable.values:
            for _ in range(TRIES if (tunable.name, value) not in covered else 0):
                problem = source.choice(problems)
                others = {each.name: source.choice(each.values) for each in space.tunables}
                config = Config.of(others, **{tunable.name: value})
                if space.refusal(config, problem, LARGE) is None:
                    covered |= set(config.items())
                    yield problem, config
                    break


def cases() -> Iterator[Case]:
    for op in OPS.values():
        for kind in op.kernels.keys() & {"cuda", "hip"}:
            widths = {"cuda": (32, 64), "hip": (64,)}[kind]
            for problem in op.sweep_problems():
                config = op.default_config(kind, problem, 1)
                yield from (Case(kind, problem, config, width) for width in widths)
            if kind == "cuda" and "hip" in op.kernels:
                widths = (32,)
            for problem, config in sampled(kind, op.name):
                yield from (Case(kind, problem, config, width) for width in widths)


CASES = sorted({case for case in cases() if fits(case.kind, case.problem, case.config, case.warp_size)}, key=str)


@pytest.fixture(scope="module")
def _built(request: pytest.FixtureRequest) -> None:
    """Compiles the kernels of all tests that are going to run, side by side."""

    def compile_kernel(case: Case) -> None:
        spec = get_op(case.problem.op).spec(case.kind, case.problem, case.config)
        build(spec, warp_size=case.warp_size)

    wanted = [item.callspec.params["case"] for item in request.session.items if "_built" in vars(item)["fixturenames"]]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_kernel, wanted))


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_kernels_compute_their_op(case: Case) -> None:
    op, problem = get_op(case.problem.op), case.problem
    for tokens in TOKENS:
        args = op.example_args(problem, tokens, CPU, torch.Generator().manual_seed(tokens))
        exact = op.exact(*args)
        results = emulate(
            op,
            problem,
            case.config,
            args,
            kind=case.kind,
            warp_size=case.warp_size,
        )
        written = [args[index] for index in op.mutates if args[index] is not None]
        for index, (result, right) in enumerate(zip([*results, *written], exact, strict=True)):
            assert op.tolerance(problem, index).error(result, right) <= 1.0, f"T={tokens}, result {index}"


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
