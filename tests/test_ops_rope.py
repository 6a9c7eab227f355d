"""mla_rope_kv_cache_cat as a user calls it: what padding, missing caches and odd layouts mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autofuse.ops import Problem, get_op
from autofuse.runtime import dispatch
from autofuse.runtime.dispatch import OpRegistry, registry

ROPE = get_op("mla_rope_kv_cache_cat")
CACHE, SLOTS, SCALE = 7, 6, 8


def problem(cache: str = "auto", *, neox: bool = False, nope: int = 24, dtype: str = "bf16") -> Problem:
    return ROPE.make_problem(
        dtype=dtype, heads=3, nope_dim=nope, rope_dim=16, latent_dim=40, neox=neox, table="fp32", cache=cache
    )


def args_of(which: Problem, tokens: int, device: torch.device) -> list[Any]:
    return list(ROPE.example_args(which, tokens, device, torch.Generator(device).manual_seed(0)))


@pytest.fixture(params=["python", "native"])
def rope(request: pytest.FixtureRequest) -> Any:
    """The op as each of the two dispatchers runs it; a call's arguments are bound beforehand, by one on copies."""
    if request.param == "python":
        python = dispatch._PythonDispatcher(ROPE, OpRegistry())
        return lambda *args: python(*ROPE.split_plan(args))
    if not registry.go_native():
        pytest.fail("the native dispatcher cannot be built here")
    op = torch.ops.autofuse.mla_rope_kv_cache_cat

    def bound(*args: Any) -> tuple[torch.Tensor, ...]:
        op(*(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args))
        return op(*args)

    return bound


def assert_right(which: Problem, args: list[Any], call: Any) -> tuple[torch.Tensor, ...]:
    """Runs the call and compares its results, and what it wrote, with the exact ones."""
    exact = ROPE.exact(*args)
    results = call(*args)
    wrote = [args[index] for index in ROPE.mutates if args[index] is not None]
    for index, (result, right) in enumerate(zip([*results, *wrote], exact, strict=True)):
        assert result.shape == right.shape
        assert ROPE.tolerance(which, index).error(result, right) <= 1.0
    return results


@pytest.mark.parametrize("cache", ["none", "auto", "fp8"])
@pytest.mark.parametrize("neox", [False, True], ids=["GPT-J", "NeoX"])
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_queries_and_cache_are_those_of_the_reference(
    rope: Any, tokens: int, neox: bool, cache: str, device: torch.device
) -> None:
    which = problem(cache, neox=neox)
    assert_right(which, args_of(which, tokens, device), rope)


def test_a_padded_token_writes_no_cache_row_and_is_rotated_all_the_same(rope: Any, device: torch.device) -> None:
    which = problem()
    args = args_of(which, 7, device)
    args[SLOTS][[0, 3, 6]] = -1
    assert_right(which, args, rope)


def test_rows_that_no_slot_names_keep_every_byte(rope: Any, device: torch.device) -> None:
    args = args_of(problem("fp8"), 7, device)
    before = args[CACHE].view(torch.uint8).clone()
    rope(*args)
    untouched = torch.ones(before.shape[:2], dtype=torch.bool, device=device)
    untouched.view(-1)[args[SLOTS]] = False
    assert torch.equal(args[CACHE].view(torch.uint8)[untouched], before[untouched])


def test_cache_rows_may_lie_apart(rope: Any, device: torch.device) -> None:
    which = problem()
    args = args_of(which, 9, device)
    blocks, size, width = args[CACHE].shape
    wide = torch.full((blocks, size + 3, width + 8), 7.0, dtype=torch.bfloat16, device=device)
    args[CACHE] = wide[:, :size, :width]
    assert_right(which, args, rope)
    assert bool((wide[:, size:] == 7).all())
    assert bool((wide[:, :, width:] == 7).all())


@pytest.mark.parametrize("absent", ["no cache", "no slots", "cache without rows"])
def test_before_a_model_has_its_cache_queries_are_rotated_all_the_same(
    rope: Any, absent: str, device: torch.device
) -> None:
    args = args_of(problem(), 5, device)
    expected = ROPE.exact(*args)[:2]
    if absent == "no slots":
        args[SLOTS] = None
    else:
        args[CACHE] = None if absent == "no cache" else args[CACHE][:0]
    for index, (result, right) in enumerate(zip(rope(*args), expected, strict=True)):
        assert ROPE.tolerance(problem(), index).error(result, right) <= 1.0


@pytest.mark.parametrize("change", ["no slots", "no rows", "a scale without dimensions"])
def test_each_kind_of_call_is_bound_but_once(
    change: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindings: list[Any] = []
    bind = dispatch.bind_plan
    monkeypatch.setattr(dispatch, "bind_plan", lambda *a: bindings.append(a) or bind(*a))
    python = dispatch._PythonDispatcher(ROPE, OpRegistry())
    args = args_of(problem("fp8"), 5, device)
    if change == "no slots":
        args[SLOTS] = None
    elif change == "no rows":
        args[CACHE] = args[CACHE][:0]
    else:
        args[SCALE] = args[SCALE][0]
    for _ in range(5):
        python(args, "")
    assert len(bindings) == 1


def test_without_q_nope_the_rotated_query_comes_alone(rope: Any, device: torch.device) -> None:
    which = problem(nope=0)
    q, k_pe = assert_right(which, args_of(which, 4, device), rope)
    assert (q.shape, k_pe.shape) == ((4, 3, 16), (4, 16))


def test_no_tokens_give_empty_results(rope: Any, device: torch.device) -> None:
    q, k_pe = rope(*args_of(problem(), 0, device))
    assert (q.shape, k_pe.shape) == ((0, 3, 40), (0, 16))


def test_fp8_values_beyond_the_largest_are_the_largest(rope: Any, device: torch.device) -> None:
    args = args_of(problem("fp8"), 2, device)
    args[2].fill_(1000.0)
    args[SCALE].fill_(1.0)
    rope(*args)
    rows = args[CACHE].float().view(-1, 56)[args[SLOTS]]
    assert bool((rows[:, :40] == 448).all())


@pytest.mark.parametrize(
    ("index", "value", "said"),
    [
        (4, torch.zeros(4, dtype=torch.int32), "must be int64"),
        (4, torch.zeros(3, dtype=torch.int64), "positions has 3 rows, q_pe 4"),
        (5, torch.zeros(9, 8), "elements, which must be one number"),
        (7, torch.zeros(2, 64, 50, dtype=torch.bfloat16), r"is not \[blocks, block_size, 56\]"),
        (7, torch.zeros(2, 64, 56).to(torch.float8_e4m3fn), "needs kv_scale"),
    ],
)
def test_arguments_that_do_not_fit_are_one_clear_line(index: int, value: torch.Tensor, said: str) -> None:
    args = args_of(problem(), 4, torch.device("cpu"))
    args[index] = value
    with pytest.raises(RuntimeError, match=said):
        torch.ops.autofuse.mla_rope_kv_cache_cat(*args)


def test_pytorch_accepts_its_registration(device: torch.device) -> None:
    torch.library.opcheck(torch.ops.autofuse.mla_rope_kv_cache_cat.default, tuple(args_of(problem(), 3, device)))


def test_compiled_graphs_write_into_the_callers_cache(device: torch.device) -> None:
    which = problem()
    args = args_of(which, 6, device)

    def step(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return torch.ops.autofuse.mla_rope_kv_cache_cat(*inputs)

    compiled = torch.compile(step, backend="aot_eager")
    assert_right(which, args, compiled)
