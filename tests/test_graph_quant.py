"""Quantisation is found in every dialect, with the format that it has, and only there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import vllm_standins  # noqa: F401 (registers vLLM's operators)
from models import post_grad_graph
from torch._inductor import config

from autofuse.graph.recognise import recognise
from autofuse.ops.quant import QuantFormat, ScaleLayout

E4M3 = torch.float8_e4m3fn
T, N = 6, 256
C, aten = torch.ops._C, torch.ops.aten


def rows(tokens=T, width=N, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return torch.randn(tokens, width, dtype=dtype)


def found(function, *args, dynamic=False):
    """(blocks, reasons of near misses)"""
    result = recognise(post_grad_graph(function, *args, dynamic=dynamic))
    return result.quants(), [miss.reason for miss in result.near_misses]


# ---- groups, in plain PyTorch ---------------------------------------------------------------------------------------


def keepdim(x, group=128):
    groups = x.view(x.shape[0], -1, group).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (groups / scales).to(E4M3).view(x.shape), scales.squeeze(-1)


def unsqueezed(x, group=128):
    wide = x.float().view(x.shape[0], -1, group)
    scales = torch.clamp_min(wide.abs().amax(dim=-1), 1e-10) / 448
    return (wide / scales.unsqueeze(-1)).clamp(-448, 448).to(E4M3).flatten(-2), scales


def maximum_of_a_tensor(x, group=128):
    groups = x.unflatten(-1, (-1, group))
    scales = torch.maximum(groups.abs().float().amax(-1, keepdim=True), torch.tensor(1e-10)) / 448.0
    return (groups.float() / scales).reshape(x.shape).to(E4M3), scales[..., 0]


def maximum_with_indices(x, group=128):
    groups = x.reshape(-1, x.shape[-1] // group, group)
    scales = groups.abs().max(dim=-1, keepdim=True)[0].float().clamp(1e-10) / 448.0
    return (groups / scales).clamp(-448.0, 448.0).to(E4M3).view(x.shape), scales.view(*x.shape[:-1], -1)


def cast_written_twice(x, group=128):
    shape = (x.shape[0], -1, group)
    scales = x.view(shape).float().abs().amax(2, keepdim=True).clamp(min=1e-10) / 448.0
    return (x.view(shape).float() / scales).to(E4M3).view(x.shape), scales.squeeze(2)


def times_reciprocal(x, group=128):
    groups = x.view(x.shape[0], -1, group).float()
    scales = groups.abs().amax(-1).clamp(min=1e-10) / 448.0
    return (groups * (1 / scales)[..., None]).clamp(-448, 448).to(E4M3).view(x.shape), scales


def times_448_over_amax(x, group=128):
    groups = x.view(x.shape[0], -1, group)
    amax = groups.abs().float().amax(dim=2).view(x.shape[0], -1).clamp(1e-10)
    return (groups * (448.0 / amax.unsqueeze(2))).to(E4M3).view(x.shape), amax / 448.0


def times_inverse_max(x, group=128):
    groups = x.view(x.shape[0], -1, group).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) * (1 / 448)
    return (groups / scales).to(E4M3).view(x.shape), scales.squeeze(-1)


EXACT = [keepdim, unsqueezed, maximum_of_a_tensor, maximum_with_indices, cast_written_twice]
ROUNDED = [times_reciprocal, times_448_over_amax, times_inverse_max]


def named(function):
    return getattr(function, "__name__", "")


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dialect", [*EXACT, *ROUNDED], ids=named)
def test_every_dialect_of_groups_gives_the_same_block(dialect, dtype, group):
    x = rows(dtype=dtype)
    (block,), reasons = found(lambda x: dialect(x, group), x)
    assert not reasons
    assert (block.format, block.width, block.dtype) == (QuantFormat(group), N, dtype)
    assert (block.input.op, block.scale) == ("placeholder", None)
    assert (block.rounding == "") == (dialect in EXACT)
    # What the block says of the values holds: they are the format's, up to the roundings that it names.
    for made, meant in zip(dialect(x, group), QuantFormat(group).quantise(x), strict=True):
        torch.testing.assert_close(
            made.float(), meant.float(), rtol=0 if dialect in EXACT else 2**-3, atol=0 if dialect in EXACT else 2**-9
        )


@pytest.mark.parametrize("dialect", [*EXACT, *ROUNDED], ids=named)
def test_nodes_are_all_between_the_rows_and_the_results(dialect):
    graph = post_grad_graph(dialect, rows())
    (block,) = recognise(graph).quants()
    own = set(block.nodes)
    assert block.input not in own
    assert set(block.outputs) <= own
    for node in own - set(block.outputs):
        assert set(node.users) <= own
    # Nothing is left but views behind the results.
    left = [node for node in graph.nodes if node.op == "call_function" and node not in own and node.users]
    views = (aten.reshape.default, aten.squeeze.dim, aten.select.int, aten.full.default)
    assert {node.target for node in left} <= set(views)


@pytest.mark.parametrize("dialect", [keepdim, unsqueezed, maximum_with_indices, times_448_over_amax], ids=named)
def test_groups_of_dynamic_tokens(dialect):
    x = rows()
    torch._dynamo.mark_dynamic(x, 0)
    (block,), reasons = found(dialect, x, dynamic=None)
    assert not reasons
    assert (block.format, block.width) == (QuantFormat(128), N)


@pytest.mark.parametrize("tokens", [1, 5])
def test_batches_of_sequences(tokens):
    def quantised(x):
        groups = x.view(-1, 2, 128).float()
        scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
        return (groups / scales).to(E4M3).view(x.shape), scales.view(*x.shape[:-1], 2)

    (block,), _ = found(quantised, torch.randn(3, tokens, N))
    assert (block.width, list(block.input.meta["val"].shape)) == (N, [3, tokens, N])


def powers_of_two(x):
    groups = x.view(x.shape[0], -1, 128).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    scales = torch.exp2(torch.ceil(torch.log2(scales)))
    return (groups / scales).to(E4M3).view(x.shape), scales.squeeze(-1)


def powers_of_two_by_pow(x):
    groups = x.view(x.shape[0], -1, 128).float()
    scales = torch.pow(2.0, torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0)))
    return (groups / scales).to(E4M3).view(x.shape), scales.squeeze(-1)


@pytest.mark.parametrize("dialect", [powers_of_two, powers_of_two_by_pow], ids=named)
def test_ue8m0(dialect):
    x = rows()
    (block,), _ = found(dialect, x)
    assert block.format == QuantFormat(128, ue8m0=True)
    assert "logarithm" in block.rounding
    for made, meant in zip(dialect(x), block.format.quantise(x), strict=True):
        assert torch.equal(made.float(), meant.float())


def column_major(x):
    values, scales = keepdim(x)
    return values, scales.transpose(-2, -1).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
def test_scales_that_are_transposed_in_memory(dynamic):
    x = rows()
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 0)
    (block,), _ = found(column_major, x, dynamic=dynamic)
    assert block.format == QuantFormat(128, layout=ScaleLayout.COLUMN_MAJOR)
    assert [user.op for user in block.scales.users] == ["output"]


def test_scales_that_are_transposed_and_read_elsewhere_stay_as_they_are():
    def twice(x):
        values, scales = keepdim(x)
        return values, scales.t().contiguous().t(), scales + 1

    (block,), _ = found(twice, rows())
    assert block.format.layout == ScaleLayout.ROW_MAJOR


def test_scales_that_undo_the_quantisation_belong_to_others_too():
    def undone(x):
        groups = x.view(x.shape[0], -1, 128).float()
        scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
        return ((groups / scales).to(E4M3).float() * scales).view(x.shape)

    (block,), _ = found(undone, rows())
    assert block.scales.target is aten.div.Tensor
    assert len(block.outputs) == 2


def test_a_wide_copy_of_the_rows_that_others_read_too_stays():
    def residual(x):
        groups = x.view(x.shape[0], -1, 128).float()
        scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
        return (groups / scales).to(E4M3), scales, groups + 1

    graph = post_grad_graph(residual, rows())
    (block,) = recognise(graph).quants()
    assert block.nodes[0].target is aten.abs.default


# ---- groups, near misses --------------------------------------------------------------------------------------------


def group_quant(x, *, group=128, limit=448.0, smallest=1e-10, dtype=E4M3, dim=-1, wide=torch.float32):
    groups = x.view(x.shape[0], -1, group).to(wide)
    amax = groups.abs().amax(dim, keepdim=True)
    scales = (amax if smallest is None else amax.clamp(min=smallest)) / limit
    return (groups / scales).to(dtype).view(x.shape), scales


def smallest_scale(x):  # as vLLM's QuantFP8.forward_native
    groups = x.view(x.shape[0], -1, 128)
    scales = (groups.abs().max(dim=-1, keepdim=True)[0].float() / 448.0).clamp(min=1 / (448 * 512))
    return (groups / scales).clamp(-448, 448).to(E4M3).view(x.shape), scales


def signed(x):
    groups = x.view(x.shape[0], -1, 128).float()
    scales = groups.amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (groups / scales).to(E4M3), scales


def of_other_rows(x):
    groups = x.view(x.shape[0], -1, 128).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return ((groups + 1) / scales).to(E4M3), scales


def narrower(x):
    groups = x.view(x.shape[0], -1, 128).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (groups / scales).clamp(-240, 240).to(E4M3), scales


def amax_leaves(x):
    groups = x.view(x.shape[0], -1, 128).float()
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    return (groups / (amax / 448.0)).to(E4M3), amax


def unscaled_leaves(x):
    groups = x.view(x.shape[0], -1, 128).float()
    quotient = groups / (groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0)
    return quotient.to(E4M3), quotient


def doubled(x):
    groups = x.view(x.shape[0], -1, 128).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (groups * (2.0 / scales)).to(E4M3), scales


def rounded_to_nearest_power(x):
    groups = x.view(x.shape[0], -1, 128).float()
    scales = torch.exp2(torch.log2(groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0))
    return (groups / scales).to(E4M3), scales


def rounded_first(x):
    groups = x.view(x.shape[0], -1, 128).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (groups / scales).to(x.dtype).to(E4M3), scales


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: group_quant(x, smallest=1e-4), "smallest amax is 0.0001, not 1e-10"),
        (lambda x: group_quant(x, smallest=None), "not kept from 0"),
        (smallest_scale, "smallest scale is 4.35965e-06"),
        (lambda x: group_quant(x, limit=240.0), "not amax / 448"),
        (lambda x: group_quant(x, group=32), "32 elements, neither 64 nor 128"),
        (lambda x: group_quant(x, group=N), "256 elements, neither 64 nor 128"),
        (lambda x: group_quant(x, dim=1), "over dimensions [1], not over the last"),
        (lambda x: group_quant(x, dtype=torch.float8_e5m2), "its values are torch.float8_e5m2"),
        (lambda x: group_quant(x, wide=torch.bfloat16), "its scales are computed in torch.bfloat16"),
        (rounded_first, "its values are rounded to torch.bfloat16 first"),
        (signed, "not of absolute values"),
        (of_other_rows, "are not those of its amax"),
        (narrower, "clamped to -240, not to -448"),
        (amax_leaves, "is also an output of the graph"),
        (unscaled_leaves, "is also an output of the graph"),
        (doubled, "multiplied by 2 besides"),
        (rounded_to_nearest_power, "how its scales are rounded is not known"),
    ],
    ids=named,
)
def test_what_differs_is_a_near_miss_with_its_reason(function, why):
    blocks, reasons = found(function, rows())
    assert not blocks
    assert len(reasons) == 1
    assert why in reasons[0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to(E4M3),
        lambda x: (x.float() * 2).to(E4M3),
        lambda x: (x.float() / x.float().abs()).to(E4M3),
        lambda x: F.softmax(x.float(), -1).to(E4M3),
        lambda x: x.float() / (x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0),
    ],
    ids=["cast", "times two", "sign", "softmax", "not cast"],
)
def test_what_does_not_look_like_it_is_passed_over_in_silence(function):
    assert found(function, rows()) == ([], [])


# ---- one scale for the tensor ---------------------------------------------------------------------------------------


def static(x, scale):
    return (x.float() * scale.reciprocal()).clamp(-448, 448).to(E4M3)


def static_one_over(x, scale):
    return (x.to(torch.float32) * (1.0 / scale)).clamp(min=-448.0, max=448.0).to(E4M3)


def static_divided(x, scale):
    return (x / scale).clamp(-448, 448).to(E4M3)


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dialect", [static, static_one_over, static_divided], ids=named)
def test_every_dialect_of_static_scales_gives_the_same_block(dialect, shape):
    x, scale = rows() * 100, torch.full(shape, 0.37)
    (block,), reasons = found(dialect, x, scale)
    assert not reasons
    assert (block.format, block.width, block.scales) == (QuantFormat(0), N, None)
    assert (block.input.op, block.scale.op) == ("placeholder", "placeholder")
    assert (block.rounding == "") == (dialect is not static_divided)
    if not block.rounding:
        assert torch.equal(dialect(x, scale).float(), block.format.quantise(x, scale)[0].float())


def test_a_scale_that_serves_two_quantisations():
    def both(x, y, scale):
        inverse = scale.reciprocal()
        return [(each.float() * inverse).clamp(-448, 448).to(E4M3) for each in (x, y)]

    blocks, reasons = found(both, rows(), rows() + 1, torch.ones(1))
    assert len(blocks) == 2
    assert not reasons
    assert not set(blocks[0].nodes) & set(blocks[1].nodes)


@pytest.mark.parametrize(
    ("function", "scale", "why"),
    [
        (lambda x, s: (x.float() / s).to(E4M3), torch.ones(1), "not clamped"),
        (lambda x, s: (x.float() / s).clamp(-448, 448).to(torch.float8_e5m2), torch.ones(1), "torch.float8_e5m2"),
        (lambda x, s: (x / s).clamp(-448, 448).to(E4M3), torch.ones(()), "in torch.bfloat16"),
        (lambda x, s: (x.float() / s).clamp(-448, 448).to(E4M3), torch.ones(1).bfloat16(), "is torch.bfloat16"),
        (lambda x, s: (x.float() * (3 / s)).clamp(-448, 448).to(E4M3), torch.ones(1), "multiplied by 3 besides"),
    ],
    ids=["unclamped", "e5m2", "bf16 arithmetic", "bf16 scale", "factor"],
)
def test_what_differs_from_a_static_scale_is_a_near_miss(function, scale, why):
    blocks, (reason,) = found(function, rows(), scale)
    assert not blocks
    assert why in reason


# ---- vLLM's operators -----------------------------------------------------------------------------------------------


def scales_of(x, layout, group):
    tokens, columns = x.shape[0], x.shape[1] // group
    if layout == ScaleLayout.ROW_MAJOR:
        return torch.empty(tokens, columns, dtype=torch.float32)
    if layout == ScaleLayout.COLUMN_MAJOR:
        return torch.empty(columns, tokens, dtype=torch.float32).permute(-1, -2)
    return torch.empty_strided((tokens, columns), (1, (tokens + 3) // 4 * 4), dtype=torch.float32)


def group_op(x, layout=ScaleLayout.ROW_MAJOR, group=128, ue8m0=False, eps=1e-10, limit=448.0, dtype=E4M3):
    values, scales = torch.empty(x.shape, dtype=dtype), scales_of(x, layout, group)
    C.per_token_group_fp8_quant(x, values, scales, group, eps, -limit, limit, ue8m0, layout > 0, layout == 2)
    return values, scales


def static_op(x, scale):
    values = torch.empty(x.shape, dtype=E4M3)
    C.static_scaled_fp8_quant(values, x, scale)
    return values


def dynamic_op(x):
    values, scale = torch.empty(x.shape, dtype=E4M3), torch.empty(1, dtype=torch.float32)
    C.dynamic_scaled_fp8_quant(values, x, scale)
    return values, scale


def nvfp4(x, scale):
    values, scales = C.scaled_fp4_quant(x, scale, True)
    return values, scales.view(E4M3)


def nvfp4_out(x, scale):
    values = torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8)
    scales = torch.empty((x.shape[0] + 127) // 128 * 128, (x.shape[1] // 16 + 3) // 4, dtype=torch.int32)
    C.scaled_fp4_quant.out(x, scale, True, output=values, output_scale=scales)
    return values, scales.view(E4M3)


@pytest.fixture(params=[True, False], ids=["auto_functionalized_v2", "auto_functionalized"])
def functionalised(request):
    with config.patch(enable_auto_functionalized_v2=request.param):
        yield


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize("layout", ScaleLayout, ids=lambda layout: layout.name)
@pytest.mark.usefixtures("functionalised")
def test_group_op(layout, dynamic):
    x = rows()
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 0)
    graph = post_grad_graph(lambda x: group_op(x, layout, 64, True), x, dynamic=dynamic)
    (block,) = recognise(graph).quants()
    assert block.format == QuantFormat(64, True, layout)
    assert (block.input.op, block.width) == ("placeholder", N)
    assert [user.op for output in block.outputs for user in output.users] == ["output"] * 2
    assert not [node for node in graph.nodes if "empty" in str(node.target) and node not in block.nodes]


@pytest.mark.parametrize("function", [nvfp4, nvfp4_out], ids=named)
@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.usefixtures("functionalised")
def test_nvfp4_ops(function, dynamic):
    x, scale = rows(), torch.full((1,), 3.0)
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 0)
    (block,), _ = found(function, x, scale, dynamic=dynamic)
    assert block.format == QuantFormat(16)
    assert (block.input.op, block.scale.op, block.width) == ("placeholder", "placeholder", N)
    assert [output.meta["val"].dtype for output in block.outputs] == [torch.uint8, E4M3]
    for made, meant in zip(function(x, scale), block.format.quantise(x, scale), strict=True):
        assert torch.equal(made.view(torch.uint8), meant.view(torch.uint8))


@pytest.mark.usefixtures("functionalised")
def test_static_op():
    x, scale = rows(), torch.full((1, 1), 0.37)
    (block,), _ = found(static_op, x, scale)
    assert (block.format, block.scale.op, block.scales) == (QuantFormat(0), "placeholder", None)
    assert torch.equal(static_op(x, scale).float(), block.format.quantise(x, scale)[0].float())


def test_ops_of_vllms_ir():
    x, scale = rows(), torch.ones(1)
    ir = torch.ops.vllm_ir
    (block,), _ = found(lambda x, scale: ir.static_quant_fp8(x, scale, E4M3), x, scale)
    assert (block.format, block.scale.op) == (QuantFormat(0), "placeholder")
    (block,), _ = found(lambda x: ir.dynamic_group_quant_fp8(x, [1, 128], True, False, E4M3), x)
    assert block.format == QuantFormat(128, layout=ScaleLayout.COLUMN_MAJOR)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: group_op(x, eps=1e-6), "eps is 1e-06, not 1e-10"),
        (lambda x: group_op(x, limit=240.0), "fp8_min is -240"),
        (lambda x: group_op(x, group=32), "group is 32"),
        (lambda x: group_op(x, dtype=torch.float8_e5m2), "its values are torch.float8_e5m2"),
        (lambda x: static_op(x, torch.ones(1, dtype=torch.float32).expand(x.shape[0])[:, None]), "not one float32"),
        (dynamic_op, "_C::dynamic_scaled_fp8_quant has one scale for all rows"),
        (lambda x: torch.ops.vllm_ir.static_quant_fp8(x, torch.ones(1), E4M3, 16), "it pads its rows"),
    ],
    ids=["eps", "range", "group", "dtype", "per-token scale", "dynamic scale", "padding"],
)
def test_what_an_op_cannot_be_replaced_for_is_a_near_miss(function, why):
    blocks, (reason,) = found(function, rows())
    assert not blocks
    assert why in reason


def test_part_of_a_buffer_is_a_near_miss():
    def into_a_slice(x):
        values, scales = torch.empty(2 * x.shape[0], N, dtype=E4M3), scales_of(x, ScaleLayout.ROW_MAJOR, 128)
        C.per_token_group_fp8_quant(x, values[:T], scales, 128, 1e-10, -448.0, 448.0, False, False, False)
        return values, scales

    blocks, (reason,) = found(into_a_slice, rows())
    assert not blocks
    assert "part of the buffer" in reason


# ---- RMSNorm by operator --------------------------------------------------------------------------------------------


def norm_op(x, weight):
    result = torch.empty_like(x)
    C.rms_norm(result, x, weight, 1e-5)
    return result


def added_norm_op(x, weight):
    rows, residual = x.clone(), x.clone()
    C.fused_add_rms_norm(rows, residual, weight, 1e-5)
    return rows, residual


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "function", [norm_op, lambda x, w: torch.ops.vllm_ir.rms_norm(x, w, 1e-5)], ids=["_C", "vllm_ir"]
)
@pytest.mark.usefixtures("functionalised")
def test_norm_ops(function, dtype):
    (block,) = recognise(post_grad_graph(function, rows(dtype=dtype), torch.ones(N, dtype=dtype))).rms_norms()
    assert (block.width, block.dtype, block.eps) == (N, dtype, 1e-5)
    assert block.cast_before_weight == (dtype != torch.float32)
    assert [block.input.op, block.weight.op] == ["placeholder"] * 2
    assert [user.op for user in block.output.users] == ["output"]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x, w: torch.ops.vllm_ir.rms_norm(x, None, 1e-5), "no weight"),
        (lambda x, w: norm_op(x, None), "no weight"),
        (lambda x, w: torch.ops.vllm_ir.fused_add_rms_norm(x, x, w, 1e-5), "adds the residual first"),
        (added_norm_op, "_C::fused_add_rms_norm adds the residual first"),
        (lambda x, w: torch.ops.vllm_ir.rms_norm(x, w, 1e-5, 128), "over 128 of 256"),
        (lambda x, w: torch.ops.vllm_ir.rms_norm(x, w[:128].repeat(2).float(), 1e-5), "is torch.float32"),
    ],
    ids=["weight", "weight of _C", "vllm_ir, added", "_C, added", "variance_size", "dtype"],
)
def test_norm_ops_that_differ_are_near_misses(function, why):
    result = recognise(post_grad_graph(function, rows(), torch.ones(N, dtype=torch.bfloat16)))
    assert result.rms_norms() == []
    assert any(why in miss.reason for miss in result.near_misses)
