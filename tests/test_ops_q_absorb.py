"""mla_q_absorb_rope_kv_cache as a user calls it: beside the product and mla_rope_kv_cache_cat one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulation import unavailable
from emulation import verify as verify_emulated

from autofuse.errors import UnsupportedCall
from autofuse.models import PRESETS
from autofuse.ops import Config, Problem, get_op
from autofuse.runtime import dispatch
from autofuse.runtime.dispatch import OpRegistry, bind_plan, registry
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of
from autofuse.tuner.verify import verify_call

ABSORB, ROPE = get_op("mla_q_absorb_rope_kv_cache"), get_op("mla_rope_kv_cache_cat")
CPU = torch.device("cpu")
Q_NOPE, W, Q_PE, KV_C, K_PE, POSITIONS, TABLE, SLOTS, CACHE, K_PE_CACHE, KV_SCALE, Q_SCALE = range(12)
IS_NEOX, DEINTERLEAVE, FROM_END, W_CONSTANT = range(12, 16)


def problem(heads: int = 3, depth: int = 64, width: int = 128, **changes: Any) -> Problem:
    sizes = {"heads": heads, "qk_nope_dim": depth, "nope_dim": width, "rope_dim": 32, "latent_dim": 64}
    kind = {"dtype": "bf16", "neox": False, "table": "fp32", "cache": "auto"}
    return ABSORB.make_problem(**{**sizes, **kind, **changes})


def args_of(which: Problem, tokens: int, device: torch.device, check: bool = False) -> list[Any]:
    make = ABSORB.check_args if check else ABSORB.example_args
    return list(make(which, tokens, device, torch.Generator(device).manual_seed(tokens)))


def launched(which: Problem, args: list[Any]) -> bool:
    """Whether a kernel takes the call, and not the reference."""
    return ABSORB.binding(which).accepts(args) and ABSORB.binding(which).launchable(args, 16)


@pytest.fixture(params=["python", "native"])
def absorb(request: pytest.FixtureRequest) -> Any:
    """The op as each of the two dispatchers runs it."""
    if request.param == "python":
        python = dispatch._PythonDispatcher(ABSORB, OpRegistry())
        return lambda *args: python(*ABSORB.split_plan(args))
    if not registry.go_native():
        pytest.fail("the native dispatcher cannot be built here")
    op = torch.ops.autofuse.mla_q_absorb_rope_kv_cache

    def bound(*args: Any) -> tuple[torch.Tensor, ...]:
        copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        op(*copies)  # the first call of a kind binds, in Python
        return op(*args)

    return bound


def assert_right(which: Problem, args: list[Any], absorb: Any) -> tuple[torch.Tensor, ...]:
    expected = ABSORB.exact(*args)
    results = absorb(*args)
    caches = [args[index] for index in ABSORB.mutates if args[index] is not None]
    for index, (result, right) in enumerate(zip([*results, *caches], expected, strict=True)):
        assert result.shape == right.shape
        assert ABSORB.tolerance(which, index).error(result, right) <= 1.0
    return results


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("cache", ["none", "auto", "fp8", "auto_apart", "fp8_apart"])
@pytest.mark.parametrize("query", ["auto", "fp8"])
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_it_is_the_product_and_the_op_behind_it(
    absorb: Any, tokens: int, query: str, cache: str, dtype: str, device: torch.device
) -> None:
    which = problem(dtype=dtype, cache=cache, query=query)
    args = args_of(which, tokens, device)
    assert launched(which, args)
    results = assert_right(which, args, absorb)
    for result, expected in zip(results, ABSORB.reference(*args), strict=True):
        assert (result.dtype, result.stride()) == (expected.dtype, expected.stride())


def test_packed_rows_are_written(absorb: Any, device: torch.device) -> None:
    which = problem(cache="fp8_ds_mla", rope_dim=64, latent_dim=512)
    assert_right(which, args_of(which, 9, device), absorb)


def test_w_uk_may_be_a_slice_of_kv_b_proj(absorb: Any, device: torch.device) -> None:
    """Of its weight [H · (qk_nope_head_dim + v_head_dim), kv_lora_rank]."""
    which = problem()
    args = args_of(which, 7, device)
    cache = args[CACHE].clone()
    expected = absorb(*args)
    projection = torch.randn(3, 64 + 32, 128, device=device).to(torch.bfloat16)
    projection[:, :64] = args[W]
    args[W], args[CACHE] = projection[:, :64], cache
    assert launched(which, args)
    for result, right in zip(absorb(*args), expected, strict=True):
        assert torch.equal(result, right)


def test_buffers_may_be_longer_than_there_are_tokens(absorb: Any, device: torch.device) -> None:
    which = problem()
    args = args_of(which, 6, device)
    args[POSITIONS] = args[POSITIONS][:4]
    assert launched(which, args)
    query, k_pe = assert_right(which, args, absorb)
    assert (len(query), len(k_pe)) == (4, 4)


def test_a_constant_w_uk_changes_no_result(absorb: Any, device: torch.device) -> None:
    args = args_of(problem(), 9, device)
    expected = absorb(*args)
    assert args.pop(W_CONSTANT) is False
    for given in (args, [*args, True]):  # it may be left out
        for result, right in zip(absorb(*given), expected, strict=True):
            assert torch.equal(result, right)


def test_no_tokens_give_empty_results_and_write_nothing(absorb: Any, device: torch.device) -> None:
    args = args_of(problem(), 0, device)
    before = args[CACHE].clone()
    query, k_pe = absorb(*args)
    assert (query.shape, k_pe.shape) == ((0, 3, 160), (0, 32))
    assert torch.equal(args[CACHE], before)


@pytest.mark.parametrize(
    "sizes", [{"depth": 40}, {"depth": 256}, {"width": 96}, {"rope": 24}], ids=["depth", "deep", "width", "rope"]
)
def test_what_no_kernel_computes_the_reference_does(absorb: Any, sizes: dict[str, int], device: torch.device) -> None:
    depth, width, rope = (sizes.get(name, usual) for name, usual in (("depth", 64), ("width", 128), ("rope", 32)))
    inner = ROPE.make_problem(
        dtype="bf16", heads=3, nope_dim=0, rope_dim=rope, latent_dim=64, neox=0, table="fp32", cache="auto"
    )
    _, *rest = ROPE.example_args(inner, 5, device, torch.Generator(device).manual_seed(0))
    q_nope = torch.randn(5, 3, depth, device=device).to(torch.bfloat16)
    args = [q_nope, torch.randn(3, depth, width, device=device).to(torch.bfloat16), *rest, False]
    again = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    for result, expected in zip(absorb(*args), ABSORB.reference(*again), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({Q_NOPE: torch.zeros(5, 2, 64).bfloat16()}, r"q_nope \[5, 2, 64\] and w_uk \[3, 64, 128\] are not"),
        ({W: torch.zeros(3, 64)}, r"w_uk \[3, 64\] are not"),
        ({W: torch.zeros(3, 128, 64).mT}, "w_uk's last dimension is not contiguous"),
        ({Q_NOPE: torch.zeros(5, 64, 3).mT}, "q_nope's last dimension is not contiguous"),
        ({POSITIONS: torch.zeros(5)}, "mla_q_absorb_rope_kv_cache: positions must be int64"),
        ({Q_NOPE: torch.zeros(4, 3, 64).bfloat16()}, "q_nope has 4 rows, positions 5"),
        ({W: torch.zeros(3, 64, 128)}, "q_nope is torch.bfloat16, w_uk torch.float32"),
        ({Q_NOPE: torch.zeros(5, 3, 64), W: torch.zeros(3, 64, 128)}, "k_pe are not all of one dtype"),
        ({CACHE: torch.zeros(2, 64, 90)}, r"kv_cache \[2, 64, 90\] is not"),
        ({IS_NEOX: True, DEINTERLEAVE: True}, "no neighbours to deinterleave"),
    ],
)
def test_arguments_that_do_not_fit_are_one_clear_line(changes: dict[int, Any], said: str) -> None:
    args = args_of(problem(), 5, CPU)
    for index, value in changes.items():
        args[index] = value
    for call in (torch.ops.autofuse.mla_q_absorb_rope_kv_cache, ABSORB.fake, ABSORB.problem_of):
        with pytest.raises(ValueError, match=said) as raised:
            call(*args)
        assert "\n" not in str(raised.value)


def test_rows_that_do_not_exist_are_named() -> None:
    args = args_of(problem(), 5, CPU)
    args[SLOTS][2] = 1 << 40
    with pytest.raises(ValueError, match=r"slot_mapping\[2\] is 1099511627776, but kv_cache"):
        torch.ops.autofuse.mla_q_absorb_rope_kv_cache(*args)


def test_pytorch_accepts_the_registration(device: torch.device) -> None:
    args = tuple(args_of(problem(), 3, device))
    torch.library.opcheck(torch.ops.autofuse.mla_q_absorb_rope_kv_cache.default, args)


def test_models_with_multi_head_latent_attention_have_it() -> None:
    (which,) = ABSORB.model_problems(PRESETS["deepseek-v3"], "bf16")
    sizes = [which.int(name) for name in ("heads", "qk_nope_dim", "nope_dim", "rope_dim", "w_constant")]
    assert sizes == [128, 128, 512, 64, 1]
    assert ABSORB.model_problems({"num_attention_heads": 32, "hidden_size": 4096}, "bf16") == []
    assert ABSORB.model_problems(PRESETS["deepseek-v3"], "fp32") == []


def configs() -> list[Config]:
    rope = Config.of(CHUNK=64, GUESS=1, PDL=1, PREFETCH=1, READ_ONCE=0, UNROLL=2, VEC_BYTES=16)
    staged = Config.of(rope, STAGED=1, THREADS=128, TOKENS=64, W_COLUMNS=128, EARLY=1)
    direct = Config.of(rope, STAGED=0, THREADS=64, TOKENS=64, W_COLUMNS=128, EARLY=1)
    changes: list[tuple[Config, dict[str, int]]] = [
        (staged, {}),
        (staged, {"W_COLUMNS": 64, "PDL": 2, "EARLY": 0}),
        (staged, {"W_COLUMNS": 32, "PDL": 0, "EARLY": 0, "PREFETCH": 0, "GUESS": 0}),
        (staged, {"TOKENS": 256, "W_COLUMNS": 256}),
        (staged, {"THREADS": 256, "TOKENS": 128, "UNROLL": 1}),
        (staged, {"THREADS": 256, "TOKENS": 256, "W_COLUMNS": 256}),
        (staged, {"THREADS": 512, "TOKENS": 256, "W_COLUMNS": 64}),
        (staged, {"THREADS": 512, "TOKENS": 512}),
        (direct, {}),
        (direct, {"THREADS": 32, "TOKENS": 16, "EARLY": 0}),
        (direct, {"THREADS": 256, "TOKENS": 128, "PDL": 2}),
    ]
    return [Config.of(base, **each) for base, each in changes]


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "can be emulated")
@pytest.mark.parametrize("config", configs()[:6], ids=str)
def test_the_staged_kernel_takes_any_number_of_tokens(config: Config) -> None:
    """Of the last block's rounds, some are short, and some have none."""
    which = problem(heads=1, nope_dim=256, w_constant=True)
    for tokens in (1, 70, 2 * config["TOKENS"] - 60):
        verify_emulated(ABSORB, which, config, args_of(which, tokens, CPU, check=True))


