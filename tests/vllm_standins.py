"""Ops with the names and schemas of vLLM's, without vLLM: what its models look like to a graph pass.

The schemas are those of vLLM 0.33: of its compiled library, and of ``vllm/ir/ops`` and
``vllm/model_executor/layers/attention``, with ``static_quant_fp8`` and ``dynamic_group_quant_fp8`` of
0.23. The implementations are plain PyTorch, on any device. Importing this module registers the ops.

``layers`` is what attention ops find by their layer's name. ``modules`` are stand-ins for the modules of vLLM in which
a forward pass keeps it, for a test to put into ``sys.modules``.

With ``VLLM_USE_LAYERNAME=1`` names of layers are objects (``layer_name``), as vLLM has them by default from PyTorch
2.11 on; without it they are strings.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from autofuse.ops.quant import QuantFormat

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class MLAAttentionImpl:
    """What a layer's attention backend does: writes its cache, and says what it can quantise."""

    supported = ("kFp8StaticTensorSym", "kNvfp4Dynamic", "kFp8Dynamic128Sym", "kFp8Dynamic64Sym")

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        return quant_key in self.supported

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        skip_scale: bool = False,
    ) -> None:
        _concat_and_cache_mla(kv_c_normed, k_pe.squeeze(1), kv_cache, slot_mapping, kv_cache_dtype, k_scale, skip_scale)


@dataclass
class Layer:
    """What an MLA layer's ops find by its name.

    Attributes:
        kv_cache: [blocks, block_size, kv_lora_rank + qk_rope_head_dim].
        slot_mapping: [T], int64; None where nothing is written.
        w_uk: [heads, qk_nope_head_dim, kv_lora_rank].
        w_uv: [heads, kv_lora_rank, v_head_dim].
        scale: of the attention's scores.
        updates: how often vLLM's own operator has been asked to write the cache.
    """

    kv_cache: torch.Tensor
    slot_mapping: torch.Tensor | None
    w_uk: torch.Tensor
    w_uv: torch.Tensor
    scale: float
    impl: MLAAttentionImpl = field(default_factory=MLAAttentionImpl)
    use_pcp: bool = False
    hisparse_cache: None = None
    updates: int = 0


