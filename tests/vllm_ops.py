"""Operators with the names and schemas of vLLM's, without vLLM: norms, RoPE, caches and quantisation.

The schemas are those of vLLM 0.33: of its compiled library, and of ``vllm/ir/ops``, with ``static_quant_fp8`` and
``dynamic_group_quant_fp8`` of 0.23. The implementations are plain PyTorch, on any device. Importing this module
registers the operators. Those that find a layer by its name are in ``vllm_standins``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autofuse.ops.quant import QuantFormat

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

_libraries: dict[str, torch.library.Library] = {}


def define(namespace: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any] | None) -> None:
    """Registers an operator; without a fake it returns nothing."""
    library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::{name}", fake or (lambda *args, **kwargs: None), lib=library)


# ---- norms --------------------------------------------------------------------------------------------------------


def _ir_rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    wide = x.float()
    squares = wide[..., :variance_size] ** 2
    normed = (wide * torch.rsqrt(squares.mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    return normed if weight is None else normed * weight


def _rms_norm(result: torch.Tensor, input: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> None:
    result.copy_(_ir_rms_norm(input, weight, epsilon))


define(
    "vllm_ir",
    "rms_norm(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor",
    _ir_rms_norm,
    lambda x, weight, epsilon, variance_size=None: torch.empty_like(x),
)


def _ir_fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.float() + x_residual.float()
    return _ir_rms_norm(total, weight, epsilon, variance_size).to(x.dtype), total.to(x.dtype)


def _fused_add_rms_norm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> None:
    normed, total = _ir_fused_add_rms_norm(input, residual, weight, epsilon)
    input.copy_(normed)
    residual.copy_(total)


define(
    "vllm_ir",
    "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, SymInt? variance_size=None) "
    "-> (Tensor, Tensor)",
    _ir_fused_add_rms_norm,
    lambda x, x_residual, weight, epsilon, variance_size=None: (torch.empty_like(x), torch.empty_like(x)),
)
define(
    "_C",
    "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
    _fused_add_rms_norm,
    None,
)
define("_C", "rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()", _rms_norm, None)


# ---- RoPE ---------------------------------------------------------------------------------------------------------


def _rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    cos, sin = cos_sin_cache[positions].float().chunk(2, dim=-1)
    sin = -sin if inverse else sin
    size = 2 * cos.shape[-1]
    for tensor in (query, key):
        if tensor is None:
            continue
        heads = tensor.view(positions.numel(), -1, head_size)
        part = heads[..., rope_dim_offset : rope_dim_offset + size]
        x = part.float()
        a, b = x.chunk(2, dim=-1) if is_neox else (x[..., ::2], x[..., 1::2])
        turned = (a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None])
        part.copy_(torch.cat(turned, -1) if is_neox else torch.stack(turned, -1).flatten(-2))


define(
    "_C",
    "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, "
    "bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()",
    _rotary_embedding,
    None,
)


# ---- caches -------------------------------------------------------------------------------------------------------


def _stored(rows: torch.Tensor, cache: torch.Tensor, kv_cache_dtype: str, scale: torch.Tensor) -> torch.Tensor:
    """The rows as bytes of a cache: vLLM keeps fp8 caches as uint8."""
    if kv_cache_dtype == "auto":
        return rows.to(cache.dtype)
    return (rows.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)


def _write(cache: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Writes rows to [blocks, block_size, ...]; negative slots are of padded tokens."""
    kept = slot_mapping >= 0
    slots, size = slot_mapping[kept], cache.shape[1]
    target = cache if rows.dtype == cache.dtype else cache.view(torch.uint8)
    target[slots // size, slots % size] = rows[: slot_mapping.shape[0]][kept]


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    scale: torch.Tensor,
    skip_scale: bool = False,
) -> None:
    rows = torch.cat([kv_c, k_pe.reshape(kv_c.shape[0], -1)], dim=-1)
    scale = torch.ones_like(scale) if skip_scale else scale
    _write(kv_cache, _stored(rows, kv_cache, kv_cache_dtype, scale), slot_mapping)


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    for rows, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        per_head = scale if scale.numel() == 1 else scale.view(-1, 1)
        _write(cache, _stored(rows, cache, kv_cache_dtype, per_head), slot_mapping)


define(
    "_C_cache_ops",
    "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor! kv_cache, Tensor slot_mapping, str kv_cache_dtype, "
    "Tensor scale, bool skip_scale=False) -> ()",
    concat_and_cache_mla,
    None,
)
define(
    "_C_cache_ops",
    "reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, Tensor slot_mapping, "
    "str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()",
    reshape_and_cache_flash,
    None,
)


# ---- quantisation -------------------------------------------------------------------------------------------------


