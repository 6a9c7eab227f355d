"""Layers of vLLM and the operators that find them by name, without vLLM: what its models look like to a graph pass.

The schemas are those of vLLM 0.33 (``vllm/model_executor/layers/attention``). Importing this module registers these
operators and those of ``vllm_ops``.

``layers`` is what attention ops find by their layer's name. ``modules`` are stand-ins for the modules of vLLM in which
a forward pass keeps it, for a test to put into ``sys.modules``.

With ``VLLM_USE_LAYERNAME=1`` names of layers are objects (``layer_name``), as vLLM has them by default from PyTorch
2.11 on; without it they are strings.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from vllm_ops import (
    FP8,
    FP8_MAX,
    concat_and_cache_mla,
    define,
    per_token_group_fp8_quant,
    reshape_and_cache_flash,
    scaled_fp4_quant,
    static_scaled_fp8_quant,
)


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
        concat_and_cache_mla(kv_c_normed, k_pe.squeeze(1), kv_cache, slot_mapping, kv_cache_dtype, k_scale, skip_scale)


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
        reshape_and_cache_flash(key, value, *caches, slot_mapping, self.kv_cache_dtype, *scales)


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


# ---- caches -------------------------------------------------------------------------------------------------------


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


define(
    "vllm",
    f"unified_mla_kv_cache_update(Tensor kv_c_normed, Tensor k_pe, {LAYER_TYPE} layer_name, str kv_cache_dtype, "
    "Tensor k_scale) -> Tensor",
    _unified_mla_kv_cache_update,
    lambda kv_c_normed, *args: kv_c_normed.new_empty(0),
)


define(
    "vllm",
    f"unified_kv_cache_update(Tensor key, Tensor value, {LAYER_TYPE} layer_name) -> Tensor",
    _unified_kv_cache_update,
    lambda key, *args: key.new_empty(0),
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
        static_scaled_fp8_quant(output, values, output_scale)
    elif output.dtype == FP8:
        assert output_scale is None
        assert values.shape[-1] // output_block_scale.shape[-1] == group_size
        assert ue8m0 is not None
        group = (group_size, 1e-10, -FP8_MAX, FP8_MAX, ue8m0, False, False)
        per_token_group_fp8_quant(values, output, output_block_scale, *group)
    else:
        assert output_scale is not None
        assert (output.dtype, output_block_scale.dtype) == (torch.uint8, FP8)
        packed, scales = scaled_fp4_quant(values, output_scale, True)
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


define(
    "vllm",
    "unified_mla_attention_with_output(Tensor q, Tensor kv_c_normed, Tensor k_pe, Tensor(a!) output, "
    f"{LAYER_TYPE} layer_name, Tensor? output_scale=None, Tensor(b!)? output_block_scale=None, "
    "Tensor? kv_cache_dummy_dep=None, SymInt? quant_group_size=None, bool? quant_scale_ue8m0=None, "
    "bool? quant_col_major=None, bool? quant_tma_aligned=None, Tensor? q_dcp_replicated=None) -> ()",
    _unified_mla_attention_with_output,
    None,
)
define(
    "vllm",
    "unified_attention_with_output(Tensor query, Tensor key, Tensor value, Tensor(a!) output, "
    f"{LAYER_TYPE} layer_name, Tensor? output_scale=None, Tensor(b!)? output_block_scale=None, "
    "Tensor? kv_cache_dummy_dep=None) -> ()",
    _unified_attention_with_output,
    None,
)
