"""What vLLM's operators find by the name of their layer: its cache, its slots, and what its attention can write.

vLLM's cache-update and attention operators are given a name, and look the rest up in the forward context when they
run. Nothing of vLLM is imported here: where it is not loaded there are no layers to find. Its modules, attributes and
methods are those of vLLM 0.33.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autofuse.ops.quant import NVFP4, STATIC

__all__ = [
    "OUTPUT_FORMATS",
    "HeadCache",
    "LeftToVllmError",
    "cache_kind",
    "head_cache_kinds",
    "head_caches",
    "latent_cache",
    "layer_name_type",
    "layer_text",
    "output_formats",
]

OUTPUT_FORMATS: Mapping[int, str] = {
    STATIC: "kFp8StaticTensorSym",
    NVFP4: "kNvfp4Dynamic",
    64: "kFp8Dynamic64Sym",
    128: "kFp8Dynamic128Sym",
}
"""``QuantFormat.group`` → vLLM's name of the format."""

_E4M3 = torch.float8_e4m3fn
_FP8 = ("fp8", "fp8_e4m3")
_OWN_DTYPE = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

_HEAD_WRITERS = (
    ("vllm.v1.attention.backends.flash_attn", "FlashAttentionImpl"),
    ("vllm.v1.attention.backends.triton_attn", "TritonAttentionImpl"),
    ("vllm.v1.attention.backends.flashinfer", "FlashInferImpl"),
    ("vllm.v1.attention.backends.flex_attention", "FlexAttentionImpl"),
)
"""Whose ``do_kv_cache_update`` is ``reshape_and_cache_flash``, unless one of these says otherwise:"""
_OTHERWISE = ("_is_per_token_head_quant", "is_kvcache_nvfp4", "nvfp4_fa2", "kv_sharing_target_layer_name")


class LeftToVllmError(Exception):
    """A kernel must not write a layer's cache. The message says why; "" where vLLM writes nothing either."""


@dataclass(frozen=True)
class HeadCache:
    """What the cache of a GQA or MHA layer holds.

    Attributes:
        dtype: what vLLM calls its dtype.
        per_head: whether each head has a scale.
    """

    dtype: str
    per_head: bool

    def kind(self, dtype: torch.dtype) -> str | None:
        """What ``rope_kv_cache`` calls it, for activations of a dtype; None if it writes none such."""
        kind = cache_kind(self.dtype, dtype)
        if kind == "fp8_ds_mla":
            return None
        return "fp8_per_head" if kind == "fp8" and self.per_head else kind


def layer_text(name: Any) -> str:
    """The name that a string, or vLLM's ``LayerName``, holds."""
    return str(getattr(name, "value", name))


def layer_name_type() -> str:
    """What schemas of vLLM's operators call the type of a layer's name: ``str``, or its class ``LayerName``."""
    module = sys.modules.get("vllm.utils.torch_utils")
    if getattr(module, "LayerNameType", str) is str:
        return "str"
    from torch._library.opaque_object import get_opaque_type_name

    return get_opaque_type_name(module.LayerNameType)  # type: ignore[union-attr]


def cache_kind(kv_cache_dtype: str, dtype: torch.dtype) -> str | None:
    """What ``mla_rope_kv_cache_cat`` calls a latent cache that vLLM calls so; None if it has none such.

    Args:
        dtype: of the activations.
    """
    if kv_cache_dtype in _OWN_DTYPE:
        return "auto" if _OWN_DTYPE[kv_cache_dtype] in (None, dtype) else None
    return "fp8" if kv_cache_dtype in _FP8 else "fp8_ds_mla" if kv_cache_dtype == "fp8_ds_mla" else None


def latent_cache(
    name: Any, kv_cache_dtype: str, k_scale: torch.Tensor, dtype: torch.dtype
) -> Mapping[str, torch.Tensor]:
    """The arguments of ``mla_rope_kv_cache_cat`` that an MLA layer has, by name.

    Raises LeftToVllmError where there is no slot mapping (a profiling run), no cache yet, or the layer does more than
    to put kv_c and k_pe into the rows of one cache.
    """
    layer, slots = _layer_and_slots(name)
    if not _writes_plainly(layer):
        raise LeftToVllmError(_own_way(layer))
    kind, cache = cache_kind(kv_cache_dtype, dtype), layer.kv_cache
    if kind is None or cache.dim() != 3:
        raise LeftToVllmError(f"it is {kv_cache_dtype} {cache.dtype} {list(cache.shape)}")
    found = {"slot_mapping": slots, "kv_cache": _as_written(cache, kind, dtype)}
    return {**found, "kv_scale": k_scale} if kind == "fp8" else found


