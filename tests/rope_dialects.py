"""RoPE as different codebases write it: rows [T, H, D], a table [P, R] of cosines, then sines, and positions [T]."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812


def _halves(table, positions, dtype):
    cos, sin = table[positions].chunk(2, dim=-1)
    return cos.unsqueeze(-2).to(dtype), sin.unsqueeze(-2).to(dtype)


def _turned(a, b, cos, sin):
    return a * cos - b * sin, b * cos + a * sin


# ---- NeoX -----------------------------------------------------------------------------------------------------------


def vllm_neox(x, table, positions):
    """``ApplyRotaryEmb.forward_static``."""
    cos_sin = table.index_select(0, positions)
    cos, sin = (part.unsqueeze(-2).to(x.dtype) for part in cos_sin.chunk(2, dim=-1))
    x1, x2 = torch.chunk(x, 2, dim=-1)
    return torch.cat(_turned(x1, x2, cos, sin), dim=-1)


def vllm_neox_fp32(x, table, positions):
    """The same with ``enable_fp32_compute``."""
    cos, sin = (part.unsqueeze(-2) for part in table[positions].float().chunk(2, dim=-1))
    x1, x2 = torch.chunk(x.float(), 2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).to(x.dtype)


def hugging_face(x, table, positions):
    """``rotate_half``, with cosines for each element."""
    cos, sin = (torch.cat((part, part), dim=-1) for part in _halves(table, positions, x.dtype))
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def deepseek_scaling_neox(x, table, positions):
    """``DeepseekScalingRotaryEmbedding.forward_native``: its cosines have one dimension more than the rows."""
    cos, sin = table[positions].chunk(2, dim=-1)
    cos, sin = (part.repeat(1, 1, 2).unsqueeze(-2).to(x.dtype) for part in (cos, sin))
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).view(x.shape)


def embedding(x, table, positions):
    """Looked up by ``F.embedding``; sums the other way round."""
    cos, sin = (part[:, None].to(x.dtype) for part in F.embedding(positions, table).split(table.shape[1] // 2, dim=-1))
    x1, x2 = x.split(x.shape[-1] // 2, dim=-1)
    return torch.cat(((-x2) * sin + x1 * cos, x1 * sin + x2 * cos), dim=-1)


def assigned(x, table, positions):
    """Into the halves of a new tensor."""
    cos, sin = _halves(table, positions, x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    out, half = torch.empty_like(x), x.shape[-1] // 2
    out[..., :half], out[..., half:] = _turned(x1, x2, cos, sin)
    return out


NEOX = [vllm_neox, vllm_neox_fp32, hugging_face, deepseek_scaling_neox, embedding, assigned]


# ---- GPT-J ----------------------------------------------------------------------------------------------------------


def vllm_gptj(x, table, positions):
    cos, sin = _halves(table, positions, x.dtype)
    return torch.stack(_turned(x[..., ::2], x[..., 1::2], cos, sin), dim=-1).flatten(-2)


def hugging_face_gptj(x, table, positions):
    """As GLM's and Cohere's: ``rotate_half`` of neighbours."""
    cos, sin = (part.repeat_interleave(2, dim=-1) for part in _halves(table, positions, x.dtype))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def unbound(x, table, positions):
    cos, sin = _halves(table, positions, x.dtype)
    a, b = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack(_turned(a, b, cos, sin), dim=-1).view(x.shape)


def complex_numbers(x, table, positions):
    """As DeepSeek's and Llama's own code."""
    cos, sin = (part.float().contiguous() for part in _halves(table, positions, x.dtype))
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def assigned_gptj(x, table, positions):
    cos, sin = _halves(table, positions, x.dtype)
    out = torch.empty_like(x)
    out[..., ::2], out[..., 1::2] = _turned(x[..., ::2], x[..., 1::2], cos, sin)
    return out


def hugging_face_interleaved(x, table, positions):
    """``apply_rotary_pos_emb_interleave``, as DeepSeek-V3 and Kimi-K2 call it: neighbours in, halves out."""
    cos, sin = _halves(table, positions, x.dtype)
    return torch.cat(_turned(x[..., 0::2], x[..., 1::2], cos, sin), dim=-1)


def taken_apart_first(x, table, positions):
    """The same as earlier versions of transformers had it: ``rotate_half`` of what was de-interleaved."""
    apart = x.view(*x.shape[:-1], -1, 2).transpose(-1, -2).reshape(x.shape)
    return hugging_face(apart, table, positions)


DEINTERLEAVED = [hugging_face_interleaved, taken_apart_first]
GPTJ = [vllm_gptj, hugging_face_gptj, unbound, complex_numbers, assigned_gptj]


# ---- parts of rows --------------------------------------------------------------------------------------------------


def first_columns(dialect):
    """Partial rotary: ``cat((rope(x[..., :R]), x[..., R:]))``."""

    def rope(x, table, positions):
        size = table.shape[1]
        return torch.cat((dialect(x[..., :size], table, positions), x[..., size:]), dim=-1)

    return rope


def last_columns_in_place(dialect):
    """``x[..., -R:] = rope(x[..., -R:])``, as vLLM's MLA has it."""

    def rope(x, table, positions):
        x, size = x * 1, table.shape[1]
        x[..., -size:] = dialect(x[..., -size:], table, positions)
        return x * 1

    return rope
