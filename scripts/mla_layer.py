"""A decoder's MLA attention layer for decoding, in plain PyTorch: what vLLM computes, with the weights as arguments.

Multi-head latent attention (DeepSeek-V2 technical report, section 2.1) in its absorbed form: queries are taken to the
latent space (W_UK), attention runs there, over one latent vector a token, and its result is taken back (W_UV). The FP8
quantisation in groups before the output projection is done and undone: so the layer needs no FP8 matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

__all__ = [
    "DEEPSEEK_V3_TP8",
    "SMALL",
    "Inputs",
    "Weights",
    "Widths",
    "gemms",
    "mla_layer",
    "random_inputs",
    "random_weights",
]

EPS = 1e-6
FP8_MAX = 448.0
TABLE_ROWS = 4096  # of cos_sin_cache, at least


@dataclass(frozen=True)
class Widths:
    """Sizes of the layer, by the names of Hugging Face's configs; ``heads`` are those of one GPU.

    Attributes:
        block_size: rows of a block of the paged cache.
        group: elements that share a scale.
    """

    hidden: int
    heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    block_size: int = 64
    group: int = 128

    @property
    def latent(self) -> int:
        """Of a token in the cache."""
        return self.kv_lora_rank + self.qk_rope_head_dim


DEEPSEEK_V3_TP8 = Widths(7168, 16, 1536, 512, 128, 64, 128)
SMALL = Widths(512, 4, 192, 128, 64, 32, 128, block_size=16)


class Weights(NamedTuple):
    """Of one layer; projections as ``F.linear`` takes them, [out, in].

    Attributes:
        qkv_a: [q_lora_rank + kv_lora_rank + qk_rope_head_dim, hidden].
        q_norm: [q_lora_rank].
        kv_norm: [kv_lora_rank].
        q_b: [heads · (qk_nope_head_dim + qk_rope_head_dim), q_lora_rank].
        w_uk: [heads, qk_nope_head_dim, kv_lora_rank].
        w_uv: [heads, kv_lora_rank, v_head_dim].
        o_proj: [hidden, heads · v_head_dim].
    """

    qkv_a: torch.Tensor
    q_norm: torch.Tensor
    kv_norm: torch.Tensor
    q_b: torch.Tensor
    w_uk: torch.Tensor
    w_uv: torch.Tensor
    o_proj: torch.Tensor


class Inputs(NamedTuple):
    """Of one decoding step: T sequences, a token of each.

    Attributes:
        hidden: [T, hidden].
        positions: [T], int64.
        slot_mapping: [T], int64: block · block_size + row of each token in the cache.
        cos_sin_cache: [positions, qk_rope_head_dim]: cosines, then sines; the model's dtype.
        kv_cache: [blocks, block_size, kv_lora_rank + qk_rope_head_dim]; written in place.
        block_table: [T, blocks of a sequence], int64.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    cos_sin_cache: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor


def mla_layer(widths: Widths, weights: Any, inputs: Inputs, core: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's attention block, from its hidden states to what is added to them.

    Args:
        weights: Weights, or what has them as attributes.
        core: attend to the sequence. False leaves that out, to show the rest: the query stands for its result.

    Returns: [T, hidden], and the query [T, heads, kv_lora_rank + qk_rope_head_dim], parts of which nobody would compute
        if it went nowhere.
    """
    tokens = inputs.hidden.shape[0]
    rank, rope, nope = widths.kv_lora_rank, widths.qk_rope_head_dim, widths.qk_nope_head_dim
    q_c, kv_c, k_pe = F.linear(inputs.hidden, weights.qkv_a).split([widths.q_lora_rank, rank, rope], dim=-1)
    q = F.linear(rms_norm(q_c, weights.q_norm), weights.q_b).view(tokens, widths.heads, nope + rope)
    kv_c = rms_norm(kv_c, weights.kv_norm)
    q_nope, q_pe = q.split([nope, rope], dim=-1)
    ql_nope = torch.bmm(q_nope.transpose(0, 1), weights.w_uk).transpose(0, 1)

    cos, sin = inputs.cos_sin_cache[inputs.positions].float().chunk(2, dim=-1)
    q_pe = rotate(q_pe, cos[:, None], sin[:, None])
    k_pe = rotate(k_pe, cos, sin)
    slots, size = inputs.slot_mapping, widths.block_size
    inputs.kv_cache[slots // size, slots % size] = torch.cat([kv_c, k_pe], dim=-1)
    query = torch.cat([ql_nope, q_pe], dim=-1)

    latent = attend(query, inputs, (nope + rope) ** -0.5, rank) if core else query[..., :rank]
    values = torch.bmm(latent.transpose(0, 1), weights.w_uv).transpose(0, 1).reshape(tokens, -1)
    return F.linear(quantised_and_back(values, widths.group), weights.o_proj), query


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return wide.to(x.dtype) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of neighbouring elements (GPT-J style, as DeepSeek has it), in fp32."""
    a, b = x[..., ::2].float(), x[..., 1::2].float()
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def attend(query: torch.Tensor, inputs: Inputs, scale: float, rank: int) -> torch.Tensor:
    """[T, heads, kv_lora_rank]: attention in the latent space, over each sequence's blocks up to its position."""
    latents = inputs.kv_cache[inputs.block_table].flatten(1, 2)
    scores = torch.bmm(query, latents.transpose(1, 2)).float() * scale
    seen = torch.arange(latents.shape[1], device=query.device) <= inputs.positions[:, None]
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1).to(query.dtype)
    return torch.bmm(weights, latents[..., :rank])