@pytest.mark.gpu
@pytest.mark.parametrize("query", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("config", configs(), ids=str)
def test_tensor_cores_compute_the_op_at_full_size(config: Config, dtype: str, query: str) -> None:
    """What emulation cannot show: fragments, descriptors and swizzles as the hardware has them."""
    device = torch.device("cuda", 0)
    sizes = {"heads": 5, "depth": 128, "width": 512, "rope_dim": 64, "latent_dim": 512}
    which = problem(**sizes, dtype=dtype, query=query, w_constant=True)
    assert ABSORB.kernel_source("cuda").space.refusal(config, which, 1 << 16) is None
    kernel = bind_plan(ABSORB, Plan(target_of(device).arch, which, ((1, config),)), device)
    for tokens in (1, 3, 63, 64, 200, 1111):
        verify_call(ABSORB, which, tuple(args_of(which, tokens, device, check=True)), kernel)


def test_what_has_no_kernel_is_named_with_its_reason() -> None:
    with pytest.raises(UnsupportedCall, match=r"mla_q_absorb_rope_kv_cache: .*cos_sin_cache is fp16, neither bf16 nor"):
        problem(table="fp16")
    with pytest.raises(UnsupportedCall, match="mla_q_absorb_rope_kv_cache: qk_nope_head_dim 192 is none of"):
        problem(depth=192)
