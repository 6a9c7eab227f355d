"""rope_kv_cache as a user calls it: what layouts, padding, scales and norms mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulation import unavailable
from emulation import verify as verify_emulated

from autofuse.errors import BadInput, UnsupportedCall
from autofuse.models import PRESETS
from autofuse.ops import Config, Problem, get_op
from autofuse.runtime import dispatch
from autofuse.runtime.dispatch import OpRegistry, bind_plan, registry
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of

ROPE = get_op("rope_kv_cache")
Q, K, V, POSITIONS, TABLE, SLOTS, K_CACHE, V_CACHE, K_SCALE, V_SCALE, Q_SCALE, Q_WEIGHT, K_WEIGHT, EPS = range(14)
IS_NEOX, RETURN_K, DEINTERLEAVE = 14, 15, 16
STYLES: dict[str, dict[str, bool]] = {
    "GPT-J": {"neox": False},
    "NeoX": {"neox": True},
    "halves out": {"neox": False, "deinterleave": True},
}
CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn


def problem(cache: str = "auto", **changes: Any) -> Problem:
    params = {"dtype": "bf16", "heads": 6, "kv_heads": 2, "head_dim": 32, "rope_dim": 32, "neox": True, "table": "fp32"}
    return ROPE.make_problem(
        **{**params, "cache": cache, "qk_norm": False, "q_fp8": False, "return_k": True, **changes}
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
    op = torch.ops.autofuse.rope_kv_cache

    def bound(*args: Any) -> tuple[torch.Tensor, ...]:
        op(*(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args))
        return op(*args)

    return bound


def launched(which: Problem, args: list[Any]) -> bool:
    """Whether a kernel takes the call, and not the reference."""
    return ROPE.binding(which).accepts(args) and ROPE.binding(which).launchable(args, 4)


def assert_right(which: Problem, args: list[Any], call: Any) -> tuple[torch.Tensor, ...]:
    """Runs the call and compares its results, and what it wrote, with the exact ones."""
    exact = ROPE.exact(*args)
    results = call(*args)
    wrote = [args[index] for index in ROPE.mutates if args[index] is not None]
    for index, (result, right) in enumerate(zip([*results, *wrote], exact, strict=True)):
        assert result.shape == right.shape
        assert ROPE.tolerance(which, index).error(result, right) <= 1.0
    return results


@pytest.mark.parametrize("cache", ["none", "auto", "fp8", "fp8_per_head"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_results_and_caches_are_those_of_the_reference(
    rope: Any, tokens: int, style: str, cache: str, device: torch.device
) -> None:
    which = problem(cache, **STYLES[style])
    args = args_of(which, tokens, device)
    assert launched(which, args)
    results = assert_right(which, args, rope)
    for result, fake in zip(results, ROPE.fake(*args), strict=True):
        assert (result.shape, result.dtype, result.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("style", ["NeoX", "halves out"])
def test_heads_have_any_of_the_usual_sizes(rope: Any, style: str, norm: bool, width: int, device: torch.device) -> None:
    which = problem(head_dim=width, rope_dim=width, qk_norm=norm, **STYLES[style])
    assert_right(which, args_of(which, 9, device), rope)


# What rotation and norm mean, written down once more


@pytest.mark.parametrize("style", STYLES)
def test_pairs_are_multiplied_as_complex_numbers(rope: Any, style: str, device: torch.device) -> None:
    neox = style == "NeoX"
    args = args_of(problem("none", dtype="fp32", **STYLES[style]), 5, device)
    turns = torch.complex(*args[TABLE][args[POSITIONS]].chunk(2, dim=-1))[:, None]
    for result, x in zip(rope(*args), args[:2], strict=True):
        pairs = x.unflatten(-1, (2, 16)).transpose(-1, -2) if neox else x.unflatten(-1, (16, 2))
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
        right = (turned if style == "GPT-J" else turned.transpose(-1, -2)).flatten(-2)
        torch.testing.assert_close(result, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_what_lies_behind_the_rotated_part_is_copied(rope: Any, style: str, device: torch.device) -> None:
    args = args_of(problem(rope_dim=16, **STYLES[style]), 5, device)
    q, k = assert_right(problem(rope_dim=16, **STYLES[style]), args, rope)
    assert torch.equal(q[..., 16:], args[Q][..., 16:])
    assert torch.equal(k[..., 16:], args[K][..., 16:])


def test_the_style_may_be_left_out_of_a_call_and_of_a_problem(device: torch.device) -> None:
    """As calls and problems were before there was a choice."""
    which = problem("none", neox=False)
    args = args_of(which, 5, device)
    op = torch.ops.autofuse.rope_kv_cache
    for result, right in zip(op(*args[:DEINTERLEAVE], plan=""), op(*args), strict=True):
        assert torch.equal(result, right)
    assert "deinterleave" not in str(which)
    assert str(problem("none", **STYLES["halves out"])).endswith(",return_k=1,deinterleave=1)")


def test_halves_are_not_deinterleaved(device: torch.device) -> None:
    args = args_of(problem(), 5, device)
    args[DEINTERLEAVE] = True
    with pytest.raises(BadInput, match="with is_neox there are no neighbours to deinterleave"):
        dispatch._PythonDispatcher(ROPE, OpRegistry())(args, "")
    with pytest.raises(UnsupportedCall, match="halves, as NeoX pairs them, are not de-interleaved"):
        problem(neox=True, deinterleave=True)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_norm_is_that_of_hugging_face_before_the_same_op(rope: Any, dtype: str, device: torch.device) -> None:
    normed = args_of(problem("auto", qk_norm=True, dtype=dtype), 50, device)
    q, k = rope(*normed)
    plain = list(normed)
    plain[K_CACHE] = torch.zeros_like(normed[K_CACHE])
    for index, weight in ((Q, normed[Q_WEIGHT]), (K, normed[K_WEIGHT])):
        wide = normed[index].float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + normed[EPS])
        plain[index] = weight * wide.to(weight.dtype)
    plain[Q_WEIGHT] = plain[K_WEIGHT] = None
    plain_q, plain_k = rope(*plain)
    for fused, unfused in ((q, plain_q), (k, plain_k)):
        # Equal but where fp32 arithmetic lands on the other side of a tie.
        assert (fused != unfused).float().mean() < 0.01
        torch.testing.assert_close(fused, unfused, rtol=0.05, atol=0.05)


# Layouts


def layouts(device: torch.device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A cache of 6 blocks of 4 rows as each layout stores it, and as the op is given it."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16, device=device)

    nhd, hnd, static, both = zeros(6, 4, 2, 32), zeros(6, 2, 4, 32), zeros(6, 2, 4, 32), zeros(6, 2, 4, 2, 32)
    return {
        "NHD": (nhd, nhd),
        "HND": (hnd, hnd.permute(0, 2, 1, 3)),
        "transformers' static cache": (static, static.transpose(1, 2)),
        "k and v interleaved": (both, both[:, 0]),
    }


@pytest.mark.parametrize("layout", ["NHD", "HND", "transformers' static cache", "k and v interleaved"])
def test_caches_may_have_any_layout(rope: Any, layout: str, device: torch.device) -> None:
    args = args_of(problem(), 3, device)
    (memory, args[K_CACHE]), (_, args[V_CACHE]) = layouts(device)[layout], layouts(device)[layout]
    blocks, rows = torch.tensor([5, 0, 2], device=device), torch.tensor([3, 0, 1], device=device)
    args[SLOTS] = blocks * 4 + rows
    assert launched(problem(), args)
    _, k = rope(*args)
    for token, (block, row) in enumerate(zip(blocks.tolist(), rows.tolist(), strict=True)):
        for head in range(2):
            at = {"NHD": (block, row, head), "k and v interleaved": (block, 0, row, head)}
            assert torch.equal(memory[at.get(layout, (block, head, row))], k[token, head])
        assert torch.equal(args[V_CACHE][block, row], args[V][token])
    assert int((memory != 0).any(-1).sum()) == 3 * 2  # and nothing else was written


@pytest.mark.parametrize("size", [1, 7, 16, 100])
def test_blocks_may_have_any_number_of_rows(rope: Any, size: int, device: torch.device) -> None:
    args = args_of(problem(), 9, device)
    args[K_CACHE], args[V_CACHE] = (torch.zeros(12, size, 2, 32, device=device).bfloat16() for _ in range(2))
    args[SLOTS] = torch.randperm(12 * size)[:9].to(device)
    assert_right(problem(), args, rope)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_rows_that_no_slot_names_keep_every_byte(rope: Any, cache: str, device: torch.device) -> None:
    args = args_of(problem(cache), 7, device)
    before = [args[index].view(torch.uint8).clone() for index in (K_CACHE, V_CACHE)]
    rope(*args)
    untouched = torch.ones(before[0].shape[:2], dtype=torch.bool, device=device)
    untouched.view(-1)[args[SLOTS]] = False
    for index, bytes_before in zip((K_CACHE, V_CACHE), before, strict=True):
        assert torch.equal(args[index].view(torch.uint8)[untouched], bytes_before[untouched])


# Padding


@pytest.mark.parametrize("slot", [-1, -(2**40)])
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_a_token_whose_slot_is_negative_writes_none_and_is_rotated_all_the_same(
    rope: Any, cache: str, slot: int, device: torch.device
) -> None:
    args = args_of(problem(cache), 7, device)
    args[SLOTS][[0, 3, 6]] = slot
    assert launched(problem(cache), args)
    assert_right(problem(cache), args, rope)


def test_tokens_beyond_the_slot_mapping_are_padded(rope: Any, device: torch.device) -> None:
    args = args_of(problem(), 7, device)
    args[SLOTS] = args[SLOTS][:4]
    assert launched(problem(), args)
    assert_right(problem(), args, rope)


def test_buffers_may_be_longer_than_there_are_tokens(rope: Any, device: torch.device) -> None:
    args = args_of(problem(), 7, device)
    for extra, index in enumerate((Q, K, V), start=1):
        nan = args[index].new_full((extra, *args[index].shape[1:]), float("nan"))  # whoever reads it shows it
        args[index] = torch.cat([args[index], nan])
    args[SLOTS] = torch.cat([args[SLOTS], args[SLOTS][:2]])
    assert launched(problem(), args)
    q, k = assert_right(problem(), args, rope)
    assert (q.shape[0], k.shape[0]) == (7, 7)


@pytest.mark.parametrize("absent", ["no caches", "no slots", "caches without rows", "slots without rows"])
def test_before_a_model_has_its_cache_queries_and_keys_are_rotated_all_the_same(
    rope: Any, absent: str, device: torch.device
) -> None:
    args = args_of(problem(), 5, device)
    expected = ROPE.exact(*args)[:2]
    if "slots" in absent:
        args[SLOTS] = None if absent == "no slots" else args[SLOTS][:0]
    else:
        for index in (K_CACHE, V_CACHE):
            args[index] = None if absent == "no caches" else args[index][:0]
    before = [args[index] if args[index] is None else args[index].clone() for index in (K_CACHE, V_CACHE)]
    for index, (result, right) in enumerate(zip(rope(*args), expected, strict=True)):
        assert ROPE.tolerance(problem(), index).error(result, right) <= 1.0
    for index, content in zip((K_CACHE, V_CACHE), before, strict=True):
        assert content is None or torch.equal(args[index], content)


def test_no_tokens_give_empty_results_and_write_nothing(rope: Any, device: torch.device) -> None:
    args = args_of(problem(), 0, device)
    before = args[K_CACHE].clone()
    q, k = rope(*args)
    assert (q.shape, k.shape) == ((0, 6, 32), (0, 2, 32))
    assert torch.equal(args[K_CACHE], before)


def test_caches_of_unlike_shapes_are_not_written_beyond_the_smaller(device: torch.device) -> None:
    """Calls that are bound already are not checked for it."""
    target = target_of(device)
    plan = Plan(target.arch, problem(), ((1, ROPE.default_config(target.kind, problem(), 1)),))
    call = dispatch._PythonDispatcher(ROPE, OpRegistry())
    call(args_of(problem(), 3, device), str(plan))
    args = args_of(problem(), 3, device)
    memory = torch.zeros(9, 16, 2, 32, device=device).bfloat16()
    args[V_CACHE] = memory[:1]
    args[SLOTS].fill_(16)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"slot_mapping\[0\] is 16, but v_cache \[1, 16, 2, 32\] has 16 rows"):
            call(args, str(plan))
    bind_plan(ROPE, plan, device)(*args)
    assert not memory.any()


# Results


def test_keys_that_nobody_wants_are_only_cached(rope: Any, device: torch.device) -> None:
    which = problem(return_k=False)
    args = args_of(which, 6, device)
    _, k = assert_right(which, args, rope)
    assert (k.shape, k.dtype) == ((0, 2, 32), torch.bfloat16)


@pytest.mark.parametrize("cache", ["none", "auto", "fp8_per_head"])
def test_the_query_may_be_fp8_whatever_the_cache(rope: Any, cache: str, device: torch.device) -> None:
    which = problem(cache, q_fp8=True)
    q, k = assert_right(which, args_of(which, 6, device), rope)
    assert (q.dtype, k.dtype) == (E4M3, torch.bfloat16)


# fp8


def quotients(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-448, 448).to(E4M3).float()


def test_fp8_values_are_those_of_a_division(rope: Any, device: torch.device) -> None:
    """To the bit: a product with the reciprocal would differ where quotients are near a tie."""
    args = args_of(problem("fp8_per_head", q_fp8=True, rope_dim=4), 300, device)
    args[Q_SCALE] = torch.tensor([0.0131], device=device)
    args[K_SCALE], args[V_SCALE] = (torch.tensor(pair, device=device) for pair in ([0.0773, 0.3], [0.11, 0.0059]))
    assert launched(problem("fp8_per_head", q_fp8=True, rope_dim=4), args)
    q, _ = rope(*args)
    assert torch.equal(q[..., 4:].float(), quotients(args[Q][..., 4:], args[Q_SCALE]))
    for cache, x, scale in ((K_CACHE, K, K_SCALE), (V_CACHE, V, V_SCALE)):
        rows = args[cache].float().view(-1, 2, 32)[args[SLOTS]]
        assert torch.equal(rows[..., 4:], quotients(args[x][..., 4:], args[scale][:, None]))


@pytest.mark.parametrize(("value", "stored"), [(1000.0, 448.0), (-1000.0, -448.0), (float("inf"), 448.0)])
def test_fp8_values_beyond_the_largest_are_the_largest(
    rope: Any, value: float, stored: float, device: torch.device
) -> None:
    args = args_of(problem("fp8"), 2, device)
    args[V] = torch.full_like(args[V], value)
    args[V_SCALE].fill_(1.0)
    rope(*args)
    assert bool((args[V_CACHE].float().view(-1, 2, 32)[args[SLOTS]] == stored).all())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_may_have_any_shape(rope: Any, shape: tuple[int, ...], device: torch.device) -> None:
    args = args_of(problem("fp8"), 4, device)
    args[K_SCALE] = args[K_SCALE].reshape(shape)
    assert launched(problem("fp8"), args)
    assert_right(problem("fp8"), args, rope)


def test_one_scale_beside_one_for_each_head_is_computed_by_the_reference(rope: Any, device: torch.device) -> None:
    which = problem("fp8_per_head")
    args = args_of(which, 4, device)
    args[K_SCALE] = args[K_SCALE][:1]
    with pytest.raises(UnsupportedCall, match="not both one value"):
        ROPE.problem_of(*args)
    assert_right(which, args, rope)


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "can be emulated")
def test_the_gpus_quotients_are_those_of_a_division() -> None:
    """The kernel's own arithmetic, on the quotients that are hardest to round: those next to a tie."""
    which = problem("fp8", rope_dim=4, return_k=False)
    args = args_of(which, 64, CPU)
    for index, scale in ((K_SCALE, 0.0773), (V_SCALE, 1 / 3)):
        args[index].fill_(scale)
        ties = (torch.arange(64 * 64) % 120 + 8.5).reshape(64, 2, 32) / 8  # between two neighbours
        args[V if index == V_SCALE else K] = (ties * scale).bfloat16()
    verify_emulated(ROPE, which, ROPE.default_config("cuda", which, 1), args)
    for cache, x, scale in ((K_CACHE, K, K_SCALE), (V_CACHE, V, V_SCALE)):
        rows = args[cache].float().view(-1, 2, 32)[args[SLOTS]]
        assert torch.equal(rows[..., 4:], quotients(args[x][..., 4:], args[scale]))


