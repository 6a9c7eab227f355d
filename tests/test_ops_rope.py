"""mla_rope_kv_cache_cat as a user calls it: what padding, missing caches, kinds of caches and odd layouts mean."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from emulation import emulate, unavailable
from emulation import verify as verify_emulated

from autofuse.errors import BadInput
from autofuse.ops import Config, Problem, get_op
from autofuse.runtime import dispatch
from autofuse.runtime.dispatch import OpRegistry, bind_plan, registry
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of

ROPE = get_op("mla_rope_kv_cache_cat")
Q_NOPE, Q_PE, KV_C, K_PE, POSITIONS, TABLE, SLOTS, CACHE, K_PE_CACHE, KV_SCALE, Q_SCALE = range(11)
IS_NEOX, DEINTERLEAVE = 11, 12
CPU = torch.device("cpu")
UNSEEN_HEADS = itertools.count(33)  # so many heads has no call of another test


STYLES: dict[str, dict[str, bool]] = {
    "GPT-J": {"neox": False},
    "NeoX": {"neox": True},
    "halves out": {"neox": False, "deinterleave": True},
}


def problem(
    cache: str = "auto",
    *,
    style: str = "GPT-J",
    nope: int = 24,
    dtype: str = "bf16",
    query: str = "auto",
    heads: int = 3,
) -> Problem:
    latent, rope = (512, 64) if cache == "fp8_ds_mla" else (40, 16)
    widths = {"heads": heads, "nope_dim": nope, "rope_dim": rope, "latent_dim": latent}
    return ROPE.make_problem(dtype=dtype, table="fp32", cache=cache, query=query, **STYLES[style], **widths)


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


def launched(which: Problem, args: list[Any]) -> bool:
    """Whether a kernel takes the call, and not the reference."""
    return ROPE.binding(which).accepts(args) and ROPE.binding(which).launchable(args, 4)


def longer(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """With ``rows`` rows more, of NaN: whoever reads them shows it."""
    return torch.cat([tensor, tensor.new_full((rows, *tensor.shape[1:]), float("nan"))])


@pytest.mark.parametrize(
    ("cache", "query"),
    [
        ("none", "fp8"),
        ("auto", "auto"),
        ("fp8", "fp8"),
        ("fp8_ds_mla", "auto"),
        ("auto_apart", "auto"),
        ("fp8_apart", "fp8"),
    ],
)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_queries_and_caches_are_those_of_the_reference(
    rope: Any, tokens: int, style: str, cache: str, query: str, device: torch.device
) -> None:
    which = problem(cache, style=style, query=query)
    args = args_of(which, tokens, device)
    assert launched(which, args)
    results = assert_right(which, args, rope)
    for result, fake in zip(results, ROPE.fake(*args), strict=True):
        assert (result.shape, result.dtype, result.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("heads", [1, 128])
def test_there_may_be_one_head_or_many(rope: Any, heads: int, device: torch.device) -> None:
    which = problem(heads=heads)
    assert_right(which, args_of(which, 3, device), rope)


# Styles


def test_neighbours_come_out_as_halves_of_what_gptj_gives(rope: Any, device: torch.device) -> None:
    """Also in the cache."""
    args = args_of(problem(), 5, device)
    caches = [args[CACHE].clone() for _ in range(2)]
    found = []
    for deinterleave, cache in zip((False, True), caches, strict=True):
        args[CACHE], args[DEINTERLEAVE] = cache, deinterleave
        q, k_pe = rope(*args)
        found.append((q[..., 24:], k_pe, cache.view(-1, 56)[args[SLOTS], 40:]))
    for pairs, halves in zip(*found, strict=True):
        assert torch.equal(torch.cat([pairs[..., ::2], pairs[..., 1::2]], dim=-1), halves)


def test_the_style_may_be_left_out_of_a_call_and_of_a_problem(device: torch.device) -> None:
    """As calls and problems were before there was a choice."""
    args = args_of(problem(), 5, device)
    op = torch.ops.autofuse.mla_rope_kv_cache_cat
    for result, right in zip(op(*args[:DEINTERLEAVE], plan=""), op(*args), strict=True):
        assert torch.equal(result, right)
    assert "deinterleave" not in str(problem())
    assert str(problem(style="halves out")).endswith(",cache=auto,deinterleave=1)")


# Padding


@pytest.mark.parametrize("slot", [-1, -(2**40)])
@pytest.mark.parametrize("cache", ["auto", "fp8_apart", "fp8_ds_mla"])
def test_a_token_whose_slot_is_negative_writes_none_and_is_rotated_all_the_same(
    rope: Any, cache: str, slot: int, device: torch.device
) -> None:
    which = problem(cache)
    args = args_of(which, 7, device)
    args[SLOTS][[0, 3, 6]] = slot
    assert_right(which, args, rope)


@pytest.mark.parametrize("slot", [2 * 64, 2**40], ids=["first-beyond", "far-beyond"])
@pytest.mark.parametrize("cache", ["auto", "fp8_apart", "fp8_ds_mla"])
def test_kernels_write_no_slot_beyond_the_cache(cache: str, slot: int, device: torch.device) -> None:
    which = problem(cache)
    target = target_of(device)
    plan = Plan(target.arch, which, ((1, ROPE.default_config(target.kind, which, 1)),))
    args = args_of(which, 7, device)
    args[SLOTS][[0, 3, 6]] = slot
    assert_right(which, args, bind_plan(ROPE, plan, device))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (SLOTS, 2 * 64, r"slot_mapping\[3\] is 128, but kv_cache \[2, 64, \d+\] has 128 rows"),
        (SLOTS, 2**40, r"slot_mapping\[3\] is 1099511627776, but kv_cache"),
        (POSITIONS, -1, r"positions\[3\] is -1, but cos_sin_cache"),
        (POSITIONS, 2**40, r"positions\[3\] is 1099511627776, but cos_sin_cache"),
    ],
)
@pytest.mark.parametrize("native", [False, True])
def test_rows_that_do_not_exist_are_named(
    native: bool, index: int, value: int, message: str, device: torch.device
) -> None:
    """On a CPU in every call; on a GPU in the first of a kind, which has to wait anyway."""
    if native and not registry.go_native():
        pytest.fail("the native dispatcher cannot be built here")
    python = dispatch._PythonDispatcher(ROPE, OpRegistry())
    op = torch.ops.autofuse.mla_rope_kv_cache_cat if native else lambda *args: python(*ROPE.split_plan(args))
    args = args_of(problem(heads=next(UNSEEN_HEADS)), 7, device)
    if device.type == "cpu":
        op(*args)
        op(*args)  # bound
    args[index][3] = value
    before = args[CACHE].clone()
    with pytest.raises(ValueError, match=message):
        op(*args)
    assert torch.equal(args[CACHE], before)


def test_slots_behind_the_last_token_are_not_looked_at(rope: Any, device: torch.device) -> None:
    args = args_of(problem(), 7, device)
    args[SLOTS] = torch.cat([args[SLOTS], torch.full((2,), 1 << 40, device=device)])
    assert_right(problem(), args, rope)


@pytest.mark.parametrize("cache", ["auto", "fp8_ds_mla"])
def test_tokens_beyond_the_slot_mapping_are_padded(rope: Any, cache: str, device: torch.device) -> None:
    which = problem(cache)
    args = args_of(which, 7, device)
    args[SLOTS] = args[SLOTS][:4]
    assert launched(which, args)
    assert_right(which, args, rope)


def test_buffers_may_be_longer_than_there_are_tokens(rope: Any, device: torch.device) -> None:
    which = problem()
    args = args_of(which, 7, device)
    for extra, index in enumerate((Q_NOPE, Q_PE, KV_C, K_PE), start=1):
        args[index] = longer(args[index], extra)
    args[SLOTS] = torch.cat([args[SLOTS], args[SLOTS][:2]])
    assert launched(which, args)
    q, k_pe = assert_right(which, args, rope)
    assert (q.shape[0], k_pe.shape[0]) == (7, 7)


def test_rows_that_no_slot_names_keep_every_byte(rope: Any, device: torch.device) -> None:
    args = args_of(problem("fp8_apart"), 7, device)
    before = [args[index].view(torch.uint8).clone() for index in (CACHE, K_PE_CACHE)]
    rope(*args)
    for index, bytes_before in zip((CACHE, K_PE_CACHE), before, strict=True):
        untouched = torch.ones(bytes_before.shape[:2], dtype=torch.bool, device=device)
        untouched.view(-1)[args[SLOTS]] = False
        assert torch.equal(args[index].view(torch.uint8)[untouched], bytes_before[untouched])


# Caches


def test_cache_rows_may_lie_apart(rope: Any, device: torch.device) -> None:
    which = problem()
    args = args_of(which, 9, device)
    blocks, size, width = args[CACHE].shape
    wide = torch.full((blocks, size + 3, width + 8), 7.0, dtype=torch.bfloat16, device=device)
    args[CACHE] = wide[:, :size, :width]
    assert_right(which, args, rope)
    assert bool((wide[:, size:] == 7).all())
    assert bool((wide[:, :, width:] == 7).all())


def test_two_contiguous_caches_are_written_at_batch_and_position(rope: Any, device: torch.device) -> None:
    batch, most_positions = 3, 10
    args = args_of(problem("auto_apart"), batch, device)
    args[CACHE], args[K_PE_CACHE] = (torch.zeros(batch, most_positions, w, device=device).bfloat16() for w in (40, 16))
    args[POSITIONS] = torch.tensor([7, 0, 9], device=device)
    args[SLOTS] = torch.arange(batch, device=device) * most_positions + args[POSITIONS]
    _, k_pe = rope(*args)
    for row, position in enumerate((7, 0, 9)):
        assert torch.equal(args[CACHE][row, position], args[KV_C][row])
        assert torch.equal(args[K_PE_CACHE][row, position], k_pe[row])
    assert int((args[CACHE] != 0).any(-1).sum()) == batch


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_row_of_fp8_ds_mla_is_values_and_scales_and_k_pe(rope: Any, dtype: str, device: torch.device) -> None:
    args = args_of(problem("fp8_ds_mla", dtype=dtype), 2, device)
    args[KV_C][0, :128] = 0
    args[KV_C][0, 128] = 1e4
    _, k_pe = rope(*args)
    rows = args[CACHE].view(-1, 656)[args[SLOTS]]
    values, scales = rows[:, :512].view(torch.float8_e4m3fn).float(), rows[:, 512:528].view(torch.float32)
    amax = args[KV_C].float().unflatten(-1, (4, 128)).abs().amax(-1)
    assert torch.equal(scales, (amax / torch.full_like(amax, 448)).clamp(min=torch.finfo(torch.float32).tiny))
    decoded = (values.unflatten(-1, (4, 128)) * scales[..., None]).flatten(-2)
    torch.testing.assert_close(decoded, args[KV_C].float(), rtol=1 / 16, atol=1e4 / 448 / 512)
    assert torch.equal(rows[:, 528:].view(k_pe.dtype), k_pe)


@pytest.mark.parametrize("absent", ["no cache", "no slots", "cache without rows", "slots without rows"])
def test_before_a_model_has_its_cache_queries_are_rotated_all_the_same(
    rope: Any, absent: str, device: torch.device
) -> None:
    args = args_of(problem(), 5, device)
    expected = ROPE.exact(*args)[:2]
    if "slots" in absent:
        args[SLOTS] = None if absent == "no slots" else args[SLOTS][:0]
    else:
        args[CACHE] = None if absent == "no cache" else args[CACHE][:0]
    before = None if args[CACHE] is None else args[CACHE].clone()
    for index, (result, right) in enumerate(zip(rope(*args), expected, strict=True)):
        assert ROPE.tolerance(problem(), index).error(result, right) <= 1.0
    assert before is None or torch.equal(args[CACHE], before)


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
        args[KV_SCALE] = args[KV_SCALE][0]
    for _ in range(5):
        python(args, "")
    assert len(bindings) == 1


# Queries


def test_without_q_nope_the_rotated_query_comes_alone(rope: Any, device: torch.device) -> None:
    which = problem(nope=0)
    q, k_pe = assert_right(which, args_of(which, 4, device), rope)
    assert (q.shape, k_pe.shape) == ((4, 3, 16), (4, 16))


@pytest.mark.parametrize("cache", ["none", "auto", "fp8_ds_mla"])
def test_no_tokens_give_empty_results_and_write_nothing(rope: Any, cache: str, device: torch.device) -> None:
    args = args_of(problem(cache, query="fp8"), 0, device)
    before = args[CACHE] if args[CACHE] is None else args[CACHE].clone()
    q, k_pe = rope(*args)
    assert (q.shape[0], q.dtype, k_pe.shape[0]) == (0, torch.float8_e4m3fn, 0)
    assert before is None or torch.equal(args[CACHE], before)


def test_fp8_values_are_those_of_a_division(rope: Any, device: torch.device) -> None:
    """To the bit: a product with the reciprocal would differ where quotients are near a tie."""
    args = args_of(problem("fp8", query="fp8"), 300, device)
    for index, scale in ((KV_SCALE, 0.0773), (Q_SCALE, 0.0131)):
        args[index].fill_(scale)
    q, _ = rope(*args)
    values = args[CACHE].view(-1, 56)[args[SLOTS], :40]
    for result, x, scale in ((q[:, :, :24], args[Q_NOPE], 0.0131), (values, args[KV_C], 0.0773)):
        right = (x.float() / torch.tensor(scale, device=device)).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(result.float(), right.float())


@pytest.mark.parametrize(("value", "stored"), [(1000.0, 448.0), (-1000.0, -448.0), (float("inf"), 448.0)])
def test_fp8_values_beyond_the_largest_are_the_largest(
    rope: Any, value: float, stored: float, device: torch.device
) -> None:
    args = args_of(problem("fp8", query="fp8"), 2, device)
    for index, scale in ((KV_C, KV_SCALE), (Q_NOPE, Q_SCALE)):
        args[index].fill_(value)
        args[scale].fill_(1.0)
    q, _ = rope(*args)
    rows = args[CACHE].float().view(-1, 56)[args[SLOTS]]
    assert bool((rows[:, :40] == stored).all())
    assert bool((q.float()[:, :, :24] == stored).all())


# Bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({POSITIONS: torch.zeros(4, dtype=torch.int32)}, "positions must be int64"),
        ({POSITIONS: torch.zeros(5, dtype=torch.int64)}, "q_pe has 4 rows, positions 5"),
        ({KV_C: torch.zeros(3, 40).bfloat16()}, "kv_c has 3 rows, positions 4"),
        ({Q_NOPE: torch.zeros(4, 2, 24).bfloat16()}, r"q_nope \[4, 2, 24\] is not \[T, H, N\]"),
        ({SLOTS: torch.zeros(4, dtype=torch.int32)}, "slot_mapping must be int64"),
        ({TABLE: torch.zeros(9, 8)}, "elements, which must be one number"),
        ({K_PE: torch.zeros(16, 4).bfloat16().T}, "k_pe's last dimension is not contiguous"),
        ({CACHE: torch.zeros(2, 64, 112).bfloat16()[..., ::2]}, "kv_cache's last dimension is not contiguous"),
        ({CACHE: torch.zeros(2, 64, 50).bfloat16()}, r"kv_cache \[2, 64, 50\] is not \[blocks, block_size, 56\]"),
        ({CACHE: torch.zeros(2, 64, 56).to(torch.float8_e4m3fn)}, "needs kv_scale"),
        (
            {CACHE: torch.zeros(2, 64, 56).to(torch.float8_e4m3fn), KV_SCALE: torch.ones(3)},
            r"kv_scale must be one fp32 value, not torch.float32, \[3\]",
        ),
        ({Q_SCALE: torch.ones(1).bfloat16()}, "q_scale must be one fp32 value"),
        ({IS_NEOX: True, DEINTERLEAVE: True}, "with is_neox there are no neighbours to deinterleave"),
        ({CACHE: torch.zeros(2, 64, 656, dtype=torch.uint8)}, "whose rows hold a latent of 512"),
        ({K_PE_CACHE: torch.zeros(2, 64, 16).bfloat16()}, r"is not \[blocks, block_size, 40\]"),
        (
            {CACHE: torch.zeros(2, 64, 40).bfloat16(), K_PE_CACHE: torch.zeros(2, 32, 16).bfloat16()},
            r"k_pe_cache \[2, 32, 16\] of torch.bfloat16 is not \[2, 64, 16\]",
        ),
        (
            {CACHE: torch.zeros(2, 64, 40).bfloat16(), K_PE_CACHE: torch.zeros(2, 64, 16)},
            "of torch.float32 is not .* of torch.bfloat16",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_one_clear_line(changes: dict[int, Any], said: str) -> None:
    args = args_of(problem(), 4, CPU)
    for index, value in changes.items():
        args[index] = value
    with pytest.raises(BadInput, match=said):
        dispatch._PythonDispatcher(ROPE, OpRegistry())(args, "")
    with pytest.raises(BadInput, match=said):
        ROPE.fake(*args)


# Compiled graphs


@pytest.mark.parametrize("which", [problem(), problem("fp8_ds_mla", query="fp8"), problem("auto_apart")], ids=str)
def test_pytorch_accepts_its_registration(which: Problem, device: torch.device) -> None:
    torch.library.opcheck(torch.ops.autofuse.mla_rope_kv_cache_cat.default, tuple(args_of(which, 3, device)))


@pytest.mark.parametrize("cache", ["auto", "auto_apart", "fp8_ds_mla"])
def test_compiled_graphs_write_into_the_callers_cache(cache: str, device: torch.device) -> None:
    which = problem(cache)
    args = args_of(which, 6, device)

    def step(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return torch.ops.autofuse.mla_rope_kv_cache_cat(*inputs)

    compiled = torch.compile(step, backend="aot_eager")
    assert_right(which, args, compiled)


# The GPU kernel, emulated

emulated = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "can be emulated")


@emulated
@pytest.mark.parametrize("change", [{}, {"GUESS": 0}, {"PREFETCH": 0, "GUESS": 0}], ids=str)
@pytest.mark.parametrize("which", ROPE.sweep_problems(), ids=str)
def test_kernels_that_overlap_their_predecessor_are_right_on_padded_and_strided_arguments(
    which: Problem, change: dict[str, int]
) -> None:
    """An early look at a position sees another one now and then: see the emulator."""
    config = Config.of(ROPE.default_config("cuda", which, 1), **{"PDL": 1, "PREFETCH": 2, "GUESS": 1, **change})
    for tokens in (1, 14):
        args = ROPE.check_args(which, tokens, CPU, torch.Generator().manual_seed(tokens))
        verify_emulated(ROPE, which, config, args)


@emulated
@pytest.mark.parametrize("scale", [0.0131, 2.0**-126, 2.0**89])
def test_kernels_divide_as_a_division_rounds(scale: float) -> None:
    which = problem("fp8", query="fp8")
    args = args_of(which, 40, CPU)
    args[Q_SCALE].fill_(scale)
    args[Q_NOPE] = (args[Q_NOPE].float() * scale).bfloat16()
    args[Q_NOPE][:, 0, :4] = torch.tensor([0.0, float("inf"), float("-inf"), float("nan")])
    expected = ROPE.reference(*args)[0][:, :, :24].float()
    q, _ = emulate(ROPE, which, ROPE.default_config("cuda", which, 1), args)
    assert torch.equal(q[:, :, :24].float().nan_to_num(1000), expected.nan_to_num(1000))
