"""Fused operators that find a layer's cache by its name, as vLLM's own do, and then call the op that has a kernel.

They are no ``FusedOp``: they have no problem, no search space and no kernel of their own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from autofuse.ops import get_op
from autofuse.runtime.vllm_context import latent_cache, layer_name_type

__all__ = ["by_name_op", "define"]

_NAME = "mla_rope_kv_cache_cat_by_name"
_ARGUMENTS = (
    "(Tensor? q_nope, Tensor q_pe, Tensor kv_c, Tensor k_pe, Tensor positions, Tensor cos_sin_cache, "
    "{layer} layer_name, str kv_cache_dtype, Tensor k_scale, bool is_neox, bool deinterleave, "
    'str plan="") -> (Tensor, Tensor, Tensor)'
)
_KEY = "CompositeExplicitAutograd"


def _run(
    q_nope: torch.Tensor | None,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    layer_name: Any,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    is_neox: bool,
    deinterleave: bool,
    plan: str = "",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mla_rope_kv_cache_cat`` on the cache of a layer, whose slots are those of the present forward pass.

    Arguments: as of ``mla_rope_kv_cache_cat`` and ``vllm::unified_mla_kv_cache_update``. Where a kernel must not write
    the layer's cache (see ``latent_cache``), vLLM's operator is called in its place, which skips what is to be skipped.

    Returns: the query, rotated k_pe, and the empty tensor by which vLLM lets attention wait for the update.
    """
    kv_cache, slots = latent_cache(layer_name, kv_cache_dtype, q_pe.dtype)
    scale = k_scale if kv_cache is not None and kv_cache.dtype == torch.float8_e4m3fn else None
    rotated_by = (positions, cos_sin_cache)
    query, rotated = torch.ops.autofuse.mla_rope_kv_cache_cat(
        *(q_nope, q_pe, kv_c, k_pe, *rotated_by, slots, kv_cache, None, scale, None, is_neox, deinterleave, False, plan)
    )
    if kv_cache is None:
        torch.ops.vllm.unified_mla_kv_cache_update(kv_c, rotated.unsqueeze(1), layer_name, kv_cache_dtype, k_scale)
    return query, rotated, kv_c.new_empty(0)


def _fake(
    q_nope: torch.Tensor | None,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    layer_name: Any,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    is_neox: bool,
    deinterleave: bool,
    plan: str = "",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, rotated = get_op("mla_rope_kv_cache_cat").fake(
        *(
            q_nope,
            q_pe,
            kv_c,
            k_pe,
            positions,
            cos_sin_cache,
            None,
            None,
            None,
            None,
            None,
            is_neox,
            deinterleave,
            False,
        )
    )
    return query, rotated, kv_c.new_empty(0)


class _Definitions:
    """Our operators as PyTorch knows them."""

    def __init__(self) -> None:
        self._library = torch.library.Library("autofuse", "FRAGMENT")

    def define(self, overload: str, layer: str) -> None:
        name = f"{_NAME}.{overload}" if overload else _NAME
        self._library.define(name + _ARGUMENTS.format(layer=layer), tags=(torch.Tag.pt2_compliant_tag,))
        self._library.impl(name, _run, _KEY)
        torch.library.register_fake(f"autofuse::{name}", _fake, lib=self._library)


_definitions = _Definitions()


def define() -> None:
    """Defines the operators for names that are strings. Called once, when autofuse is imported."""
    _definitions.define("", "str")


def by_name_op() -> Any:
    """``mla_rope_kv_cache_cat_by_name`` for names of the type that vLLM's operators take.

    Called before a graph is compiled, or taken from Inductor's cache: from PyTorch 2.11 on vLLM's names are of a class
    that it registers with PyTorch, of which no schema can be written before that.
    """
    return _overload(layer_name_type())


@cache
def _overload(layer: str) -> Any:
    packet = torch.ops.autofuse.mla_rope_kv_cache_cat_by_name
    if layer == "str":
        return packet.default
    _definitions.define("layer", layer)
    return packet.layer
