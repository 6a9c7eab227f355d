"""Attention layers up to their caches, as different codebases write them, with tiny widths."""

from __future__ import annotations

import torch
import vllm_standins  # noqa: F401  (registers vLLM's operators)
from rope_dialects import hugging_face, hugging_face_interleaved, vllm_gptj, vllm_neox
from torch import nn

HIDDEN, H, KV, D, P = 64, 4, 2, 16, 64
LATENT, ROPE, NOPE = 64, 16, 32
BLOCKS, BLOCK = 4, 8
T = 6  # tokens, where it does not matter how many


def _parameter(*sizes, dtype):
    return nn.Parameter(0.125 * torch.randn(*sizes, dtype=dtype), requires_grad=False)


class Gqa(nn.Module):
    """Projections, RoPE of q and k, and what ``write`` does with k and v; returns q and what the caches hold.

    Args:
        dialect: how the rows are rotated.
        write: (k_cache, v_cache, slots, k, v) → None, or None for no cache.
    """

    def __init__(self, dialect=vllm_neox, write=None, dtype=torch.bfloat16, rope=D, kv=KV) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dialect, self.write, self.kv = dialect, write, kv
        self.qkv = _parameter(HIDDEN, (H + 2 * kv) * D, dtype=dtype)
        self.table = nn.Parameter(torch.randn(P, rope).to(dtype), requires_grad=False)

    def forward(self, x, positions, *cache):
        q, k, v = (x @ self.qkv).split([H * D, self.kv * D, self.kv * D], dim=-1)
        q, k, v = q.view(-1, H, D), k.view(-1, self.kv, D), v.view(-1, self.kv, D)
        q, k = (self.dialect(rows, self.table, positions) for rows in (q, k))
        if self.write is None:
            return q * 2, k * 2
        self.write(*cache, k, v)
        return q * 2, cache[0] * 2, cache[1] * 2


class GqaOperators(Gqa):
    """The same with vLLM's operators."""

    def forward(self, x, positions, k_cache, v_cache, slots):
        one = torch.ones(1, device=x.device)
        q, k, v = (x @ self.qkv).split([H * D, self.kv * D, self.kv * D], dim=-1)
        torch.ops._C.rotary_embedding(positions, q, k, D, self.table, True)
        q, k, v = q.view(-1, H, D), k.view(-1, self.kv, D), v.view(-1, self.kv, D)
        torch.ops._C_cache_ops.reshape_and_cache_flash(k, v, k_cache, v_cache, slots, "auto", one, one)
        return q * 2, k_cache * 2, v_cache * 2


def flat(k_cache, v_cache, slots, k, v):
    for cache, rows in ((k_cache, k), (v_cache, v)):
        cache.view(-1, *rows.shape[1:])[slots] = rows


