"""What vLLM's operators find by the name of their layer: its cache, its slots, and what its attention can write.

vLLM's cache-update and attention operators are given a name, and look the rest up in the forward context when they
run. Nothing of vLLM is imported here: where it is not loaded there are no layers to find. Its modules, attributes and
methods are those of vLLM 0.33.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from autofuse.ops.quant import NVFP4, STATIC

__all__ = ["OUTPUT_FORMATS", "cache_kind", "latent_cache", "layer_name_type", "layer_text", "output_formats"]

OUTPUT_FORMATS: Mapping[int, str] = {
    STATIC: "kFp8StaticTensorSym",
    NVFP4: "kNvfp4Dynamic",
    64: "kFp8Dynamic64Sym",
    128: "kFp8Dynamic128Sym",
}
"""``QuantFormat.group`` → vLLM's name of the format."""

_FP8 = ("fp8", "fp8_e4m3")
_OWN_DTYPE = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def latent_cache(name: Any, kv_cache_dtype: str, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(the latent cache of an MLA layer, as ``mla_rope_kv_cache_cat`` takes it; its slots)

    Both are None where a kernel must not write for vLLM: there is no slot mapping (a profiling run), no cache yet, or
    the layer does more than to put kv_c and k_pe into the rows of one cache.
    """
    context = _context()
    layer = None if context is None else context.no_compile_layers.get(layer_text(name))
    slots = None if context is None else context.slot_mapping.get(layer_text(name))
    if layer is None or slots is None or not _writes_plainly(layer):
        return None, None
    cache = layer.kv_cache
    kind = cache_kind(kv_cache_dtype, dtype)
    if kind is None or cache.dim() != 3 or not cache.numel():
        return None, None
    if kind == "fp8" and cache.dtype == torch.uint8:
        cache = cache.view(torch.float8_e4m3fn)
    wanted = {"auto": dtype, "fp8": torch.float8_e4m3fn, "fp8_ds_mla": torch.uint8}[kind]
    return (cache, slots.flatten()) if cache.dtype == wanted else (None, None)


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


def _writes_plainly(layer: Any) -> bool:
    """Whether vLLM would write by ``concat_and_cache_mla`` alone: no tokens of other ranks, no second cache."""
    backend = sys.modules.get("vllm.v1.attention.backend")
    plain = getattr(getattr(backend, "MLAAttentionImpl", None), "do_kv_cache_update", None)
    own = getattr(type(getattr(layer, "impl", None)), "do_kv_cache_update", None)
    gathers = getattr(layer, "use_pcp", False) or getattr(layer, "hisparse_cache", None) is not None
    return own is not None and own is plain and not gathers