# Calls


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
        args[K_CACHE], args[V_CACHE] = args[K_CACHE][:0], args[V_CACHE][:0]
    else:
        args[K_SCALE] = args[K_SCALE][0]
    for _ in range(5):
        python(args, "")
    assert len(bindings) == 1


@pytest.mark.parametrize(
    ("index", "value", "said"),
    [
        (Q, torch.zeros(4, 192).bfloat16(), r"q \[4, 192\] is not \[T, H, D\]"),
        (Q, torch.zeros(4, 32, 6).bfloat16().transpose(1, 2), "the last dimension of q is not contiguous"),
        (Q, torch.zeros(3, 6, 32).bfloat16(), "q has 3 rows, positions 4"),
        (K, torch.zeros(4, 2, 24).bfloat16(), r"k \[4, 2, 24\] is not \[T, 2, 32\]"),
        (V, torch.zeros(4, 3, 32).bfloat16(), r"v \[4, 3, 32\] is not \[T, 2, 32\]"),
        (POSITIONS, torch.zeros(4, dtype=torch.int32), "positions is torch.int32, it must be int64"),
        (TABLE, torch.zeros(9, 34), "cos_sin_cache have 34 elements, no even number up to 32"),
        (TABLE, torch.zeros(9, 7), "cos_sin_cache have 7 elements"),
        (SLOTS, torch.zeros(4, 1, dtype=torch.int64), r"slot_mapping \[4, 1\] is not \[T\]"),
        (SLOTS, torch.zeros(4, dtype=torch.int32), "slot_mapping is torch.int32"),
        (K_CACHE, torch.zeros(2, 16, 2, 24).bfloat16(), r"k_cache .* is not \[blocks, block_size, 2, 32\]"),
        (K_CACHE, torch.zeros(2, 16, 2, 32).to(E4M3), "k_cache .* and v_cache .* are not alike"),
        (V_CACHE, None, r"v_cache None is not \[blocks, block_size, 2, 32\]"),
        (V_CACHE, torch.zeros(3, 16, 2, 32).bfloat16(), "k_cache .* and v_cache .* are not alike"),
        (Q_SCALE, torch.ones(2), "q_scale must be one fp32 value"),
        (Q_WEIGHT, torch.ones(32).bfloat16(), "q_weight and k_weight must both be given, or neither"),
    ],
)
def test_arguments_that_do_not_fit_are_one_clear_line(index: int, value: torch.Tensor | None, said: str) -> None:
    args = args_of(problem(), 4, CPU)
    args[index] = value
    with pytest.raises(BadInput, match=f"^rope_kv_cache: .*{said}"):
        dispatch._PythonDispatcher(ROPE, OpRegistry())(args, "")