def by_block(k_cache, v_cache, slots, k, v):
    for cache, rows in ((k_cache, k), (v_cache, v)):
        cache[slots // BLOCK, slots % BLOCK] = rows


def by_head(k_cache, v_cache, slots, k, v):
    """Into caches [blocks, heads, block, size] (HND)."""
    for cache, rows in ((k_cache, k), (v_cache, v)):
        cache.transpose(1, 2)[slots // BLOCK, slots % BLOCK] = rows


def operator(k_cache, v_cache, slots, k, v):
    one = torch.ones(1, device=k.device)
    torch.ops._C_cache_ops.reshape_and_cache_flash(k, v, k_cache, v_cache, slots, "auto", one, one)


def paged(tokens, heads=KV, size=D, dtype=torch.bfloat16, order="NHD"):
    """(k_cache, v_cache, slots)"""
    torch.manual_seed(1)
    sizes = (BLOCKS, BLOCK, heads, size) if order == "NHD" else (BLOCKS, heads, BLOCK, size)
    return torch.randn(sizes, dtype=dtype), torch.randn(sizes, dtype=dtype), torch.randperm(BLOCKS * BLOCK)[:tokens]


class Mla(nn.Module):
    """An MLA layer up to its attention: the query [T, H, NOPE or LATENT, and ROPE], and the latent cache.

    Args:
        rotate: (q [T, H, NOPE + ROPE], k_pe [T, 1, ROPE], table, positions) → both rotated, perhaps in place.
        absorbed: the query is multiplied by W_UK, and put together again.
        write: (cache, slots, kv_c, k_pe) → None.
    """

    def __init__(self, rotate, write, absorbed=True, dtype=torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rotate, self.write, self.absorbed = rotate, write, absorbed
        self.w_q = _parameter(HIDDEN, H * (NOPE + ROPE), dtype=dtype)
        self.w_kv = _parameter(HIDDEN, LATENT + ROPE, dtype=dtype)
        self.w_uk = _parameter(H, NOPE, LATENT, dtype=dtype)
        self.table = nn.Parameter(torch.randn(P, ROPE).to(dtype), requires_grad=False)

    def forward(self, x, positions, cache, slots):
        q = (x @ self.w_q).view(-1, H, NOPE + ROPE)
        kv_c, k_pe = (x @ self.w_kv).split([LATENT, ROPE], dim=-1)
        q, k_pe = self.rotate(q, k_pe.unsqueeze(1), self.table, positions)
        self.write(cache, slots, kv_c * 2, k_pe)
        if self.absorbed:
            nope = torch.bmm(q[..., :NOPE].transpose(0, 1), self.w_uk).transpose(0, 1)
            q = torch.cat([nope, q[..., NOPE:]], dim=-1)
        return q * 2, cache * 2


def rotate_by_operator(q, k_pe, table, positions):
    torch.ops._C.rotary_embedding(positions, q[..., NOPE:], k_pe, ROPE, table, False)
    return q, k_pe


def rotate_by_cat(dialect):
    def rotate(q, k_pe, table, positions):
        q_pe = dialect(q[..., NOPE:], table, positions)
        return torch.cat([q[..., :NOPE], q_pe], dim=-1), dialect(k_pe, table, positions)

    return rotate


def rotate_in_place(dialect):
    def rotate(q, k_pe, table, positions):
        q[..., NOPE:] = dialect(q[..., NOPE:], table, positions)
        return q, dialect(k_pe, table, positions)

    return rotate


MLA_ROTATIONS = {
    "operator": rotate_by_operator,
    "cat": rotate_by_cat(vllm_gptj),
    "in place": rotate_in_place(vllm_gptj),
    "NeoX": rotate_by_cat(hugging_face),
    "halves out": rotate_by_cat(hugging_face_interleaved),
    "halves out in place": rotate_in_place(hugging_face_interleaved),
}
"""Name → ``rotate`` of an MLA layer."""


def mla_operator(cache, slots, kv_c, k_pe):
    one = torch.ones(1, device=kv_c.device)
    torch.ops._C_cache_ops.concat_and_cache_mla(kv_c, k_pe.squeeze(1), cache, slots, "auto", one)


def mla_flat(cache, slots, kv_c, k_pe):
    cache.view(-1, LATENT + ROPE)[slots] = torch.cat([kv_c, k_pe.squeeze(1)], dim=-1)


def latents(tokens, dtype=torch.bfloat16):
    """(cache, slots)"""
    torch.manual_seed(1)
    return torch.randn(BLOCKS, BLOCK, LATENT + ROPE, dtype=dtype), torch.randperm(BLOCKS * BLOCK)[:tokens]


def hidden(*sizes, dtype=torch.bfloat16):
    """What a layer is called with besides its cache: x [*sizes, HIDDEN] and positions, of T tokens unless given."""
    torch.manual_seed(2)
    sizes = sizes or (T,)
    return torch.randn(*sizes, HIDDEN, dtype=dtype), torch.randint(0, P, sizes)
