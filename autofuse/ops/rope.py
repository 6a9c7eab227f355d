"""RoPE and writes to a KV cache in plain PyTorch, for the references of the ops that do them, and RoPE's styles."""

from __future__ import annotations

import torch

from autofuse.ops.problem import Problem

__all__ = [
    "E4M3_EPSILON",
    "E4M3_MAX",
    "E4M3_SMALLEST",
    "counted_from_start",
    "deinterleaves",
    "in_halves",
    "rotate",
    "scaled_to_fp8",
    "write_rows",
]

E4M3_MAX = 448.0
E4M3_EPSILON = 2.0**-3
E4M3_SMALLEST = 2.0**-9


def deinterleaves(problem: Problem) -> bool:
    """Whether neighbours come out as halves. Problems in which they do not have no such parameter."""
    return dict(problem.params).get("deinterleave", 0) == 1


def in_halves(problem: Problem) -> bool:
    """Whether rotated pairs are written half a row apart: a thread of a GPU then has two vectors of them."""
    return bool(problem["neox"]) or deinterleaves(problem)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool, deinterleave: bool = False
) -> torch.Tensor:
    """Rotates the first R elements of x [..., R or more] by R/2 angles; the others stay as they are.

    Su et al. 2021, "RoFormer". NeoX pairs element i with i + R/2, GPT-J even with odd neighbours. With ``deinterleave``
    neighbours become halves: the result has all even elements first, then all odd ones.
    """
    width = 2 * cos.shape[-1]
    x, behind = x[..., :width], x[..., width:]
    a, b = x.chunk(2, dim=-1) if is_neox else (x[..., ::2], x[..., 1::2])
    halves = a * cos - b * sin, b * cos + a * sin
    rotated = torch.cat(halves, dim=-1) if is_neox or deinterleave else torch.stack(halves, dim=-1).flatten(-2)
    return torch.cat([rotated, behind], dim=-1) if behind.shape[-1] else rotated


def scaled_to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x ÷ scale, saturated, as float8_e4m3fn: what vLLM stores."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def counted_from_start(slots: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """Slots of a cache [blocks, block_size, …], negative ones of which count from its end."""
    return torch.where(slots < 0, slots + cache.shape[0] * cache.shape[1], slots)


def write_rows(cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Writes row t into slot ``slots[t]`` of a paged cache [blocks, block_size, ...] of the same dtype."""
    if cache.dtype == torch.float8_e4m3fn:  # PyTorch has no index_put for fp8 everywhere; its bytes will do
        cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
    cache[slots // cache.shape[1], slots % cache.shape[1]] = rows