@pytest.mark.parametrize("scale", [None, torch.ones(3), torch.ones(2).double(), torch.ones(2, 1)])
def test_fp8_caches_need_scales(scale: torch.Tensor | None) -> None:
    args = args_of(problem("fp8"), 4, CPU)
    args[V_SCALE] = scale
    with pytest.raises(BadInput, match=r"needs v_scale: fp32 on q's device, one value or \[2\]"):
        dispatch._PythonDispatcher(ROPE, OpRegistry())(args, "")


@pytest.mark.parametrize("changes", [{}, {"cache": "fp8_per_head", "q_fp8": True, "qk_norm": True, "return_k": False}])
def test_pytorch_accepts_its_registration(changes: dict[str, Any], device: torch.device) -> None:
    # Its schema check compares results by arithmetic that PyTorch has not for fp8.
    checks = ("test_autograd_registration", "test_faketensor", *(() if changes else ("test_schema",)))
    args = tuple(args_of(problem(**changes), 3, device))
    torch.library.opcheck(torch.ops.autofuse.rope_kv_cache.default, args, test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_graphs_write_into_the_callers_caches(dynamic: bool, device: torch.device) -> None:
    def step(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return torch.ops.autofuse.rope_kv_cache(*inputs)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", dynamic=dynamic)
    for tokens in (6, 9):
        assert_right(problem(), args_of(problem(), tokens, device), compiled)


# Models


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PRESETS["llama-3-8b"], "heads=32,kv_heads=8,head_dim=128,rope_dim=128,neox=1,table=bf16"),
        (PRESETS["qwen3-8b"], "heads=32,kv_heads=8,head_dim=128,rope_dim=128,neox=1,table=bf16"),
        (
            {"num_attention_heads": 32, "hidden_size": 2560, "partial_rotary_factor": 0.4},
            "heads=32,kv_heads=32,head_dim=80,rope_dim=32,neox=1",
        ),
        (
            {
                "model_type": "glm4",
                "num_attention_heads": 48,
                "num_key_value_heads": 2,
                "head_dim": 128,
                "rope_parameters": {"partial_rotary_factor": 0.5},
            },
            "heads=48,kv_heads=2,head_dim=128,rope_dim=64,neox=0",
        ),
    ],
    ids=["Llama", "Qwen3", "Phi", "GLM"],
)
def test_models_make_a_problem_with_a_cache_and_one_without(config: dict[str, Any], expected: str) -> None:
    for made, cache in zip(ROPE.model_problems(config, "bf16"), ("auto", "none"), strict=True):
        assert f"dtype=bf16,{expected}" in str(made)
        assert (made["cache"], made["return_k"]) == (cache, int(cache == "none"))
        assert made["qk_norm"] == (config.get("model_type") == "qwen3")
        assert ROPE.make_problem(**dict(made.params)) == made


