"""A short fuzz of every op, and what the fuzzer finds. ``scripts/fuzz_ops.py`` runs the long one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from emulation import emulate, unavailable

from autofuse.errors import BadInput
from autofuse.ops import OPS, FusedOp, Problem, get_op
from autofuse.ops.languages import CPP, language_of
from autofuse.runtime.dispatch import bind_plan
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of
from autofuse.tuner.compile_ahead import compile_pool
from autofuse.tuner.verify import WrongResult
from fuzz_ops import LAYOUTS, Case, draw_cases, draw_kernels, fuzz, run_case

CPU = torch.device("cpu")
NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="fp16", q_lora_rank=72, kv_lora_rank=26, cast_before_weight=True)


def case(tokens: int = 7, layout: str = "apart", problem: Problem = PROBLEM) -> Case:
    return Case(problem, NORMS.default_config("cpu", problem, 1), tokens, layout, seed=3)


def run(case: Case) -> float:
    plan = Plan(target_of(CPU).arch, case.problem, ((1, case.config),))
    return run_case(bind_plan(NORMS, plan, CPU), case, CPU)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_random_calls_are_right(op: FusedOp, device: torch.device) -> None:
    target = target_of(device)
    with compile_pool(target.kind, target.arch) as pool:
        report = fuzz(op, device, pool, kernels=2, cases=24, seed=0)
    assert report.wrong == []
    assert (report.kernels, report.cases) == (2, 24)
    assert report.worst <= 1


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "can be emulated")
@pytest.mark.parametrize("op", [op for op in OPS.values() if "cuda" in op.kernels], ids=lambda op: op.name)
def test_random_calls_of_gpu_kernels_are_right_in_emulation(op: FusedOp) -> None:
    source = random.Random(op.name)
    drawn = [kernel for kernel in draw_kernels(op, "cuda", 16, source) if language_of(kernel[1]) == CPP]
    for problem, config in sorted(drawn, key=lambda kernel: op.bytes_moved(kernel[0], 1))[:2]:  # emulation is slow
        args = op.check_args(problem, source.randint(1, 20), CPU, torch.Generator().manual_seed(0))
        exact = op.exact(*args)
        results = emulate(op, problem, config, args)
        written = [args[index] for index in op.mutates if args[index] is not None]
        for index, (result, right) in enumerate(zip([*results, *written], exact, strict=True)):
            assert op.tolerance(problem, index).error(result, right) <= 1.0, f"{problem} {config}: result {index}"


def test_the_same_seed_gives_the_same_cases() -> None:
    def drawn(seed: int) -> list[Case]:
        source = random.Random(seed)
        return list(draw_cases(NORMS, draw_kernels(NORMS, "cuda", 5, source), 20, source))

    assert drawn(5) == drawn(5) != drawn(6)
    assert {each.layout for each in drawn(5)} == set(LAYOUTS)


def test_a_case_runs_again_from_its_text() -> None:
    again = Case.parse(str(case()))
    assert again == case()
    assert run(again) == run(case())
    with pytest.raises(BadInput, match=r"is not of the form problem\|config\|tokens\|layout\|seed"):
        Case.parse("mla_dual_rms_norm")


@pytest.mark.parametrize(
    ("old", "new", "layout"),
    [
        ("p.kv_eps", "p.q_eps", "dense"),
        ("t * p.q_stride", "t * Q_WIDTH", "apart"),
    ],
    ids=["eps", "stride"],
)
def test_a_wrong_kernel_is_found(
    old: str, new: str, layout: str, edit_kernels: Callable[[str, str, str], None]
) -> None:
    problem = NORMS.make_problem(dtype="fp16", q_lora_rank=74, kv_lora_rank=26, cast_before_weight=True)
    edit_kernels(NORMS.kernel_source("cpu").file, old, new)
    with pytest.raises(WrongResult, match="times the tolerance"):
        run(case(layout=layout, problem=problem))


def test_a_write_beside_a_result_is_found(edit_kernels: Callable[[str, str, str], None]) -> None:
    problem = NORMS.make_problem(dtype="fp16", q_lora_rank=76, kv_lora_rank=26, cast_before_weight=True)
    begin, beside = "const Params p = *params;", "((unsigned char*)(p.kv_out + p.tokens * KV_WIDTH))[2] = 1;"
    edit_kernels(NORMS.kernel_source("cpu").file, begin, f"{begin}\n{beside}")
    with pytest.raises(WrongResult, match="memory beside result 1 was written"):
        run(case(problem=problem))


def test_a_kernel_that_is_never_launched_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def transposed(*args: object) -> tuple[object, ...]:
        q_c, *rest = NORMS.example_args(*args)  # type: ignore[arg-type]
        return q_c.T.contiguous().T, *rest

    monkeypatch.setattr(NORMS, "check_args", transposed)
    with pytest.raises(WrongResult, match="the reference would run"):
        run(case())