class FlashAttentionImpl:
    """A GQA layer's attention backend.

    Attributes:
        pairs: the dimension of the cache that tells key from value, as vLLM had it up to 0.25; None if these are side
            by side in its rows.
    """

    def __init__(self, kv_cache_dtype: str = "auto", pairs: int | None = None) -> None:
        self.kv_cache_dtype = kv_cache_dtype
        self.pairs = pairs
        self.attn_type = "decoder"
        self.kv_sharing_target_layer_name: str | None = None

    def key_and_value(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Two [blocks, block_size, heads, size]."""
        return kv_cache.transpose(1, 2).chunk(2, dim=-1) if self.pairs is None else kv_cache.unbind(self.pairs)

    def do_kv_cache_update(
        self,
        layer: HeadLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        caches = self.key_and_value(kv_cache)
        scales = (layer._k_scale, layer._v_scale)
        _reshape_and_cache_flash(key, value, *caches, slot_mapping, self.kv_cache_dtype, *scales)


class TritonAttentionImpl(FlashAttentionImpl):
    """Another backend, which writes by a method of its own."""

    _is_per_token_head_quant = False

    def do_kv_cache_update(self, layer: HeadLayer, *args: torch.Tensor) -> None:
        super().do_kv_cache_update(layer, *args)


@dataclass
class HeadLayer:
    """What a GQA layer's ops find by its name.

    Attributes:
        kv_cache: [blocks, heads, block_size, 2 · size], or as its backend has it.
        slot_mapping: [T], int64; None where nothing is written.
        scale: of the attention's scores.
        _k_scale, _v_scale: of an fp8 cache, one value or [heads].
        updates: how often vLLM's own operator has been asked to write the cache.
    """

    kv_cache: torch.Tensor
    slot_mapping: torch.Tensor | None
    impl: FlashAttentionImpl = field(default_factory=FlashAttentionImpl)
    scale: float = 0.1
    _k_scale: torch.Tensor = field(default_factory=lambda: torch.ones(()))
    _v_scale: torch.Tensor = field(default_factory=lambda: torch.ones(()))
    updates: int = 0


layers: dict[str, Any] = {}
_libraries: dict[str, torch.library.Library] = {}


def _forward_context() -> SimpleNamespace:
    slots = {name: each.slot_mapping for name, each in layers.items() if each.slot_mapping is not None}
    return SimpleNamespace(no_compile_layers=layers, slot_mapping=slots, attn_metadata=None)


modules = {
    "vllm.forward_context": SimpleNamespace(
        get_forward_context=_forward_context, is_forward_context_available=lambda: True
    ),
    "vllm.v1.attention.backend": SimpleNamespace(MLAAttentionImpl=MLAAttentionImpl),
    "vllm.v1.attention.backends.flash_attn": SimpleNamespace(FlashAttentionImpl=FlashAttentionImpl),
    "vllm.v1.attention.backends.triton_attn": SimpleNamespace(TritonAttentionImpl=TritonAttentionImpl),
    "vllm.model_executor.layers.quantization.utils.quant_utils": SimpleNamespace(
        **{name: name for name in MLAAttentionImpl.supported}
    ),
}

if os.environ.get("VLLM_USE_LAYERNAME") == "1":
    from torch._library.opaque_object import register_opaque_type
    from torch._opaque_base import OpaqueBase

    class LayerName(OpaqueBase):
        """A layer's name that ``torch.compile`` takes for an input of the graph, not for a constant."""

        def __init__(self, value: str) -> None:
            self.value = value

        def __eq__(self, other: object) -> bool:
            return isinstance(other, LayerName) and self.value == other.value

        def __hash__(self) -> int:
            return hash(self.value)

        def __fx_repr__(self) -> tuple[str, dict[str, type]]:
            return f"LayerName({self.value!r})", {"LayerName": LayerName}

    register_opaque_type(LayerName, typ="value", hoist=True)
    layer_name: Any = LayerName
    LAYER_TYPE = f"{LayerName.__module__}.LayerName"
else:
    layer_name = str
    LAYER_TYPE = "str"

modules["vllm.utils.torch_utils"] = SimpleNamespace(LayerNameType=layer_name)


def _layer(name: Any) -> Any:
    return layers[getattr(name, "value", name)]


def _define(namespace: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any] | None) -> None:
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


