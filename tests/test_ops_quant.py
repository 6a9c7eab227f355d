"""fp8_group_quant and mla_dual_rms_norm_quant as a user calls them, and their bits by definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulation import emulate, unavailable

from autofuse.ops import FusedOp, Problem, get_op
from autofuse.ops.quant import NVFP4, STATIC, QuantFormat, ScaleLayout, e2m1_codes
from autofuse.runtime import dispatch
from autofuse.runtime.dispatch import OpRegistry, registry

QUANT, NORMS = get_op("fp8_group_quant"), get_op("mla_dual_rms_norm_quant")
CPU = torch.device("cpu")
INF, NAN = math.inf, math.nan

Call = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Kernel:
    """What computes fp8_group_quant: the reference, the kernel of a device, or the GPU's kernel emulated on a CPU."""

    kind: str
    device: torch.device

    def __call__(
        self,
        x: torch.Tensor,
        group: int,
        *,
        scale: float | None = None,
        ue8m0: bool = False,
        layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The values and scales on the CPU, of x as it is."""
        x = x.to(self.device) if x.is_contiguous() else x
        given = None if scale is None else torch.tensor(scale, device=self.device)
        args = (x, given, None, 0.0, False, group, ue8m0, layout)
        if self.kind == "emulated":
            problem = QUANT.problem_of(*args)
            results = emulate(QUANT, problem, QUANT.default_config("cuda", problem, 1), args)
        elif self.kind == "reference":
            results = QUANT.reference(*args)
        else:
            results = torch.ops.autofuse.fp8_group_quant(*args)
        values, scales = results
        assert values.device.type == scales.device.type == self.device.type
        return values.cpu(), torch.empty_strided(scales.shape, scales.stride(), dtype=scales.dtype).copy_(scales)


@pytest.fixture(
    params=[
        ("reference", "cpu"),
        ("kernel", "cpu"),
        pytest.param(
            ("emulated", "cpu"),
            marks=pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "can be emulated"),
        ),
        pytest.param(("kernel", "cuda"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def quantise(request: pytest.FixtureRequest) -> Kernel:
    kind, device = request.param
    return Kernel(kind, torch.device(device))


def e4m3(values: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 of each value, ties to an even code, saturated: by looking for it among all of them."""
    table = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    size = values.double().abs().clamp(max=448.0)
    above = torch.searchsorted(table, size).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = table[above] - size, size - table[below]
    code = torch.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
    return (code | (values.signbit().long() << 7)).to(torch.uint8)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


def assert_same_bits(values: torch.Tensor, codes: torch.Tensor) -> None:
    wrong = (bits(values) != codes).nonzero().tolist()
    assert not wrong, f"{len(wrong)} of {codes.numel()} differ, the first at {wrong[0]}"


def rows_of(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One row of 128 elements: these, then zeros."""
    return torch.tensor([values + [0.0] * (128 - len(values))], dtype=dtype)


# Group FP8


@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32", "ue8m0"])
def test_every_quotient_of_bf16_values_is_rounded_as_a_division_rounds_it(quantise: Kernel, ue8m0: bool) -> None:
    # Each mantissa as a group's largest, over each x down to a quotient of 2^-11, half of what is rounded to zero.
    largest = (torch.arange(128, dtype=torch.int16) + (127 << 7)).view(torch.bfloat16)
    below = torch.arange(128 * 20, dtype=torch.int16) + (107 << 7)
    fill = below.view(torch.bfloat16).view(1, 20, 128).repeat(128, 1, 1)
    fill = torch.where(fill.abs() <= largest.view(-1, 1, 1), fill, 0)
    x = torch.cat([largest.view(128, 1, 1).expand(128, 20, 1), fill[:, :, 1:]], dim=2)
    x[:, :, 3::5] *= -1
    values, scales = quantise(x.reshape(128, -1).contiguous(), 128, ue8m0=ue8m0)
    exact = largest.double() / 448
    expected = torch.where(torch.tensor(ue8m0), torch.exp2(torch.ceil(torch.log2(exact))), exact.float().double())
    assert torch.equal(scales.double(), expected.view(-1, 1).expand(128, 20))
    assert_same_bits(values, e4m3((x.double() / expected.view(-1, 1, 1)).float()).view(128, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_quotients_next_to_a_tie_fall_on_its_right_side(quantise: Kernel, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    groups = 512
    largest = (1 + torch.rand(groups, 1, generator=source)).to(dtype)
    scales = largest.float() / 448
    # Ties lie between neighbouring e4m3 values.
    table = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (table[1:] + table[:-1]) / 2
    picked = ties[torch.randint(0, len(ties), (groups, 127), generator=source)]
    near = (scales * picked).to(dtype)
    steps = torch.randint(-2, 3, near.shape, generator=source)
    integers = {2: torch.int16, 4: torch.int32}[near.element_size()]
    near = (near.view(integers) + steps.to(integers)).view(dtype)
    x = torch.cat([largest, torch.minimum(near, largest)], dim=1)
    values, found = quantise(x.view(8, -1), 128)
    assert torch.equal(found.view(-1, 1), scales)
    assert_same_bits(values, e4m3(x.float() / scales).view(8, -1))


def test_powers_of_two_are_the_next_above_unless_the_scale_is_one(quantise: Kernel) -> None:
    boundaries = torch.tensor([448.0 * 2.0**power for power in (-30, -9, -1, 0, 3, 60)])
    below, above = torch.nextafter(boundaries, torch.tensor(0.0)), torch.nextafter(boundaries, torch.tensor(INF))
    for largest, factor in ((boundaries, 1.0), (below, 1.0), (above, 2.0)):
        x = torch.zeros(len(boundaries), 128)
        x[:, 77] = -largest
        values, scales = quantise(x, 128, ue8m0=True)
        assert scales.flatten().tolist() == [factor * value / 448.0 for value in boundaries.tolist()]
        assert values[:, 77].float().tolist() == [-448.0 / factor] * len(boundaries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32", "ue8m0"])
def test_zeros_have_the_smallest_scale_and_keep_their_sign(quantise: Kernel, dtype: torch.dtype, ue8m0: bool) -> None:
    values, scales = quantise(rows_of([0.0, -0.0], dtype), 128, ue8m0=ue8m0)
    smallest = torch.tensor(1e-10) / 448
    assert scales.item() == (2.0**-42 if ue8m0 else smallest.item())
    assert bits(values)[0, :3].tolist() == [0, 0x80, 0]


@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32", "ue8m0"])
def test_the_smallest_and_the_largest_numbers_have_finite_scales(quantise: Kernel, ue8m0: bool) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.cat([rows_of([2.0**-149, -(2.0**-126)]), rows_of([largest, -largest / 2, 1.0]), rows_of([1e-10, 1e-12])])
    values, scales = quantise(x, 128, ue8m0=ue8m0)
    expected = torch.tensor([1e-10, largest, 1e-10]) / 448
    if ue8m0:
        expected = torch.tensor([2.0**-42, 2.0**120, 2.0**-42])
    assert torch.equal(scales.flatten(), expected)
    assert_same_bits(values, e4m3(x / expected.view(3, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32", "ue8m0"])
def test_infinities_and_nan_stay_within_their_group(quantise: Kernel, dtype: torch.dtype, ue8m0: bool) -> None:
    x = torch.cat([rows_of([1.0, INF, -2.0], dtype), rows_of([1.0, NAN, INF], dtype), rows_of([1.0], dtype)])
    values, scales = (each.float() for each in quantise(x, 64, ue8m0=ue8m0))
    assert torch.equal(scales[:, 0].isinf(), torch.tensor([True, False, False]))
    assert torch.equal(scales[:, 0].isnan(), torch.tensor([False, True, False]))
    assert bool(scales[:, 1].isfinite().all())
    assert values[0, :4].tolist()[::2] == [0.0, -0.0]
    assert bool(values[0, 1].isnan())
    assert bool(values[1, :64].isnan().all())
    assert not values[:, 64:].any()
    assert not values[2].isnan().any()


@pytest.mark.parametrize("layout", ScaleLayout, ids=lambda layout: layout.name)
@pytest.mark.parametrize("tokens", [1, 3, 4, 130])
def test_scales_lie_as_the_layout_says(quantise: Kernel, layout: ScaleLayout, tokens: int) -> None:
    x = torch.randn(tokens, 320, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scales = quantise(x, 64, layout=layout)
    column = {ScaleLayout.COLUMN_MAJOR: tokens, ScaleLayout.TMA_ALIGNED: -(-tokens // 4) * 4}.get(layout)
    assert scales.stride() == ((5, 1) if column is None else (1, column))
    groups = x.float().view(tokens, 5, 64)
    expected = groups.abs().amax(-1) / 448
    assert torch.equal(scales, expected)
    assert_same_bits(values, e4m3(groups / expected[..., None]).view(tokens, 320))


# Static FP8


def test_a_given_scale_saturates_and_keeps_nan(quantise: Kernel) -> None:
    given = torch.tensor(0.3)
    x = rows_of([1.0, -0.0, 134.0, 135.0, 1e30, -1e30, INF, -INF, 0.3 * 2**-10, 0.31 * 2**-10])
    values, scales = quantise(x, STATIC, scale=0.3)
    assert scales.shape == (0,)
    assert_same_bits(values, e4m3(x * (1 / given)))
    assert bool(quantise(rows_of([NAN]), STATIC, scale=0.3)[0].float()[0, 0].isnan())


# NVFP4

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpacked(values: torch.Tensor) -> torch.Tensor:
    codes = torch.stack([values & 15, values >> 4], dim=-1).flatten(-2).long()
    return torch.tensor([*E2M1, *(-each for each in E2M1)])[codes]


@pytest.mark.parametrize("tokens", [1, 31, 128, 130])
@pytest.mark.parametrize("width", [64, 80])
def test_fp4_scales_lie_in_tiles_and_are_zero_where_padded(quantise: Kernel, tokens: int, width: int) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scales = quantise(x, NVFP4, scale=500.0)
    assert (values.shape, values.dtype) == ((tokens, width // 2), torch.uint8)
    columns = -(-width // 64) * 4
    assert (scales.shape, scales.dtype) == ((-(-tokens // 128) * 128, columns), torch.float8_e4m3fn)
    left = scales.float().flatten().tolist()
    for token in range(scales.shape[0]):
        for group in range(columns):
            # cuBLAS, "1D block scaling factors layout"
            tile = token // 128 * (columns // 4) + group // 4
            index = tile * 512 + token % 32 * 16 + token % 128 // 32 * 4 + group % 4
            expected = 0.0
            if token < tokens and group < width // 16:
                amax = x[token, group * 16 : group * 16 + 16].float().abs().max()
                sixth = torch.tensor(1 / 6, dtype=torch.float32)
                code = e4m3((torch.tensor(500.0) * (amax * sixth)).view(1))
                expected = code.view(torch.float8_e4m3fn).float().item()
            assert left[index] == expected, (token, group)


def test_fp4_values_are_the_nearest_of_their_eight(quantise: Kernel) -> None:
    # amax 6 and a global scale of 1: the scale is 1, and values are what they are.
    row = [
        6.0,
        0.25,
        0.75,
        1.25,
        1.75,
        2.5,
        3.5,
        5.0,
        -0.0,
        -0.2,
        0.2500001,
        0.7499999,
        1.7499999,
        2.5000002,
        5.0000005,
    ]
    values, _ = quantise(rows_of(row), NVFP4, scale=1.0)
    expected = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -0.0, 0.5, 0.5, 1.5, 3.0, 6.0]
    found = unpacked(values)[0, : len(row)]
    assert found.tolist() == expected
    assert torch.equal(found.signbit(), torch.tensor(expected).signbit())


def test_fp4_saturates_and_makes_nan_the_largest(quantise: Kernel) -> None:
    x = rows_of([1.0, NAN] + [0.0] * 14 + [1.0, INF, -INF] + [0.0] * 13 + [2e5, -1e5])
    values, scales = quantise(x, NVFP4, scale=1.0)
    assert unpacked(values)[0, :2].tolist() == [6.0, 6.0]
    assert unpacked(values)[0, 16:19].tolist() == [0.0, 6.0, -6.0]
    assert unpacked(values)[0, 32:34].tolist() == [6.0, -6.0]
    assert bool(scales[0, 0].float().isnan())
    assert scales[0, 1:3].float().tolist() == [448.0, 448.0]


def test_fp4_groups_whose_scale_is_zero_are_zero(quantise: Kernel) -> None:
    values, scales = quantise(rows_of([1e-4, -1e-4]), NVFP4, scale=1.0)
    assert scales[0, 0].float().item() == 0.0
    assert unpacked(values)[0, :3].tolist() == [0.0, -0.0, 0.0]


def test_e2m1_codes_are_of_the_nearest_value_with_ties_to_even() -> None:
    size = torch.linspace(0, 7, 7001)
    distance = (torch.tensor(E2M1) - size[:, None]).abs()
    best = distance.amin(-1, keepdim=True)
    right = (distance == best).float() * torch.tensor([2.0, 1.0] * 4)  # of two that are as near, the even one
    assert torch.equal(e2m1_codes(size).long(), right.argmax(-1))


# Calls


@pytest.fixture(params=["python", "native"])
def call(request: pytest.FixtureRequest) -> Callable[[FusedOp], Call]:
    """Ops as each of the two dispatchers runs them."""

    def of(op: FusedOp) -> Call:
        if request.param == "python":
            python = dispatch._PythonDispatcher(op, OpRegistry())
            return lambda *args: python(*op.split_plan(args))
        if not registry.go_native():
            pytest.fail("the native dispatcher cannot be built here")
        overload = getattr(torch.ops.autofuse, op.name)

        def bound(*args: Any) -> tuple[torch.Tensor, ...]:
            overload(*args)  # the first call of a kind binds, in Python
            return overload(*args)

        return bound

    return of


def problems() -> list[Problem]:
    return [*QUANT.sweep_problems(), *NORMS.sweep_problems()]


def args_of(problem: Problem, tokens: int, device: torch.device) -> list[Any]:
    op = get_op(problem.op)
    return list(op.example_args(problem, tokens, device, torch.Generator(device).manual_seed(0)))


@pytest.mark.parametrize("problem", problems(), ids=str)
def test_results_have_the_strides_that_tracing_expects(
    call: Callable[[FusedOp], Call], problem: Problem, device: torch.device
) -> None:
    op = get_op(problem.op)
    for tokens in (0, 1, 6, 131):
        args = args_of(problem, tokens, device)
        for result, reference, fake in zip(call(op)(*args), op.reference(*args), op.fake(*args), strict=True):
            assert (result.shape, result.dtype) == (reference.shape, reference.dtype) == (fake.shape, fake.dtype)
            assert result.stride() == reference.stride() == fake.stride()


@pytest.mark.parametrize("problem", problems(), ids=str)
def test_rows_may_lie_apart(call: Callable[[FusedOp], Call], problem: Problem, device: torch.device) -> None:
    op = get_op(problem.op)
    args = op.check_args(problem, 21, device, torch.Generator(device).manual_seed(3))
    for index, (result, exact) in enumerate(zip(call(op)(*args), op.exact(*args), strict=True)):
        assert op.tolerance(problem, index).error(result, exact) <= 1.0


@pytest.mark.parametrize("problem", problems(), ids=str)
def test_pytorch_accepts_the_registration(problem: Problem, device: torch.device) -> None:
    overload = getattr(torch.ops.autofuse, problem.op).default
    args = tuple(args_of(problem, 3, device))
    torch.library.opcheck(overload, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_a_norm_is_that_of_mla_dual_rms_norm_rounded(device: torch.device) -> None:
    problem = NORMS.make_problem(dtype="bf16", q_lora_rank=384, kv_lora_rank=64, cast_before_weight=True, group=128)
    q_c, q_weight, kv_c, kv_weight, *rest = args_of(problem, 33, device)
    eps, _, cast, *flags = rest
    values, scales, kv = torch.ops.autofuse.mla_dual_rms_norm_quant(q_c, q_weight, kv_c, kv_weight, *rest)
    q, normed_kv = torch.ops.autofuse.mla_dual_rms_norm(q_c, q_weight, kv_c, kv_weight, *rest[:3])
    apart = torch.ops.autofuse.fp8_group_quant(q, None, None, 0.0, False, *flags)
    together = torch.ops.autofuse.fp8_group_quant(q_c, None, q_weight, eps, cast, *flags)
    torch.testing.assert_close(kv, normed_kv)
    for found, (also, expected) in ((values, (together[0], apart[0])), (scales, (together[1], apart[1]))):
        # A sum in another order may round an element of q to the other side of a tie.
        for each in (found, also):
            assert (each.float() != expected.float()).float().mean() < 0.01
    assert QuantFormat.of(problem).tolerance(1, "bf16").error(scales, apart[1]) <= 1.0


def test_unusual_dtypes_run_the_reference(call: Callable[[FusedOp], Call], device: torch.device) -> None:
    x = torch.randn(4, 256, device=device)
    weight = torch.ones(256, device=device)
    wide = (x.double(), None, None, 0.0, False, 128, False, 0)
    mixed = (x.bfloat16(), None, weight, 1e-6, True, 128, False, 0)
    narrow = (x[:, :100].bfloat16().contiguous(), torch.tensor(0.5, device=device), None, 0.0, False, STATIC, False, 0)
    for args in (wide, mixed, narrow):
        for result, expected in zip(call(QUANT)(*args), QUANT.reference(*args), strict=True):
            assert torch.equal(result.float(), expected.float())


X = torch.zeros(4, 256, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x": X[0]}, r"x \[256\] is not \[T, width\]"),
        ({"x": X.int()}, "x is torch.int32, which is no floating dtype"),
        ({"x": X.T}, "the last dimension of x, of stride 256, must be contiguous"),
        ({"x": X[:, :200]}, "rows of 200 elements are no whole number of groups of 128"),
        ({"norm_weight": X[0, :100]}, r"norm_weight \[100\] is not \[256\]"),
        ({"scale": torch.ones(1)}, "scale must be None"),
        ({"group": STATIC}, "with group 0, scale must be one fp32 value, not None"),
        ({"group": STATIC, "scale": torch.ones(2)}, r"must be one fp32 value, not \[2\] of torch.float32"),
        ({"group": NVFP4, "scale": X[0, :1]}, r"must be one fp32 value, not \[1\] of torch.bfloat16"),
        ({"group": 32}, "group is 32, none of 0, 16, 64, 128"),
        ({"group": NVFP4, "scale": torch.ones(1), "layout": 1}, "ue8m0 and layout are for groups of 64 and 128"),
        ({"group": STATIC, "scale": torch.ones(1), "ue8m0": True}, "ue8m0 and layout are for groups of 64 and 128"),
        ({"layout": 3}, "layout is 3, none of 0"),
    ],
)
@pytest.mark.parametrize("how", ["called", "traced"])
def test_arguments_that_do_not_fit_are_one_clear_line(changed: dict[str, Any], said: str, how: str) -> None:
    args: dict[str, Any] = {
        "x": X,
        "scale": None,
        "norm_weight": None,
        "norm_eps": 1e-6,
        "cast_before_weight": True,
        "group": 128,
        "ue8m0": False,
        "layout": 0,
        **changed,
    }
    call = torch.ops.autofuse.fp8_group_quant if how == "called" else QUANT.fake
    with pytest.raises(ValueError, match="fp8_group_quant: .*" + said):
        call(*args.values())


@pytest.mark.parametrize(
    ("index", "value", "said"),
    [
        (7, 16, "group is 16, neither 64 nor 128"),
        (7, 96, "group is 96, none of"),
        (9, 7, "layout is 7"),
        (0, X[:, :200], r"q_c \[4, 200\] and q_weight \[256\]"),
        (2, X[:3, :64], "q_c has 4 rows, kv_c 3"),
        (0, torch.zeros(256, 4, dtype=torch.bfloat16).T, "the last dimension of q_c, of stride 4, must be contiguous"),
    ],
)
def test_arguments_of_the_dual_norm_that_do_not_fit_are_one_clear_line(index: int, value: Any, said: str) -> None:
    args = [X, X[0], X[:, :64].contiguous(), X[0, :64], 1e-6, 1e-6, True, 128, False, 0]
    args[index] = value
    with pytest.raises(ValueError, match="mla_dual_rms_norm_quant: .*" + said):
        torch.ops.autofuse.mla_dual_rms_norm_quant(*args)


def test_compiled_graphs_see_the_scales_strides(device: torch.device) -> None:
    x = torch.randn(7, 256, device=device, dtype=torch.bfloat16)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = torch.ops.autofuse.fp8_group_quant(
            x, None, None, 0.0, False, 64, False, ScaleLayout.TMA_ALIGNED
        )
        return values, scales.as_strided((4, 7), (8, 1))

    values, scales = torch.compile(step, backend="aot_eager", dynamic=False)(x)
    expected = QUANT.reference(x, None, None, 0.0, False, 64, False, 0)
    assert_same_bits(values.cpu(), bits(expected[0].cpu()))
    assert torch.equal(scales, expected[1].T)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1000])
@pytest.mark.parametrize("captured", [False, True], ids=["launched", "captured"])
def test_programmatic_launch_quantises_what_the_kernel_before_it_wrote(tokens: int, captured: bool) -> None:
    from autofuse.runtime.plan import Plan
    from autofuse.targets import target_of

    device = torch.device("cuda", 0)
    arch = target_of(device).arch
    before = get_op("mla_dual_rms_norm")
    norms = before.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
    problem = QUANT.make_problem(dtype="bf16", width=1536, group=128)
    source = torch.Generator(device).manual_seed(0)
    inputs = [before.example_args(norms, tokens, device, source) for _ in range(20)]
    expected = []
    for args in inputs:
        q, _ = torch.ops.autofuse.mla_dual_rms_norm(*args)
        # On a CPU: a GPU divides by a number through its reciprocal, which is off by a unit now and then.
        right = QUANT.reference(q.cpu(), None, None, 0.0, False, 128, False, 0)
        expected.append([each.to(device) for each in right])
    first = next(c for c in before.kernel_source("cuda").space.configs(norms, tokens) if c["PDL"])
    ways = {(c["PDL"], c["PREFETCH"]): c for c in QUANT.kernel_source("cuda").space.configs(problem, tokens)}
    for way, config in ways.items():
        if not way[0]:
            continue
        plans = str(Plan(arch, norms, ((1, first),))), str(Plan(arch, problem, ((1, config),)))

        def chain(plans: tuple[str, str] = plans) -> list[tuple[torch.Tensor, ...]]:
            results = []
            for args in inputs:
                q, _ = torch.ops.autofuse.mla_dual_rms_norm(*args, plans[0])
                results.append(torch.ops.autofuse.fp8_group_quant(q, None, None, 0.0, False, 128, False, 0, plans[1]))
            return results

        results = chain()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = chain()
            graph.replay()
        torch.cuda.synchronize()
        for (values, scales), (right, right_scales) in zip(results, expected, strict=True):
            # The norm's own config may round a few elements the other way.
            assert (values.float() != right.float()).float().mean() < 0.01, config
            torch.testing.assert_close(scales, right_scales, rtol=0.01, atol=0.0, msg=str(config))
