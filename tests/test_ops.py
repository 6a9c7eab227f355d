"""The fused ops as a user calls them: right on every dtype and layout, on each kind of device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from autofuse.cache_db import TunedDatabase, Winner
from autofuse.ops import OPS, Config, FusedOp, Problem, get_op
from autofuse.ops.base import DTYPES
from autofuse.ops.buckets import RANGE_BUCKETS
from autofuse.runtime import dispatch
from autofuse.runtime.dispatch import OpRegistry, bind_plan, registry
from autofuse.runtime.plan import Plan
from autofuse.targets import Target, target_of
from autofuse.tuner.budgets import Effort
from autofuse.tuner.compile_ahead import compile_pool
from autofuse.tuner.verify import verify

NORMS = get_op("mla_dual_rms_norm")
SWEEP = [pytest.param(problem, id=str(problem)) for op in OPS.values() for problem in op.sweep_problems()]

Call = Callable[..., tuple[torch.Tensor, ...]]


@pytest.fixture(params=["python", "native"])
def norm(request: pytest.FixtureRequest) -> Call:
    """The op as each of the two dispatchers runs it."""
    if request.param == "python":
        python = dispatch._PythonDispatcher(NORMS, OpRegistry())
        return lambda *args: python(*NORMS.split_plan(args))
    if not registry.go_native():
        pytest.fail("the native dispatcher cannot be built here")
    op = torch.ops.autofuse.mla_dual_rms_norm

    def bound(*args: Any) -> tuple[torch.Tensor, ...]:
        op(*args)  # the first call of a kind binds, in Python
        return op(*args)

    return bound


def args_of(op: FusedOp, problem: Problem, tokens: int, device: torch.device) -> tuple[Any, ...]:
    return op.example_args(problem, tokens, device, torch.Generator(device).manual_seed(0))


def norms(dtype: str = "bf16", q: int = 96, kv: int = 40, cast: bool = True) -> Problem:
    return NORMS.make_problem(dtype=dtype, q_lora_rank=q, kv_lora_rank=kv, cast_before_weight=cast)


def plan_of(problem: Problem, config: Config, device: torch.device) -> Plan:
    return Plan(target_of(device).arch, problem, ((1, config),))


def assert_right(op: FusedOp, problem: Problem, args: tuple[Any, ...], results: tuple[torch.Tensor, ...]) -> None:
    """What the op wrote into its arguments is compared by ``verify``; here only what it returned."""
    expected = zip(results, op.exact(*args)[: op.result_count], op.fake(*args), strict=True)
    for index, (result, exact, fake) in enumerate(expected):
        assert result.shape == exact.shape == fake.shape
        assert result.stride() == fake.stride()
        assert op.tolerance(problem, index).error(result, exact) <= 1.0


@pytest.mark.parametrize("problem", SWEEP)
def test_default_kernels_compute_every_problem(problem: Problem, device: torch.device) -> None:
    op = get_op(problem.op)
    config = op.default_config(target_of(device).kind, problem, 1)
    kernel = bind_plan(op, plan_of(problem, config, device), device)
    for tokens in (1, 2, 33):
        args = args_of(op, problem, tokens, device)
        assert_right(op, problem, args, kernel(*args))


def test_every_config_of_the_search_space_computes_the_op(device: torch.device, tiny: Effort) -> None:
    target, problem, tokens = target_of(device), norms(), 37
    configs = list(NORMS.kernel_source(target.kind).space.configs(problem, tokens))[
        :: 1 if target.kind == "cpu" else 37
    ]
    specs = [NORMS.spec(target.kind, problem, config) for config in configs]
    with compile_pool(target.kind, target.arch) as pool:
        for config, future in zip(configs, pool.submit(specs), strict=True):
            future.result()
            verify(NORMS, problem, tokens, bind_plan(NORMS, plan_of(problem, config, device), device), device, tiny)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ops_run_through_torch_ops(norm: Call, dtype: str, device: torch.device) -> None:
    problem = norms(dtype)
    for tokens in (1, 5, 300):
        args = args_of(NORMS, problem, tokens, device)
        assert_right(NORMS, problem, args, norm(*args))


def test_no_tokens_give_empty_results(norm: Call, device: torch.device) -> None:
    q, kv = norm(*args_of(NORMS, norms(), 0, device))
    assert (q.shape, kv.shape, q.dtype) == ((0, 96), (0, 40), torch.bfloat16)


def test_arguments_may_be_given_by_name(device: torch.device) -> None:
    q_c, q_weight, kv_c, kv_weight, *_ = args = args_of(NORMS, norms(), 3, device)
    named = torch.ops.autofuse.mla_dual_rms_norm(
        q_c=q_c,
        q_weight=q_weight,
        kv_c=kv_c,
        kv_weight=kv_weight,
        q_eps=1e-6,
        kv_eps=1e-6,
        cast_before_weight=True,
        plan="",
    )
    for result, expected in zip(named, torch.ops.autofuse.mla_dual_rms_norm(*args), strict=True):
        assert torch.equal(result, expected)


def test_the_two_halves_have_an_eps_each(norm: Call, device: torch.device) -> None:
    q_c, q_weight, kv_c, kv_weight, *_ = args_of(NORMS, norms(), 3, device)
    args = (q_c, q_weight, kv_c, kv_weight, 0.5, 2.0, True)
    assert_right(NORMS, norms(), args, norm(*args))


def test_views_that_kernels_cannot_read_are_computed_by_the_reference(norm: Call, device: torch.device) -> None:
    q_c, q_weight, kv_c, kv_weight, *rest = args_of(NORMS, norms(), 4, device)
    flat = torch.randn(4 * 96 + 1, device=device).to(q_c.dtype)
    unaligned = flat[1:].view(4, 96)
    transposed = torch.randn(96, 4, device=device).to(q_c.dtype).T
    repeated = q_weight[:1].expand(96)
    for view, weight in ((unaligned, q_weight), (transposed, q_weight), (q_c, repeated)):
        args = (view, weight, kv_c, kv_weight, *rest)
        assert_right(NORMS, norms(), args, norm(*args))


def test_unsupported_dtypes_run_the_reference(norm: Call, device: torch.device) -> None:
    args = args_of(NORMS, norms(), 4, device)
    wide = [arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args]
    mixed = [args[0], args[1].float(), *args[2:]]
    for unusual in (wide, mixed):
        for result, expected in zip(norm(*unusual), NORMS.reference(*unusual), strict=True):
            assert result.dtype == expected.dtype
            assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 96), (96,), (5, 40), (40,)), "q_c has 4 rows, kv_c 5"),
        (((4, 96), (90,), (4, 40), (40,)), "q_c [4, 96] and q_weight [90] are not [T, width] and [width]"),
        (((4, 96), (96,), (2, 2, 40), (40,)), "kv_c [2, 2, 40] and kv_weight [40]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: tuple[tuple[int, ...], ...], message: str, device: torch.device
) -> None:
    tensors = [torch.ones(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    with pytest.raises(ValueError, match="mla_dual_rms_norm") as refusal:
        torch.ops.autofuse.mla_dual_rms_norm(*tensors, 1e-6, 1e-6, True)
    assert message in str(refusal.value)


def test_row_counts_are_checked_on_later_calls_too(device: torch.device) -> None:
    q_c, q_weight, kv_c, kv_weight, *rest = args_of(NORMS, norms(), 4, device)
    torch.ops.autofuse.mla_dual_rms_norm(q_c, q_weight, kv_c, kv_weight, *rest)
    with pytest.raises(ValueError, match="q_c has 4 rows, kv_c 3"):
        torch.ops.autofuse.mla_dual_rms_norm(q_c, q_weight, kv_c[:3], kv_weight, *rest)


@pytest.mark.parametrize("check", ["test_schema", "test_autograd_registration", "test_faketensor"])
def test_pytorch_accepts_the_registration(check: str, device: torch.device) -> None:
    args = args_of(NORMS, norms(), 3, device)
    torch.library.opcheck(torch.ops.autofuse.mla_dual_rms_norm.default, args, test_utils=check)


def test_a_plan_names_the_config_for_each_bucket(norm: Call, device: torch.device) -> None:
    problem, target = norms(), target_of(device)
    configs = list(NORMS.kernel_source(target.kind).space.configs(problem, 64))[:2]
    plan = Plan(target.arch, problem, ((4, configs[0]), (64, configs[1])))
    assert [plan.config_for(tokens) for tokens in (1, 4, 5, 64, 65)] == [configs[i] for i in (0, 0, 1, 1, 1)]
    for tokens in (1, 4, 5, 64, 65):
        args = args_of(NORMS, problem, tokens, device)
        assert_right(NORMS, problem, args, norm(*args, str(plan)))


def test_without_a_plan_the_databases_winner_runs(device: torch.device, loaded: list[Config]) -> None:
    problem, target = norms(q=104), target_of(device)
    default = NORMS.default_config(target.kind, problem, 1)
    space = NORMS.kernel_source(target.kind).space
    other = next(config for config in space.configs(problem, 8) if config != default)
    with TunedDatabase() as database:
        database.record_winner(winner(target, problem, 8, other, NORMS.source_hash(target.kind)))
    torch.ops.autofuse.mla_dual_rms_norm(*args_of(NORMS, problem, 8, device))
    assert loaded == [other]


def test_a_winner_of_another_kernel_version_does_not_run(device: torch.device, loaded: list[Config]) -> None:
    problem, target = norms(q=112), target_of(device)
    with TunedDatabase() as database:
        database.record_winner(winner(target, problem, 8, Config.of(NO_LONGER=1), "0123456789abcdef"))
    torch.ops.autofuse.mla_dual_rms_norm(*args_of(NORMS, problem, 8, device))
    assert set(loaded) == {NORMS.default_config(target.kind, problem, tokens) for tokens in RANGE_BUCKETS}


def test_plans_for_something_else_run_the_reference(device: torch.device, loaded: list[Config]) -> None:
    problem, target = norms(), target_of(device)
    config = NORMS.default_config(target.kind, problem, 1)
    args = args_of(NORMS, problem, 3, device)
    for plan in (Plan("sm_1", problem, ((1, config),)), Plan(target.arch, norms(q=48), ((1, config),))):
        assert_right(NORMS, problem, args, torch.ops.autofuse.mla_dual_rms_norm(*args, str(plan)))
    assert loaded == []


def test_malformed_plans_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="is not of the form arch"):
        torch.ops.autofuse.mla_dual_rms_norm(*args_of(NORMS, norms(), 3, device), "nonsense")


def test_a_broken_database_does_not_break_a_call(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    with TunedDatabase() as database:
        path = database.path
    path.write_text("this is no database, but it is longer than a page of SQLite " * 20, encoding="utf-8")
    problem = norms(q=120)
    args = args_of(NORMS, problem, 3, device)
    assert_right(NORMS, problem, args, torch.ops.autofuse.mla_dual_rms_norm(*args))
    assert "runs its reference: database" in caplog.text


def winner(target: Target, problem: Problem, tokens: int, config: Config, source_hash: str) -> Winner:
    return Winner(target, problem, tokens, config, source_hash, 1.0, 0.1, "eager", 2.0, 2.0, 1.9, 2.1)