_define(
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


_define(
    "vllm_ir",
    "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, SymInt? variance_size=None) "
    "-> (Tensor, Tensor)",
    _ir_fused_add_rms_norm,
    lambda x, x_residual, weight, epsilon, variance_size=None: (torch.empty_like(x), torch.empty_like(x)),
)
_define(
    "_C",
    "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
    _fused_add_rms_norm,
    None,
)
_define("_C", "rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()", _rms_norm, None)


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


_define(
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


def _concat_and_cache_mla(
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


def _reshape_and_cache_flash(
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


def _unified_mla_kv_cache_update(
    kv_c_normed: torch.Tensor, k_pe: torch.Tensor, layer_name: Any, kv_cache_dtype: str, k_scale: torch.Tensor
) -> torch.Tensor:
    layer = _layer(layer_name)
    layer.updates += 1
    if layer.slot_mapping is not None:
        layer.impl.do_kv_cache_update(
            kv_c_normed, k_pe, layer.kv_cache, layer.slot_mapping, kv_cache_dtype, k_scale, False
        )
    return kv_c_normed.new_empty(0)


def _unified_kv_cache_update(key: torch.Tensor, value: torch.Tensor, layer_name: Any) -> torch.Tensor:
    layer = _layer(layer_name)
    layer.updates += 1
    if layer.slot_mapping is not None:
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, layer.slot_mapping)
    return key.new_empty(0)


_define(
    "_C_cache_ops",
    "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor! kv_cache, Tensor slot_mapping, str kv_cache_dtype, "
    "Tensor scale, bool skip_scale=False) -> ()",
    _concat_and_cache_mla,
    None,
)
_define(
    "_C_cache_ops",
    "reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, Tensor slot_mapping, "
    "str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()",
    _reshape_and_cache_flash,
    None,
)
_define(
    "vllm",
    f"unified_mla_kv_cache_update(Tensor kv_c_normed, Tensor k_pe, {LAYER_TYPE} layer_name, str kv_cache_dtype, "
    "Tensor k_scale) -> Tensor",
    _unified_mla_kv_cache_update,
    lambda kv_c_normed, *args: kv_c_normed.new_empty(0),
)


_define(
    "vllm",
    f"unified_kv_cache_update(Tensor key, Tensor value, {LAYER_TYPE} layer_name) -> Tensor",
    _unified_kv_cache_update,
    lambda key, *args: key.new_empty(0),
)


# ---- quantisation -------------------------------------------------------------------------------------------------


def _per_token_group_fp8_quant(
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


def _static_scaled_fp8_quant(
    result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor, group_shape: list[int] | None = None
) -> None:
    if group_shape is not None:
        raise NotImplementedError("this stand-in tells a scale's groups from its shape: [1, 1] or [T, 1]")
    result.copy_((input.float() * (1 / scale)).clamp(-FP8_MAX, FP8_MAX).to(result.dtype))


def _dynamic_scaled_fp8_quant(result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor) -> None:
    scale.copy_((input.float().abs().max() / FP8_MAX).clamp(min=1 / (FP8_MAX * 512)))
    _static_scaled_fp8_quant(result, input, scale)


def _ir_static_quant_fp8(
    x: torch.Tensor, scale: torch.Tensor, fp8_dtype: torch.dtype, num_token_padding: int | None = None
) -> torch.Tensor:
    result = torch.empty_like(x, dtype=fp8_dtype)
    _static_scaled_fp8_quant(result, x, scale)
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
    _per_token_group_fp8_quant(x, values, scales, group_shape[-1], 1e-10, -FP8_MAX, FP8_MAX, use_ue8m0, False, False)
    return values, scales


def _scaled_fp4_quant(
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
    values, scales = _scaled_fp4_quant(input, input_scale, is_sf_swizzled_layout)
    output.copy_(values)
    output_scale.copy_(scales)


_define(
    "_C",
    "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
    _per_token_group_fp8_quant,
    None,
)
_define(
    "_C",
    "static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
    _static_scaled_fp8_quant,
    None,
)
_define(
    "_C",
    "dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale) -> ()",
    _dynamic_scaled_fp8_quant,
    None,
)
_define(
    "vllm_ir",
    "static_quant_fp8(Tensor x, Tensor scale, ScalarType fp8_dtype, SymInt? num_token_padding=None) -> Tensor",
    _ir_static_quant_fp8,
    _ir_static_quant_fp8,
)
_define(
    "vllm_ir",
    "dynamic_group_quant_fp8(Tensor x, SymInt[] group_shape, bool column_major, bool use_ue8m0, ScalarType fp8_dtype, "
    "SymInt scale_alignment=1) -> (Tensor, Tensor)",
    _ir_dynamic_group_quant_fp8,
    _ir_dynamic_group_quant_fp8,
)
_define(
    "_C",
    "scaled_fp4_quant(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)",
    _scaled_fp4_quant,
    _scaled_fp4_quant_fake,
)
_define(
    "_C",
    "scaled_fp4_quant.out(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, Tensor(a!) output, "
    "Tensor(b!) output_scale) -> ()",
    _scaled_fp4_quant_out,
    None,
)


# ---- attention ----------------------------------------------------------------------------------------------------


def _quantise_into(
    values: torch.Tensor,
    output: torch.Tensor,
    output_scale: torch.Tensor | None,
    output_block_scale: torch.Tensor | None,
    ue8m0: bool | None,
    group_size: int | None,
) -> None:
    """Values [T, width] as ``output`` and its scales take them: what format that is, dtypes and shapes say."""
    if output_block_scale is None:
        assert output_scale is not None
        assert output.dtype == FP8
        _static_scaled_fp8_quant(output, values, output_scale)
    elif output.dtype == FP8:
        assert output_scale is None
        assert values.shape[-1] // output_block_scale.shape[-1] == group_size
        assert ue8m0 is not None
        group = (group_size, 1e-10, -FP8_MAX, FP8_MAX, ue8m0, False, False)
        _per_token_group_fp8_quant(values, output, output_block_scale, *group)
    else:
        assert output_scale is not None
        assert (output.dtype, output_block_scale.dtype) == (torch.uint8, FP8)
        packed, scales = _scaled_fp4_quant(values, output_scale, True)
        output.copy_(packed)
        output_block_scale[: scales.shape[0]].copy_(scales.view(FP8))


def _attention(q: torch.Tensor, layer: Layer) -> torch.Tensor:
    """One sequence, whose last tokens are the call's: each attends to what is in the cache up to itself."""
    _, nope, rank = layer.w_uk.shape
    cache = layer.kv_cache.flatten(0, 1).to(q.dtype)
    tokens = q.shape[0]
    query = torch.cat([torch.einsum("tnp,npl->tnl", q[..., :nope], layer.w_uk), q[..., nope:]], dim=-1)
    scores = torch.einsum("tnd,cd->tnc", query, cache).float() * layer.scale
    last = tokens if layer.slot_mapping is None else int(layer.slot_mapping.max()) + 1
    seen = (
        torch.arange(cache.shape[0], device=q.device) <= last - tokens + torch.arange(tokens, device=q.device)[:, None]
    )
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1).to(q.dtype)
    latent = torch.einsum("tnc,cl->tnl", weights, cache[:, :rank])
    return torch.einsum("tnl,nlv->tnv", latent, layer.w_uv)


def _unified_mla_attention_with_output(
    q: torch.Tensor,
    kv_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    output: torch.Tensor,
    layer_name: Any,
    output_scale: torch.Tensor | None = None,
    output_block_scale: torch.Tensor | None = None,
    kv_cache_dummy_dep: torch.Tensor | None = None,
    quant_group_size: int | None = None,
    quant_scale_ue8m0: bool | None = None,
    quant_col_major: bool | None = None,
    quant_tma_aligned: bool | None = None,
    q_dcp_replicated: torch.Tensor | None = None,
) -> None:
    values = _attention(q, _layer(layer_name)).flatten(1)
    if output_scale is None and output_block_scale is None:
        output.copy_(values)
    else:
        _quantise_into(values, output, output_scale, output_block_scale, quant_scale_ue8m0, quant_group_size)


def _attention_to_cache(query: torch.Tensor, layer: HeadLayer) -> torch.Tensor:
    """To all slots, written or not: what counts is what the cache holds when attention runs."""
    keys, values = (
        (cache.view(FP8) if cache.dtype == torch.uint8 else cache).flatten(0, 1).to(query.dtype)
        for cache in layer.impl.key_and_value(layer.kv_cache)
    )
    times = query.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(times, dim=1) for each in (keys, values))
    scores = torch.einsum("thd,chd->thc", query, keys).float() * layer.scale
    return torch.einsum("thc,chd->thd", scores.softmax(-1).to(query.dtype), values)


def _unified_attention_with_output(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    layer_name: Any,
    output_scale: torch.Tensor | None = None,
    output_block_scale: torch.Tensor | None = None,
    kv_cache_dummy_dep: torch.Tensor | None = None,
) -> None:
    """Of [T, heads, size]: each token attends to the layer's cache, or, where there is none, to the tokens of the call
    up to itself.
    """
    layer = layers.get(getattr(layer_name, "value", layer_name))
    if isinstance(layer, HeadLayer) and layer.slot_mapping is not None:
        values = _attention_to_cache(query, layer)
    else:
        values = torch.nn.functional.scaled_dot_product_attention(
            *(each.transpose(0, 1) for each in (query, key, value)), is_causal=True, enable_gqa=True
        ).transpose(0, 1)
    if output_scale is None and output_block_scale is None:
        output.copy_(values)
    else:
        flat = output.view(output.shape[0], -1)
        _quantise_into(values.flatten(1), flat, output_scale, output_block_scale, None, None)


_define(
    "vllm",
    "unified_mla_attention_with_output(Tensor q, Tensor kv_c_normed, Tensor k_pe, Tensor(a!) output, "
    f"{LAYER_TYPE} layer_name, Tensor? output_scale=None, Tensor(b!)? output_block_scale=None, "
    "Tensor? kv_cache_dummy_dep=None, SymInt? quant_group_size=None, bool? quant_scale_ue8m0=None, "
    "bool? quant_col_major=None, bool? quant_tma_aligned=None, Tensor? q_dcp_replicated=None) -> ()",
    _unified_mla_attention_with_output,
    None,
)
_define(
    "vllm",
    "unified_attention_with_output(Tensor query, Tensor key, Tensor value, Tensor(a!) output, "
    f"{LAYER_TYPE} layer_name, Tensor? output_scale=None, Tensor(b!)? output_block_scale=None, "
    "Tensor? kv_cache_dummy_dep=None) -> ()",
    _unified_attention_with_output,
    None,
)
