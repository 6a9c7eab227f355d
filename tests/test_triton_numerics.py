"""Kernels in Triton compute what the op's fp64 reference does, as Triton's interpreter runs them on the CPU.

It needs ``TRITON_INTERPRET=1`` from the start, which is why these tests run apart from the others.
"""

from __future__ import annotations

import random

import pytest
import torch
from interpreting import interpret, interpreting, unavailable, verify

from autofuse.ops import OPS, FusedOp, Problem
from fuzz_ops import random_config

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

CPU = torch.device("cpu")
MANY = 1 << 20
IN_TRITON = [op for op in OPS.values() if "cuda" in op.triton_kernels]
SWEEP = [pytest.param(op, problem, id=str(problem)) for op in IN_TRITON for problem in op.sweep_problems()]


def check_args(op: FusedOp, problem: Problem, tokens: int) -> tuple[object, ...]:
    return op.check_args(problem, tokens, CPU, torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize(("op", "problem"), SWEEP)
def test_the_default_config_is_right_for_few_tokens(op: FusedOp, problem: Problem) -> None:
    kernel = op.triton_kernels["cuda"]
    config = kernel.default(problem, 1)
    assert kernel.space.refusal(config, problem, MANY) is None
    for tokens in (1, 3):
        assert verify(op, problem, config, check_args(op, problem, tokens)) <= 1.0


@pytest.mark.parametrize(("op", "problem"), SWEEP)
def test_other_configs_are_right_for_tokens_that_fill_no_block(op: FusedOp, problem: Problem) -> None:
    kernel, source = op.triton_kernels["cuda"], random.Random(str(problem))
    # Without programmatic launch: the interpreter has no such instructions.
    config = random_config(kernel.space, problem, source, {"PDL": 0})
    assert config is not None
    assert verify(op, problem, config, check_args(op, problem, 7)) <= 1.0


@pytest.mark.parametrize("op", IN_TRITON, ids=lambda op: op.name)
def test_no_tokens_give_empty_results_and_no_launch(op: FusedOp) -> None:
    problem = op.sweep_problems()[0]
    config = op.triton_kernels["cuda"].default(problem, 1)
    assert op.launch_shape(problem, config).blocks(0) == 0


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is worth something: an eps that one half takes from the other shows."""
    op = OPS["mla_dual_rms_norm"]
    problem = op.make_problem(dtype="bf16", q_lora_rank=96, kv_lora_rank=40, cast_before_weight=True)
    config = op.triton_kernels["cuda"].default(problem, 1)
    args = check_args(op, problem, 3)
    swapped = (*args[:4], args[5], args[4], *args[6:])
    wrong, right = interpret(op, problem, config, swapped), op.exact(*args)
    assert op.tolerance(problem).error(wrong[0], right[0]) > 1.0


@pytest.mark.parametrize("native", [0, 1])
def test_fp8_codes_are_those_of_pytorch(native: int) -> None:
    """Of all bf16 numbers, of ties between fp8 numbers, and of their neighbours; saturated, and NaN as NaN."""
    from fp8_kernel import store_fp8

    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(ties, torch.full_like(ties, limit)) for limit in (-torch.inf, torch.inf)]
    values = torch.cat([every, ties, -ties, *beside, *(-each for each in beside)])
    out = torch.empty(len(values), dtype=torch.uint8)
    interpreting(store_fp8)[(1,)](
        values, out, len(values), BLOCK=1 << (len(values) - 1).bit_length(), FP8_NATIVE=native
    )
    right = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(out.view(torch.float8_e4m3fn).float().nan_to_num(999), right.float().nan_to_num(999))
    assert torch.equal(out[~values.isnan()], right.view(torch.uint8)[~values.isnan()])