@pytest.mark.parametrize("config", [PRESETS["deepseek-v3"], {"q_lora_rank": 96, "kv_lora_rank": 40}, {}])
def test_models_with_latent_attention_make_none(config: dict[str, Any]) -> None:
    assert ROPE.model_problems(config, "bf16") == []


def test_heads_that_are_no_whole_number_of_vectors_have_no_kernel(rope: Any, device: torch.device) -> None:
    with pytest.raises(UnsupportedCall, match="no whole number of vectors"):
        problem(head_dim=30, rope_dim=30)
    args = args_of(problem(), 4, device)
    for index in (Q, K, V):
        args[index] = args[index][..., :30]
    for index in (K_CACHE, V_CACHE):
        args[index] = args[index][..., :30]
    args[TABLE] = args[TABLE][:, :30]
    assert_right(problem(), args, rope)


def test_a_widest_config_is_refused_where_a_head_is_no_whole_pair_of_its_vectors() -> None:
    which = problem(head_dim=80, rope_dim=24)  # 24 elements are three vectors of 16 bytes: no pairs
    space = ROPE.kernel_source("cuda").space
    default = ROPE.default_config("cuda", which, 1)
    assert default["VEC_BYTES"] == 8
    assert "must be whole" in (space.refusal(Config.of(default, VEC_BYTES=16), which, 64) or "")