def quantised_and_back(x: torch.Tensor, group: int) -> torch.Tensor:
    """x, each group of columns as FP8 values and a scale, and those multiplied again."""
    groups = x.view(x.shape[0], -1, group).float()
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / FP8_MAX
    values = (groups / scales).to(torch.float8_e4m3fn)
    return (values.float() * scales).to(x.dtype).view(x.shape)


def gemms(widths: Widths, weights: Any, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The layer's matrix products alone, but attention's: each of something of the right shape."""
    heads = widths.heads
    down = F.linear(inputs.hidden, weights.qkv_a)
    q = F.linear(down[:, : widths.q_lora_rank], weights.q_b).view(down.shape[0], heads, -1)
    latent = torch.bmm(q[..., : widths.qk_nope_head_dim].transpose(0, 1), weights.w_uk)
    out = F.linear(inputs.hidden[:, : heads * widths.v_head_dim], weights.o_proj)
    return torch.bmm(latent, weights.w_uv), out


def random_weights(widths: Widths, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Weights:
    """Weights that keep activations of size 1 at size 1."""

    def random(*shape: int, inner: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * inner**-0.5).to(dtype)

    heads, rank, nope = widths.heads, widths.kv_lora_rank, widths.qk_nope_head_dim
    values = heads * widths.v_head_dim
    return Weights(
        qkv_a=random(widths.q_lora_rank + widths.latent, widths.hidden, inner=widths.hidden),
        q_norm=(1 + 0.1 * torch.randn(widths.q_lora_rank, device=device, generator=generator)).to(dtype),
        kv_norm=(1 + 0.1 * torch.randn(rank, device=device, generator=generator)).to(dtype),
        q_b=random(heads * (nope + widths.qk_rope_head_dim), widths.q_lora_rank, inner=widths.q_lora_rank),
        w_uk=random(heads, nope, rank, inner=nope),
        w_uv=random(heads, rank, widths.v_head_dim, inner=rank),
        o_proj=random(widths.hidden, values, inner=values),
    )


def random_inputs(
    widths: Widths,
    tokens: int,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Inputs:
    """A step at which all T sequences have ``context`` tokens, the new one included, each in blocks of its own.

    ``context`` 0 is for the layer without attention: sequences of different lengths, in whose last block only the new
    token has a place.
    """
    size, rows = widths.block_size, max(context, TABLE_ROWS)
    blocks = max(-(-context // size), 1)
    table = torch.randperm(tokens * blocks, device=device, generator=generator).view(tokens, blocks)
    if context:
        positions = torch.full((tokens,), context - 1, device=device)
    else:
        positions = torch.randint(rows, (tokens,), device=device, generator=generator)
    powers = torch.arange(0, widths.qk_rope_head_dim, 2, device=device) / widths.qk_rope_head_dim
    angles = torch.arange(rows, device=device)[:, None] * 1e4**-powers
    return Inputs(
        hidden=torch.randn(tokens, widths.hidden, device=device, generator=generator).to(dtype),
        positions=positions,
        slot_mapping=table[:, -1] * size + positions % size,
        cos_sin_cache=torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype),
        kv_cache=torch.randn(tokens * blocks, size, widths.latent, device=device, generator=generator).to(dtype),
        block_table=table,
    )