def per_token_group_fp8_quant(
    input: torch.Tensor,
    output_q: torch.Tensor,
    output_s: torch.Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
    dummy_is_scale_transposed: bool,
    dummy_is_tma_aligned: bool,
) -> None:
    groups = input.float().unflatten(-1, (-1, group_size))
    scales = groups.abs().amax(-1).clamp(min=eps) / fp8_max
    if scale_ue8m0:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    output_q.copy_((groups / scales[..., None]).clamp(fp8_min, fp8_max).flatten(-2).to(output_q.dtype))
    output_s.copy_(scales)


def static_scaled_fp8_quant(
    result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor, group_shape: list[int] | None = None
) -> None:
    if group_shape is not None:
        raise NotImplementedError("this stand-in tells a scale's groups from its shape: [1, 1] or [T, 1]")
    result.copy_((input.float() * (1 / scale)).clamp(-FP8_MAX, FP8_MAX).to(result.dtype))


def _dynamic_scaled_fp8_quant(result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor) -> None:
    scale.copy_((input.float().abs().max() / FP8_MAX).clamp(min=1 / (FP8_MAX * 512)))
    static_scaled_fp8_quant(result, input, scale)


def _ir_static_quant_fp8(
    x: torch.Tensor, scale: torch.Tensor, fp8_dtype: torch.dtype, num_token_padding: int | None = None
) -> torch.Tensor:
    result = torch.empty_like(x, dtype=fp8_dtype)
    static_scaled_fp8_quant(result, x, scale)
    padding = 0 if num_token_padding is None else max(num_token_padding - x.shape[0], 0)
    return torch.cat([result.view(torch.uint8), result.new_zeros((padding, x.shape[1]), dtype=torch.uint8)]).view(
        fp8_dtype
    )


def _ir_dynamic_group_quant_fp8(
    x: torch.Tensor,
    group_shape: list[int],
    column_major: bool,
    use_ue8m0: bool,
    fp8_dtype: torch.dtype,
    scale_alignment: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, columns = x.shape[0], x.shape[1] // group_shape[-1]
    strides = (1, -(-tokens // scale_alignment) * scale_alignment) if column_major else (columns, 1)
    values = torch.empty_like(x, dtype=fp8_dtype)
    scales = torch.empty_strided((tokens, columns), strides, dtype=torch.float32, device=x.device)
    per_token_group_fp8_quant(x, values, scales, group_shape[-1], 1e-10, -FP8_MAX, FP8_MAX, use_ue8m0, False, False)
    return values, scales


def scaled_fp4_quant(
    input: torch.Tensor, input_scale: torch.Tensor, is_sf_swizzled_layout: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not is_sf_swizzled_layout:
        raise NotImplementedError("this stand-in swizzles scales")
    values, scales = QuantFormat(16).quantise(input, input_scale)
    return values, scales.view(torch.int32)


def _scaled_fp4_quant_fake(
    input: torch.Tensor, input_scale: torch.Tensor, is_sf_swizzled_layout: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = input.shape
    columns = -(-width // 16)
    return (
        input.new_empty((rows, width // 2), dtype=torch.uint8),
        input.new_empty(((rows + 127) // 128 * 128, (columns + 3) // 4), dtype=torch.int32),
    )


def _scaled_fp4_quant_out(
    input: torch.Tensor,
    input_scale: torch.Tensor,
    is_sf_swizzled_layout: bool,
    *,
    output: torch.Tensor,
    output_scale: torch.Tensor,
) -> None:
    values, scales = scaled_fp4_quant(input, input_scale, is_sf_swizzled_layout)
    output.copy_(values)
    output_scale.copy_(scales)


define(
    "_C",
    "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
    per_token_group_fp8_quant,
    None,
)
define(
    "_C",
    "static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
    static_scaled_fp8_quant,
    None,
)
define(
    "_C",
    "dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale) -> ()",
    _dynamic_scaled_fp8_quant,
    None,
)
define(
    "vllm_ir",
    "static_quant_fp8(Tensor x, Tensor scale, ScalarType fp8_dtype, SymInt? num_token_padding=None) -> Tensor",
    _ir_static_quant_fp8,
    _ir_static_quant_fp8,
)
define(
    "vllm_ir",
    "dynamic_group_quant_fp8(Tensor x, SymInt[] group_shape, bool column_major, bool use_ue8m0, ScalarType fp8_dtype, "
    "SymInt scale_alignment=1) -> (Tensor, Tensor)",
    _ir_dynamic_group_quant_fp8,
    _ir_dynamic_group_quant_fp8,
)
define(
    "_C",
    "scaled_fp4_quant(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)",
    scaled_fp4_quant,
    _scaled_fp4_quant_fake,
)
define(
    "_C",
    "scaled_fp4_quant.out(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, Tensor(a!) output, "
    "Tensor(b!) output_scale) -> ()",
    _scaled_fp4_quant_out,
    None,
)
