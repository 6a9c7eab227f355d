"""RMSNorm is found in every dialect, and only there."""

from __future__ import annotations

import pytest
import torch
from models import post_grad_graph
from torch import nn
from torch.nn import functional as F  # noqa: N812

from autofuse.graph.recognise import recognise

N = 32
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]


def hugging_face(x, weight, eps=1e-6):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def vllm(x, weight, eps=1e-6):
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(dim=-1, keepdim=True)
    wide = wide * torch.rsqrt(variance + eps)
    return wide.to(x.dtype) * weight


def vllm_fp32_weight(x, weight, eps=1e-6):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def functional(x, weight, eps=1e-6):
    return F.rms_norm(x, (N,), weight, eps)


def sum_over_n(x, weight, eps=1e-6):
    wide = x.float()
    return weight * (torch.rsqrt(eps + (wide * wide).sum(-1, keepdim=True) / N) * wide).to(x.dtype)


def sum_times_reciprocal(x, weight, eps=1e-6):
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) * (1 / N) + eps)).to(x.dtype) * weight


def one_over_sqrt(x, weight, eps=1e-6):
    wide = x.float()
    return weight * (wide * (1 / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps))).to(x.dtype)


def divided_by_sqrt(x, weight, eps=1e-6):
    wide = x.float()
    return weight * (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def power(x, weight, eps=1e-6):
    wide = x.float()
    return weight * (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).pow(-0.5)).to(x.dtype)


def cast_written_twice(x, weight, eps=1e-6):
    return weight * (x.float() * torch.rsqrt((x.float() * x.float()).mean(-1, keepdim=True) + eps)).to(x.dtype)


BEFORE = [
    hugging_face,
    vllm,
    cast_written_twice,
    sum_over_n,
    sum_times_reciprocal,
    one_over_sqrt,
    divided_by_sqrt,
    power,
]
AFTER = [vllm_fp32_weight, functional]


def tensors(dtype, width=N):
    return torch.randn(2, 5, width, dtype=dtype), torch.randn(width, dtype=dtype)


def found(function, *args, dynamic=False):
    """(blocks, reasons of near misses)"""
    result = recognise(post_grad_graph(function, *args, dynamic=dynamic))
    return result.rms_norms(), [miss.reason for miss in result.near_misses]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dialect", [*BEFORE, *AFTER], ids=lambda f: f.__name__)
def test_every_dialect_gives_the_same_block(dialect, dtype):
    (block,), reasons = found(dialect, *tensors(dtype))
    assert not reasons
    assert (block.width, block.dtype) == (N, dtype)
    assert block.eps == pytest.approx(1e-6)
    assert block.cast_before_weight == (dialect in BEFORE and dtype != torch.float32)
    assert [block.input.op, block.weight.op] == ["placeholder"] * 2
    assert [user.op for user in block.output.users] == ["output"]


@pytest.mark.parametrize("dialect", [hugging_face, vllm_fp32_weight, functional], ids=lambda f: f.__name__)
def test_with_marked_dynamic_tokens(dialect):
    x, weight = tensors(torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 1)
    (block,), reasons = found(dialect, x, weight, dynamic=None)
    assert not reasons
    assert isinstance(block.input.meta["val"].shape[1], torch.SymInt)


@pytest.mark.parametrize("make", [lambda: nn.RMSNorm(N, eps=1e-5), lambda: nn.RMSNorm(N)], ids=["eps", "eps=None"])
def test_module_of_pytorch_under_dynamic_true(make):
    (block,), _ = found(make(), torch.randn(2, 5, N), dynamic=True)
    assert block.width == N


def test_dynamic_eps_is_refused_by_name_and_with_advice():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 1e-6
            self.weight = nn.Parameter(torch.ones(N))

        def forward(self, x):
            return hugging_face(x, self.weight, self.eps)

    blocks, (reason,) = found(Norm(), torch.randn(2, 5, N), dynamic=True)
    assert not blocks
    assert "eps arg" in reason
    assert "specialize_float" in reason
    assert "mark_dynamic" in reason


