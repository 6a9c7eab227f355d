"""The pieces of random layers: norms, quantisations, rotations and products in the dialects of several codebases, and
others that look like these and are none.

Rows are [T, width], heads [T, H, D]; ``table`` [P, R] holds cosines, then sines.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import rope_dialects
import vllm_standins

__all__ = [
    "ABSORBED",
    "LIBRARY",
    "NORMS",
    "NO_ABSORBED",
    "NO_NORMS",
    "NO_PRODUCTS",
    "NO_QUANTS",
    "NO_ROPES",
    "PRODUCTS",
    "QUANTS",
    "ROPES",
    "TABLE_ROWS",
    "layer_caches",
    "layers_known",
]

TABLE_ROWS = 24
E4M3 = torch.float8_e4m3fn


def rows(*sizes: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*sizes)).to(dtype)


def twins(x: torch.Tensor) -> torch.Tensor:
    """The last token is the first once more."""
    x[-1:] = x[:1].clone()
    return x


def table_of(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(TABLE_ROWS, size).clamp(-1, 1).to(dtype)


def head_layer(name, cache, slots, pairs, dtype, scale):
    """Makes a GQA layer known by its name, for the calls that follow; returns its slots."""
    impl = vllm_standins.FlashAttentionImpl(dtype, pairs)
    vllm_standins.layers[name] = vllm_standins.HeadLayer(cache, slots, impl, _k_scale=scale, _v_scale=scale * 2)
    return slots


def latent_layer(name, cache, slots, heads, nope, rank, value):
    """The same for an MLA layer."""
    w_uk, w_uv = (rows(*sizes, dtype=cache.dtype) / 8 for sizes in ((heads, nope, rank), (heads, rank, value)))
    vllm_standins.layers[name] = vllm_standins.Layer(cache, slots, w_uk, w_uv, 0.1)
    return slots


def layer_caches() -> dict[str, torch.Tensor]:
    """The caches of all layers that are known by a name."""
    caches = {name: layer.kv_cache for name, layer in vllm_standins.layers.items()}
    return {f"cache of {name}": c.view(E4M3) if c.dtype == torch.uint8 else c for name, c in caches.items()}


@contextmanager
def layers_known() -> Iterator[None]:
    """In it, layers are found by their names as within a forward pass of vLLM."""
    before = {name: sys.modules.get(name) for name in vllm_standins.modules}
    sys.modules.update(vllm_standins.modules)  # type: ignore[arg-type]
    vllm_standins.layers.clear()
    try:
        yield
    finally:
        vllm_standins.layers.clear()
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def norm_cast_first(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_cast_last(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def norm_divided(x, weight, eps):
    wide = x.float()
    return (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def norm_by_ir(x, weight, eps):
    return torch.ops.vllm_ir.rms_norm(x, weight, eps)


def norm_by_operator(x, weight, eps):
    result = torch.empty_like(x)
    torch.ops._C.rms_norm(result, x.contiguous(), weight, eps)
    return result


def norm_of_half(x, weight, eps):
    return torch.ops.vllm_ir.rms_norm(x, weight, eps, x.shape[-1] // 2)


def norm_over_tokens(x, weight, eps):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(0, keepdim=True) + eps)).to(x.dtype) * weight


def norm_gemma(x, weight, eps):
    return norm_cast_first(x, 1 + weight, eps)


def norm_other_rows(x, weight, eps):
    wide = x.float()
    return (x.flip(-1).float() * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


NORMS = [norm_cast_first, norm_cast_last, norm_divided, norm_by_ir, norm_by_operator]
NO_NORMS = [norm_of_half, norm_over_tokens, norm_gemma, norm_other_rows]


def quant_keepdim(x, group):
    groups = x.reshape(x.shape[0], -1, group).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (groups / scales).to(E4M3).view(x.shape), scales.squeeze(-1)


def quant_by_reciprocal(x, group):
    groups = x.reshape(x.shape[0], -1, group).float()
    scales = groups.abs().amax(-1).clamp(min=1e-10) / 448.0
    return (groups * (1 / scales)[..., None]).clamp(-448, 448).to(E4M3).view(x.shape), scales


def quant_over_amax(x, group):
    groups = x.reshape(x.shape[0], -1, group)
    amax = groups.abs().float().amax(dim=2).clamp(1e-10)
    return (groups * (448.0 / amax.unsqueeze(2))).to(E4M3).view(x.shape), amax / 448.0


def quant_ue8m0(x, group):
    groups = x.reshape(x.shape[0], -1, group).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    scales = torch.exp2(torch.ceil(torch.log2(scales)))
    return (groups / scales).clamp(-448, 448).to(E4M3).view(x.shape), scales.squeeze(-1)


def quant_columns_first(x, group):
    groups = x.reshape(x.shape[0], -1, group).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (groups / scales).to(E4M3).view(x.shape), scales.squeeze(-1).t().contiguous().t()


def quant_by_operator(x, group, ue8m0=False):
    x = x.contiguous()
    values = torch.empty_like(x, dtype=E4M3)
    scales = x.new_empty((x.shape[0], x.shape[1] // group), dtype=torch.float32)
    torch.ops._C.per_token_group_fp8_quant(x, values, scales, group, 1e-10, -448.0, 448.0, ue8m0, False, False)
    return values, scales


def quant_by_ir(x, group):
    return torch.ops.vllm_ir.dynamic_group_quant_fp8(x, [1, group], False, False, E4M3)


def quant_too_small(x, group):
    groups = x.reshape(x.shape[0], -1, group).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=0.5) / 448.0
    return (groups / scales).clamp(-448, 448).to(E4M3).view(x.shape), scales.squeeze(-1)


def quant_of_others(x, group):
    groups = x.reshape(x.shape[0], -1, group).float()
    scales = groups.flip(1).abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (groups / scales).clamp(-448, 448).to(E4M3).view(x.shape), scales.squeeze(-1)


def quant_of_maxima(x, group):
    groups = x.reshape(x.shape[0], -1, group).float()
    scales = groups.amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (groups / scales).clamp(-448, 448).to(E4M3).view(x.shape), scales.squeeze(-1)


QUANTS = [
    quant_keepdim,
    quant_by_reciprocal,
    quant_over_amax,
    quant_ue8m0,
    quant_columns_first,
    quant_by_operator,
    quant_by_ir,
]
NO_QUANTS = [quant_too_small, quant_of_others, quant_of_maxima]


def static_quant(x, scale):
    return (x.float() / scale).clamp(-448, 448).to(E4M3)


def static_quant_by_operator(x, scale):
    x = x.contiguous()
    values = torch.empty_like(x, dtype=E4M3)
    torch.ops._C.static_scaled_fp8_quant(values, x, scale)
    return values


def rope_backwards(x, table, positions):
    cos, sin = (part.unsqueeze(-2).to(x.dtype) for part in table[positions].chunk(2, dim=-1))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def rope_halves_swapped(x, table, positions):
    sin, cos = (part.unsqueeze(-2).to(x.dtype) for part in table[positions].chunk(2, dim=-1))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope_halves_to_neighbours(x, table, positions):
    """What no op does."""
    x = rope_dialects.vllm_neox(x, table, positions)
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def rope_heads_first(x, cos, sin):
    """Hugging Face: x [B, H, S, D], cosines for each element [B, S, D]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