def head_caches(name: Any, key: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """The arguments of ``rope_kv_cache`` that a GQA or MHA layer has, by name, for a key [T, KV, D].

    Raises LeftToVllmError where there is no slot mapping (a profiling run), no cache yet, or the layer does more than
    to put each head of key and value into a row of a paged cache.
    """
    layer, slots = _layer_and_slots(name)
    if not _writes_heads(layer):
        raise LeftToVllmError(_own_way(layer))
    kind, cache = _head_cache(layer).kind(key.dtype), layer.kv_cache
    if kind is None:
        raise LeftToVllmError(f"it is {layer.impl.kv_cache_dtype}")
    caches = _key_and_value(_as_written(cache, kind, key.dtype), *key.shape[1:])
    found = {"slot_mapping": slots, "k_cache": caches[0], "v_cache": caches[1]}
    if kind == "auto":
        return found
    scales = {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
    for scale in scales.values():
        if scale.device != cache.device or scale.dtype != torch.float32 or scale.numel() not in (1, key.shape[1]):
            raise LeftToVllmError(f"its scale is {scale.dtype} {list(scale.shape)} on {scale.device}")
    if kind == "fp8_per_head":
        scales = {name: scale.flatten() for name, scale in scales.items()}
    return {**found, **scales}


def head_cache_kinds() -> Mapping[str, HeadCache] | None:
    """Layer → its cache, for GQA and MHA layers that put each head of key and value into a row of a paged cache; None
    if no forward context is set.
    """
    context = _context()
    if context is None:
        return None
    return {name: _head_cache(layer) for name, layer in context.no_compile_layers.items() if _writes_heads(layer)}


def output_formats() -> Mapping[str, frozenset[int]] | None:
    """Layer → the formats (``QuantFormat.group``) that its attention can write; None if no forward context is set."""
    context = _context()
    keys = sys.modules.get("vllm.model_executor.layers.quantization.utils.quant_utils")
    if context is None or keys is None:
        return None
    known = {group: key for group, name in OUTPUT_FORMATS.items() if (key := getattr(keys, name, None)) is not None}
    found = {}
    for name, layer in context.no_compile_layers.items():
        supports = getattr(getattr(layer, "impl", None), "fused_output_quant_supported", None)
        if supports is not None:
            found[name] = frozenset(group for group, key in known.items() if supports(key))
    return found


def _context() -> Any:
    """The present forward pass's, None outside of one."""
    module = sys.modules.get("vllm.forward_context")
    is_set = getattr(module, "is_forward_context_available", None)
    return module.get_forward_context() if module is not None and is_set is not None and is_set() else None


def _layer_and_slots(name: Any) -> tuple[Any, torch.Tensor]:
    """Raises LeftToVllmError where nothing is written."""
    context, text = _context(), layer_text(name)
    layer = None if context is None else context.no_compile_layers.get(text)
    slots = None if context is None or isinstance(context.slot_mapping, list) else context.slot_mapping.get(text)
    cache = getattr(layer, "kv_cache", None)
    if slots is None or not isinstance(cache, torch.Tensor) or not cache.numel():
        raise LeftToVllmError
    if slots.dtype != torch.int64:
        raise LeftToVllmError(f"its slots are {slots.dtype}")
    return layer, slots if slots.dim() == 1 else slots.flatten()


def _own_way(layer: Any) -> str:
    return f"{type(getattr(layer, 'impl', layer)).__name__} writes it in a way of its own"


def _writer(layer: Any) -> Any:
    return getattr(type(getattr(layer, "impl", None)), "do_kv_cache_update", None)


def _writes_plainly(layer: Any) -> bool:
    """Whether vLLM would write by ``concat_and_cache_mla`` alone: no tokens of other ranks, no second cache."""
    backend = sys.modules.get("vllm.v1.attention.backend")
    plain = getattr(getattr(backend, "MLAAttentionImpl", None), "do_kv_cache_update", None)
    gathers = getattr(layer, "use_pcp", False) or getattr(layer, "hisparse_cache", None) is not None
    return plain is not None and _writer(layer) is plain and not gathers


def _writes_heads(layer: Any) -> bool:
    """Whether vLLM would write by ``reshape_and_cache_flash`` alone."""
    writer, impl = _writer(layer), getattr(layer, "impl", None)
    if writer is None or getattr(impl, "attn_type", "decoder") != "decoder":
        return False
    known = (getattr(sys.modules.get(module), name, None) for module, name in _HEAD_WRITERS)
    if not any(writer is getattr(each, "do_kv_cache_update", None) for each in known):
        return False
    return not any(getattr(impl, flag, None) for flag in _OTHERWISE)


def _head_cache(layer: Any) -> HeadCache:
    scales = [getattr(layer, name, None) for name in ("_k_scale", "_v_scale")]
    return HeadCache(layer.impl.kv_cache_dtype, any(scale is not None and scale.numel() > 1 for scale in scales))


def _as_written(cache: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """The cache as a kernel takes it: vLLM keeps bytes for fp8. Raises LeftToVllmError for another dtype."""
    if kind.startswith("fp8") and kind != "fp8_ds_mla" and cache.dtype == torch.uint8 and _fp8_dtype() == _E4M3:
        cache = cache.view(_E4M3)
    wanted = {"auto": dtype, "fp8_ds_mla": torch.uint8}.get(kind, _E4M3)
    if cache.dtype != wanted or cache.stride(-1) != 1:
        raise LeftToVllmError(f"it holds {cache.dtype}, not contiguous rows of {wanted}")
    return cache


def _fp8_dtype() -> torch.dtype:
    """What vLLM takes for fp8 on this machine's GPUs."""
    platform = getattr(sys.modules.get("vllm.platforms"), "current_platform", None)
    return _E4M3 if platform is None else platform.fp8_dtype()


def _key_and_value(cache: torch.Tensor, heads: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's cache as two [blocks, block_size, heads, width].

    vLLM has them side by side, [blocks, heads, block_size, 2 · width], since 0.26; before that [2, blocks, block_size,
    heads, width] or [blocks, 2, …], by backend. Raises LeftToVllmError for others.
    """
    sizes = cache.shape
    if len(sizes) == 4 and (sizes[1], sizes[3]) == (heads, 2 * width):
        rows = cache.transpose(1, 2)
        return rows[..., :width], rows[..., width:]
    pairs = [dim for dim in (0, 1) if sizes[dim] == 2] if len(sizes) == 5 else []
    if len(pairs) == 1 and tuple(sizes[3:]) == (heads, width):
        return cache.select(pairs[0], 0), cache.select(pairs[0], 1)
    raise LeftToVllmError(f"it is {list(sizes)}, the key has {heads} heads of {width}")
