"""mla_v_up_quant as a user calls it: formats, strides, roundings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulation import unavailable
from emulation import verify as verify_emulated

from autofuse.models import PRESETS
from autofuse.ops import Config, Problem, get_op
from autofuse.ops.quant import NVFP4, STATIC, ScaleLayout
from autofuse.runtime import dispatch
from autofuse.runtime.dispatch import OpRegistry, bind_plan, registry
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of
from autofuse.tuner.verify import verify_call

V_UP = get_op("mla_v_up_quant")
CPU = torch.device("cpu")
X, W, SCALE, GROUP, UE8M0, LAYOUT, W_CONSTANT = range(7)
FORMATS = [
    {"group": 128},
    {"group": 128, "ue8m0": True, "layout": ScaleLayout.COLUMN_MAJOR},
    {"group": 64, "layout": ScaleLayout.TMA_ALIGNED},
    {"group": STATIC},
    {"group": NVFP4},
]


def problem(heads: int = 3, latent: int = 128, width: int = 128, **changes: Any) -> Problem:
    return V_UP.make_problem(
        **{"dtype": "bf16", "heads": heads, "kv_lora_rank": latent, "v_head_dim": width, "group": 128, **changes}
    )


def args_of(which: Problem, tokens: int, device: torch.device, check: bool = False) -> list[Any]:
    make = V_UP.check_args if check else V_UP.example_args
    return list(make(which, tokens, device, torch.Generator(device).manual_seed(tokens)))


def launched(which: Problem, args: list[Any]) -> bool:
    """Whether a kernel takes the call, and not the reference."""
    return V_UP.binding(which).accepts(args) and V_UP.binding(which).launchable(args, 16)


@pytest.fixture(params=["python", "native"])
def v_up(request: pytest.FixtureRequest) -> Any:
    """The op as each of the two dispatchers runs it."""
    if request.param == "python":
        python = dispatch._PythonDispatcher(V_UP, OpRegistry())
        return lambda *args: python(*V_UP.split_plan(args))
    if not registry.go_native():
        pytest.fail("the native dispatcher cannot be built here")
    op = torch.ops.autofuse.mla_v_up_quant

    def bound(*args: Any) -> tuple[torch.Tensor, ...]:
        op(*args)  # the first call of a kind binds, in Python
        return op(*args)

    return bound


def assert_right(which: Problem, args: list[Any], results: tuple[torch.Tensor, ...]) -> None:
    for index, (result, right) in enumerate(zip(results, V_UP.exact(*args), strict=True)):
        assert result.shape == right.shape
        assert V_UP.tolerance(which, index).error(result, right) <= 1.0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_every_format_is_that_of_the_reference(
    v_up: Any, tokens: int, form: dict[str, Any], dtype: str, device: torch.device
) -> None:
    which = problem(dtype=dtype, **form)
    args = args_of(which, tokens, device, check=True)
    assert launched(which, args)
    results = v_up(*args)
    assert_right(which, args, results)
    for result, expected in zip(results, V_UP.reference(*args), strict=True):
        assert (result.dtype, result.stride()) == (expected.dtype, expected.stride())


def test_attention_may_leave_heads_first(v_up: Any, device: torch.device) -> None:
    which = problem()
    args = args_of(which, 33, device)
    expected = v_up(*args)
    args[X] = args[X].transpose(0, 1).contiguous().transpose(0, 1)
    assert args[X].stride() != expected[0].stride()
    assert launched(which, args)
    for result, right in zip(v_up(*args), expected, strict=True):
        assert torch.equal(result.view(torch.uint8), right.view(torch.uint8))


def test_w_uv_may_be_a_slice_of_kv_b_proj(v_up: Any, device: torch.device) -> None:
    """Of its weight [kv_lora_rank, N · (qk_nope_head_dim + v_head_dim)]: rows of a head lie far apart."""
    which = problem()
    args = args_of(which, 7, device)
    projection = torch.randn(128, 3, 64 + 128, device=device).to(torch.bfloat16)
    projection[:, :, 64:] = args[W].transpose(0, 1)
    expected = v_up(*args)
    args[W] = projection[:, :, 64:].transpose(0, 1)
    assert launched(which, args)
    for result, right in zip(v_up(*args), expected, strict=True):
        assert torch.equal(result.view(torch.uint8), right.view(torch.uint8))


def test_the_product_is_rounded_before_it_is_quantised(v_up: Any, device: torch.device) -> None:
    which = problem(heads=1)
    args = args_of(which, 1, device)
    args[X], args[W] = torch.zeros_like(args[X]), torch.zeros_like(args[W])
    args[X][..., :2] = 1
    args[W][:, 0], args[W][:, 1] = 1, 2.0**-9  # half a unit in the last place of 1 in bf16: a tie
    assert v_up(*args)[1].item() == torch.tensor(1 / 448).item()


def test_a_constant_w_uv_changes_no_result(v_up: Any, device: torch.device) -> None:
    args = args_of(problem(), 9, device)
    expected = v_up(*args)
    assert args.pop(W_CONSTANT) is False
    for given in (args, [*args, True]):  # it may be left out
        for result, right in zip(v_up(*given), expected, strict=True):
            assert torch.equal(result.view(torch.uint8), right.view(torch.uint8))


def test_no_tokens_give_empty_results(v_up: Any, device: torch.device) -> None:
    values, scales = v_up(*args_of(problem(), 0, device))
    assert (values.shape, scales.shape) == ((0, 384), (0, 3))


@pytest.mark.parametrize(
    "shape",
    [{"width": 64, "heads": 2}, {"width": 96, "heads": 4, "group": 64}, {"latent": 40}],
    ids=["groups span heads", "odd columns", "odd rows"],
)
def test_what_no_kernel_computes_the_reference_does(v_up: Any, shape: dict[str, Any], device: torch.device) -> None:
    sizes = {"heads": 3, "latent": 128, "width": 128, "group": 128, **shape}
    x = torch.randn(5, sizes["heads"], sizes["latent"], device=device).to(torch.bfloat16)
    w = torch.randn(sizes["heads"], sizes["latent"], sizes["width"], device=device).to(torch.bfloat16)
    args = (x, w, None, sizes["group"], False, 0, False)
    for result, expected in zip(v_up(*args), V_UP.reference(*args), strict=True):
        assert torch.equal(result.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({X: torch.zeros(5, 3, 64)}, r"o_latent \[5, 3, 64\] and w_uv \[3, 128, 128\] are not"),
        ({X: torch.zeros(5, 384)}, r"o_latent \[5, 384\] and w_uv"),
        ({W: torch.zeros(2, 128, 128)}, r"w_uv \[2, 128, 128\] are not"),
        ({X: torch.zeros(5, 3, 128, dtype=torch.int32)}, "o_latent is torch.int32, which is no floating dtype"),
        ({X: torch.zeros(5, 128, 3).mT}, "the last dimension of o_latent, of stride 3, must be contiguous"),
        ({W: torch.zeros(3, 128, 128).mT}, "the last dimension of w_uv, of stride 128, must be contiguous"),
        ({GROUP: 32}, "group is 32, none of 0, 16, 64, 128"),
        ({LAYOUT: 7}, "layout is 7"),
        ({GROUP: NVFP4}, "with group 16, scale must be one fp32 value, not None"),
        ({SCALE: torch.ones(1)}, "scale must be None"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes: dict[int, Any], message: str, device: torch.device) -> None:
    args = args_of(problem(), 5, device)
    for index, value in changes.items():
        args[index] = value.to(device) if isinstance(value, torch.Tensor) else value
    for call in (torch.ops.autofuse.mla_v_up_quant, V_UP.fake, V_UP.problem_of):
        with pytest.raises(ValueError, match=message):
            call(*args)


def test_pytorch_accepts_the_registration(device: torch.device) -> None:
    torch.library.opcheck(torch.ops.autofuse.mla_v_up_quant.default, tuple(args_of(problem(), 3, device)))


def test_models_with_multi_head_latent_attention_have_it() -> None:
    (which,) = V_UP.model_problems(PRESETS["deepseek-v3"], "bf16")
    assert which == problem(heads=128, latent=512, w_constant=True)
    assert V_UP.model_problems({"num_attention_heads": 32, "hidden_size": 4096}, "bf16") == []
    assert V_UP.model_problems(PRESETS["deepseek-v3"], "fp32") == []


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "can be emulated")
@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({}, {"CLUSTER": 4, "TOKENS": 64}),
        ({"group": 64}, {"CLUSTER": 4, "TOKENS": 64}),
        ({"width": 256, "ue8m0": True}, {"CLUSTER": 4, "TOKENS": 64}),
        ({}, {"TOKENS": 192, "STAGES": 3}),
        ({"group": NVFP4}, {"CLUSTER": 2, "TOKENS": 128, "WARPS": 2}),
        ({"w_constant": True}, {"EARLY": 1, "TOKENS": 192, "STAGES": 3}),
        ({"w_constant": True, "latent": 192}, {"EARLY": 1, "CLUSTER": 2}),
        ({"w_constant": True}, {"EARLY": 1, "STAGED": 0, "STAGES": 1, "TOKENS": 16}),
    ],
    ids=[
        "four blocks a group",
        "two blocks a group",
        "two groups of two blocks",
        "three rounds",
        "a group a block",
        "all of W_UV early",
        "some of it early",
        "early into registers",
    ],
)
def test_blocks_share_columns_go_round_and_begin_early(shape: dict[str, Any], changes: dict[str, int]) -> None:
    which = problem(**{"heads": 2, "latent": 64, **shape})
    staged = {"TOKENS": 64, "WARPS": 1, "TILES": 1, "STAGES": 2, "CLUSTER": 1, "PDL": 1, "PREFETCH": 2, "EARLY": 0}
    staged["STAGED"] = 1
    config = Config.of(staged, **changes)
    for tokens in (1, 150):
        verify_emulated(V_UP, which, config, args_of(which, tokens, CPU, check=True))


def staged_configs() -> list[Config]:
    base = Config.of(STAGED=1, TOKENS=64, WARPS=1, TILES=1, STAGES=4, CLUSTER=1, PDL=1, PREFETCH=1, EARLY=1)
    changes: list[dict[str, int]] = [
        {},
        {"STAGES": 8},
        {"CLUSTER": 2, "STAGES": 8},
        {"CLUSTER": 4, "TILES": 2, "EARLY": 0},
        {"TOKENS": 128, "WARPS": 2, "CLUSTER": 2},
        {"TOKENS": 256, "WARPS": 2, "TILES": 2, "STAGES": 3},
        {"TOKENS": 1024, "WARPS": 4, "STAGES": 3, "PDL": 3},
        {"TOKENS": 1024, "WARPS": 4, "STAGES": 3, "PDL": 0, "PREFETCH": 0, "EARLY": 0},
        {"TOKENS": 512, "WARPS": 1, "STAGES": 8, "PREFETCH": 2},
        {"STAGED": 0, "TOKENS": 16, "WARPS": 8, "STAGES": 2},
        {"STAGED": 0, "WARPS": 2, "TILES": 2, "STAGES": 2},
    ]
    return [Config.of(base, **each) for each in changes]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("config", staged_configs(), ids=str)
def test_tensor_cores_compute_the_op_at_full_size(config: Config, form: dict[str, Any], dtype: str) -> None:
    """What emulation cannot show: fragments, descriptors and swizzles as the hardware has them."""
    device = torch.device("cuda", 0)
    which = problem(heads=5, latent=512, dtype=dtype, w_constant=bool(config["EARLY"]), **form)
    if reason := V_UP.kernel_source("cuda").space.refusal(config, which, 1 << 16):
        pytest.skip(reason)
    kernel = bind_plan(V_UP, Plan(target_of(device).arch, which, ((1, config),)), device)
    for tokens in (1, 3, 63, 64, 200, 1111):
        verify_call(V_UP, which, tuple(args_of(which, tokens, device, check=True)), kernel)