def test_an_input_cast_that_others_read_too_stays():
    def residual(x, weight):
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight
        return normed, wide + 1

    (block,), _ = found(residual, *tensors(torch.bfloat16))
    assert all(not user.name.startswith("output") for node in block.nodes[:-1] for user in node.users)
    assert block.nodes[0].target is not torch.ops.prims.convert_element_type.default


def gemma(x, weight):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).to(x.dtype)


def test_weight_plus_one_in_fp32_is_a_norm_with_a_computed_weight():
    (block,), _ = found(gemma, *tensors(torch.float32))
    assert block.weight.target is torch.ops.aten.add.Tensor


def test_weight_plus_one_of_a_half_type_is_not_a_norm_with_that_weight():
    blocks, (reason,) = found(gemma, *tensors(torch.bfloat16))
    assert not blocks
    assert "is torch.float32, its input torch.bfloat16" in reason


def eps_outside(x, weight):
    wide = x.float()
    return weight * (wide * (torch.rsqrt(wide.pow(2).mean(-1, keepdim=True)) + 1e-6)).to(x.dtype)


def clamped(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).clamp(min=1e-6))).to(x.dtype)


def other_dimension(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + 1e-6)).to(x.dtype)


def both_dimensions(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean((-2, -1), keepdim=True) + 1e-6)).to(x.dtype)


def not_divided(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def wrong_divisor(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) / (N - 1) + 1e-6)).to(x.dtype)


def other_rows(x, weight):
    wide = x.float()
    return weight * ((wide + 1) * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def root_leaves(x, weight):
    wide = x.float()
    root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * (wide * root).to(x.dtype), root


def normed_leaves(x, weight):
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return weight * normed, normed


def no_weight(x, weight):
    return F.rms_norm(x, (N,), None, 1e-6) + 1


def two_dimensional_weight(x, weight):
    return hugging_face(x, weight.expand(5, N))


def cast_to_another(x, weight):
    other = torch.float16 if x.dtype == torch.bfloat16 else torch.bfloat16
    wide = x.float()
    return weight.to(other) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(other)


def cast_twice(x, weight):
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype).float()
    return (normed * weight.float()).to(x.dtype)


def in_half(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (eps_outside, "no eps is added"),
        (clamped, "eps is not added"),
        (other_dimension, "over dimensions [1]"),
        (both_dimensions, "over dimensions [-2, -1]"),
        (not_divided, "not divided by the width"),
        (wrong_divisor, "not divided by the width"),
        (other_rows, "are not what"),
        (root_leaves, "saved for backward?"),
        (normed_leaves, "has 2 users"),
        (no_weight, "not multiplied by a weight"),
        (two_dimensional_weight, "not [32]"),
        (cast_to_another, "become torch.float16"),
        (cast_twice, "not multiplied by a weight"),
        (in_half, "its arithmetic is in torch.bfloat16"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_differs_is_a_near_miss_with_its_reason(function, why):
    blocks, reasons = found(function, *tensors(torch.bfloat16))
    assert not blocks
    assert any(why in reason for reason in reasons), reasons


def test_fp32_weight_on_half_rows_is_a_near_miss():
    x, weight = torch.randn(4, N, dtype=torch.bfloat16), torch.randn(N)
    blocks, (reason,) = found(vllm_fp32_weight, x, weight)
    assert not blocks
    assert "is torch.float32, its input torch.bfloat16" in reason


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.layer_norm(x, (N,), w, w, 1e-6),
        lambda x, w: F.batch_norm(x[:, 0], w.float(), w.float().abs(), eps=1e-6),
        lambda x, w: torch.rsqrt(x.float() + 1) * w,
        lambda x, w: F.softmax(x, -1) * w,
    ],
    ids=["layer_norm", "batch_norm", "rsqrt", "softmax"],
)
def test_what_does_not_look_like_it_is_passed_over_in_silence(function):
    assert found(function, *tensors(torch.float32)) == ([], [])
