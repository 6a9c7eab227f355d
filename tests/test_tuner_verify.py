"""Verification catches kernels that are wrong only where a model's usual inputs would not show it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from autofuse.ops import OPS, FusedOp, Problem, get_op
from autofuse.ops.base import Tolerance
from autofuse.runtime.dispatch import bind_plan
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of
from autofuse.tuner.budgets import Effort
from autofuse.tuner.guards import same_bits
from autofuse.tuner.verify import Verification, WrongResult, verify

CPU = torch.device("cpu")
NORMS, ROPE = get_op("mla_dual_rms_norm"), get_op("mla_rope_kv_cache_cat")
SWEEP = [pytest.param(problem, id=str(problem)) for op in OPS.values() for problem in op.sweep_problems()]


def norms(dtype: str = "bf16", q: int = 96, kv: int = 40) -> Problem:
    return NORMS.make_problem(dtype=dtype, q_lora_rank=q, kv_lora_rank=kv, cast_before_weight=True)


def rope(cache: str = "auto") -> Problem:
    params: dict[str, Any] = {"heads": 3, "nope_dim": 24, "rope_dim": 16, "latent_dim": 40, "neox": True}
    return ROPE.make_problem(dtype="bf16", table="fp32", cache=cache, **params)


def kernel(op: FusedOp, problem: Problem, device: torch.device) -> Callable[..., Any]:
    """The default kernel as the present sources have it."""
    config = op.default_config(target_of(device).kind, problem, 1)
    return bind_plan(op, Plan(target_of(device).arch, problem, ((1, config),)), device)


def check_args(problem: Problem, tokens: int, device: torch.device = CPU) -> tuple[Any, ...]:
    return get_op(problem.op).check_args(problem, tokens, device, torch.Generator(device).manual_seed(0))


@pytest.mark.parametrize("problem", SWEEP)
def test_kernels_that_are_right_pass_with_room_to_spare(problem: Problem, device: torch.device, tiny: Effort) -> None:
    op = get_op(problem.op)
    call = kernel(op, problem, device)
    for tokens in (1, 3, 17, 64):
        assert verify(op, problem, tokens, call, device, tiny) < 0.8


@pytest.mark.parametrize("problem", SWEEP)
def test_the_widest_vectors_launch_on_what_is_checked(problem: Problem, device: torch.device) -> None:
    binding = get_op(problem.op).binding(problem)
    for tokens in (1, 3, 17):
        args = check_args(problem, tokens, device)
        assert get_op(problem.op).problem_of(*args) == problem
        assert binding.accepts(args)
        assert binding.launchable(args, 16)


def test_what_is_checked_is_unlike_what_a_model_makes() -> None:
    q_c, _, kv_c, _, q_eps, kv_eps, _ = check_args(norms(q=64, kv=64), 9)
    assert (q_eps, kv_eps) == (0.3, 2.0)
    assert q_c._base is not kv_c._base
    assert q_c.stride(0) != kv_c.stride(0)
    assert int((q_c == 0).all(-1).sum()) == int((kv_c == 0).all(-1).sum()) == 1
    slots, cache, _, scale, *_ = check_args(rope("fp8"), 60)[6:]
    blocks, size, width = cache.shape
    assert cache.stride(0) > size * cache.stride(1) > size * width
    assert len(slots) <= 60
    assert bool((slots[1::3] < 0).all())
    assert bool((slots[3::6] >= blocks * size).all())
    assert scale != ROPE.check_args(rope("fp8"), 9, CPU, torch.Generator().manual_seed(1))[9]


@dataclass(frozen=True)
class Mutation:
    """A fault of a kernel source: the one of SOURCES, unless another file is named."""

    name: str
    problem: Problem
    old: str
    new: str
    tokens: int = 8
    file: str = ""


NORM_ROW = "rms_norm.h"
SOURCES = {NORMS.name: "mla_dual_rms_norm.cpp", ROPE.name: "mla_rope.h"}
AT = "slot / cache.block_size * cache.block + slot % cache.block_size * cache.row"
LAST = "slot < int64_t(cache.blocks) * cache.block_size"
MUTATIONS = [
    Mutation("eps is ignored", norms(), "sum / WIDTH + eps", "sum / WIDTH + 1e-6f", file=NORM_ROW),
    Mutation("the default eps is hard-coded", norms("fp32"), "/ WIDTH + eps", "/ WIDTH + 1e-5f", file=NORM_ROW),
    Mutation("kv is normed with q's eps", norms(), "p.kv_eps", "p.q_eps"),
    Mutation("kv is read with q's stride", norms(), "p.kv + t * p.kv_stride", "p.kv + t * p.q_stride"),
    Mutation("q's stride is its width", norms(), "t * p.q_stride", "t * Q_WIDTH"),
    Mutation("a bucket of one token forgets the stride", norms(), "t * p.q_stride", "t * Q_WIDTH", 1),
    Mutation("the cast before the weight is dropped", norms(), "(CAST_BEFORE_WEIGHT)", "(false)", file=NORM_ROW),
    Mutation("the cast is dropped in fp16", norms("fp16", 1536, 512), "(CAST_BEFORE_WEIGHT)", "(false)", file=NORM_ROW),
    Mutation("padded tokens are written", rope(), "slot >= 0 && ", ""),
    Mutation("a bucket of one token writes padded ones", rope(), "slot >= 0 && ", "", 1),
    Mutation("slots beyond the cache are written", rope(), LAST, "true", 40),
    Mutation("tokens without a slot are written", rope(), "CACHE && t < p.slot_count", "CACHE", 40),
    Mutation("blocks have 64 rows", rope(), AT, AT.replace("cache.block_size", "64")),
    Mutation("a bucket of one token has blocks of 64 rows", rope(), AT, AT.replace("cache.block_size", "64"), 1),
    Mutation("cache rows are dense", rope(), "cache.row;", "(LATENT + ROPE);"),
    Mutation("cache blocks are dense", rope(), "* cache.block +", "* (cache.block_size * (LATENT + ROPE)) +"),
    Mutation("the cache is dense", rope(), AT, "slot * (LATENT + ROPE)"),
    Mutation("k_pe's cache has kv_c's strides", rope("auto_apart"), "row_of(k_pe_cache", "row_of(p.kv_cache"),
    Mutation("the scale is that of the examples", rope("fp8"), "*p.kv_scale", "0.37f"),
    Mutation("the scale is 1", rope("fp8"), "*p.kv_scale", "1.f"),
    Mutation("k_pe is read with kv_c's stride", rope(), "t * p.k_pe_token", "t * p.kv_c_token"),
    Mutation("the table is dense", rope(), "* p.table_row", "* ROPE"),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: re.sub(r"\W+", "-", mutation.name))
def test_a_wrong_kernel_is_caught(
    mutation: Mutation, edit_kernels: Callable[[str, str, str], None], tiny: Effort
) -> None:
    op = get_op(mutation.problem.op)
    edit_kernels(mutation.file or SOURCES[op.name], mutation.old, mutation.new)
    with pytest.raises(WrongResult, match=r"times the tolerance|was changed|beside an input"):
        verify(op, mutation.problem, mutation.tokens, kernel(op, mutation.problem, CPU), CPU, tiny)


# Several runs


def negated(runs: int, q: torch.Tensor) -> None:
    q.neg_()


def beside(runs: int, q: torch.Tensor) -> None:
    torch.empty(0, dtype=torch.uint8).set_(q.untyped_storage())[0] ^= 1


def first_alone(runs: int, q: torch.Tensor) -> None:
    if runs == 0:
        q.neg_()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (negated, "changed back by the next call"),
        (beside, "changed back by the next call"),
        (first_alone, "input 0 was changed"),
    ],
)
def test_what_a_call_does_to_its_inputs_is_caught_even_if_the_next_undoes_it(
    harm: Callable[[int, torch.Tensor], None], said: str, tiny: Effort
) -> None:
    runs = 0

    def call(q: torch.Tensor, *others: Any) -> Any:
        """Right each time."""
        nonlocal runs
        spoilt = runs % 2 if harm is negated else harm is first_alone and runs
        mended = -q if spoilt else q
        results = NORMS.reference(mended, *others)
        harm(runs, q)
        runs += 1
        return results

    with pytest.raises(WrongResult, match=said):
        verify(NORMS, norms(), 4, call, CPU, tiny)
    assert runs == 2


def test_inputs_are_what_they_were_after_a_call_that_spoils_them(tiny: Effort) -> None:
    checked = Verification(NORMS, norms(), 4, CPU, tiny)
    checked.prepare()

    def spoils(q: torch.Tensor, *others: Any) -> Any:
        results = NORMS.reference(q, *others)
        q.zero_()
        return results

    assert checked.check(NORMS.reference) <= 1.0
    for _ in range(2):
        with pytest.raises(WrongResult, match="input 0 was changed"):
            checked.check(spoils)
        assert checked.check(NORMS.reference) <= 1.0


def test_a_call_with_too_few_results_never_passes(tiny: Effort) -> None:
    checked = Verification(NORMS, norms(), 4, CPU, tiny)
    for _ in range(2):
        with pytest.raises(ValueError, match="argument 2 is longer"):
            checked.check(lambda *args: NORMS.reference(*args)[:1])
        checked.check(NORMS.reference)


def test_bits_of_other_shapes_are_not_the_same() -> None:
    zeros = torch.zeros(2, 3)
    assert same_bits(zeros, zeros.clone())
    assert not same_bits(zeros, zeros[0])
    assert not same_bits(zeros, zeros.T)


# The tolerance


def test_no_element_may_be_beyond_the_relative_bound() -> None:
    right = torch.ones(1000)
    out = right.clone()
    out[3] += 0.02
    assert Tolerance(relative=0.01, absolute=0.0).error(out, right) == pytest.approx(2.0, rel=1e-4)


def test_one_element_in_a_hundred_may_be_beyond_the_usual_bound() -> None:
    tolerance, right = Tolerance(relative=0.1, absolute=0.0, usual=0.01), torch.ones(1000)
    out = right.clone()
    out[:9] += 0.02
    assert tolerance.error(out, right) == pytest.approx(0.9)
    out[:20] = 1.02
    assert tolerance.error(out, right) == pytest.approx(2.0)


def test_two_of_few_elements_may_be_beyond_the_usual_bound() -> None:
    tolerance, right = Tolerance(relative=0.1, absolute=0.0, usual=0.01), torch.ones(10)
    assert tolerance.error(right + 0.02 * (torch.arange(10) < 2), right) == 1.0
    assert tolerance.error(right + 0.02 * (torch.arange(10) < 3), right) == 1.5


def test_nan_is_infinitely_wrong() -> None:
    out = torch.tensor([1.0, float("nan")])
    for usual in (None, 0.01):
        assert Tolerance(0.1, 0.0, usual).error(out, torch.ones(2)) == float("inf")