ROPES = [*rope_dialects.NEOX, *rope_dialects.GPTJ, *rope_dialects.DEINTERLEAVED]
NO_ROPES = [rope_backwards, rope_halves_swapped, rope_halves_to_neighbours]
PRODUCTS = [
    "torch.bmm({rows}.transpose(0, 1), {weight}).transpose(0, 1).reshape({rows}.shape[0], -1)",
    "torch.matmul({rows}.transpose(0, 1), {weight}).transpose(0, 1).flatten(-2)",
    "torch.einsum('tnl,nlv->tnv', {rows}, {weight}).reshape({rows}.shape[0], -1)",
]
ABSORBED = [
    "torch.bmm({rows}.transpose(0, 1), {weight}).transpose(0, 1)",
    "torch.bmm({rows}.transpose(0, 1), {weight}).transpose(0, 1)",
    "torch.bmm({rows}.permute(1, 0, 2).contiguous(), {weight}).transpose(0, 1).contiguous()",
    "({rows}.transpose(0, 1) @ {weight}).transpose(0, 1)",
    "torch.einsum('thp,hpl->thl', {rows}, {weight})",
    "torch.einsum('hpl,thp->thl', {weight}, {rows})",
]
NO_ABSORBED = [
    "torch.bmm({rows}.transpose(0, 1), {weight}).flip(0).transpose(0, 1)",
    "torch.bmm({rows}.transpose(0, 1), {weight}).reshape({rows}.shape[0], {rows}.shape[1], -1)",
    "torch.bmm({rows}.flip(0).transpose(0, 1), {weight}).transpose(0, 1)",
    "torch.bmm({rows}.transpose(0, 1), {weight}).transpose(0, 1) * 2",
    "({rows}.unsqueeze(2) @ {weight}).squeeze(2)",
]
NO_PRODUCTS = [
    "torch.bmm({rows}.transpose(0, 1), {weight}).permute(1, 2, 0).reshape({rows}.shape[0], -1)",
    "torch.bmm({rows}.transpose(0, 1), {weight}).reshape({rows}.shape[0], -1)",
    "torch.bmm({rows}.transpose(0, 1), {weight}).flip(0).transpose(0, 1).reshape({rows}.shape[0], -1)",
]

_FUNCTIONS = [*NORMS, *NO_NORMS, *QUANTS, *NO_QUANTS, static_quant, static_quant_by_operator, *ROPES, *NO_ROPES]
_FUNCTIONS += [
    rope_dialects.first_columns,
    rope_dialects.last_columns_in_place,
    rope_heads_first,
    head_layer,
    latent_layer,
    rows,
    table_of,
    twins,
]
LIBRARY: dict[str, Any] = {"torch": torch, "E4M3": E4M3, **{each.__name__: each for each in _FUNCTIONS}}
"""What the text of a layer names."""
