"""Fusions: each combines blocks into one fused op. To add one: a file here, and its class in ``FUSIONS``."""

from __future__ import annotations

from autofuse.graph.fusions.attn_quant import AttnQuant
from autofuse.graph.fusions.base import Fusion, Site
from autofuse.graph.fusions.layer_attn_quant import LayerAttnQuant
from autofuse.graph.fusions.layer_mla_rope import LayerMlaRope
from autofuse.graph.fusions.layer_rope_kv_cache import LayerRopeKvCache
from autofuse.graph.fusions.mla_dual_rms_norm import MlaDualRMSNorm
from autofuse.graph.fusions.mla_q_absorb import LayerMlaQAbsorb, MlaQAbsorb
from autofuse.graph.fusions.mla_rope_kv_cache_cat import MlaRopeKvCacheCat
from autofuse.graph.fusions.norm_quant import MlaDualNormQuant, NormQuant
from autofuse.graph.fusions.quant import Quant
from autofuse.graph.fusions.rope_kv_cache import RopeKvCache

__all__ = ["FUSIONS", "Fusion", "Site"]

FUSIONS: tuple[Fusion, ...] = (
    MlaDualRMSNorm(),
    MlaDualNormQuant(),
    NormQuant(),
    Quant(),
    RopeKvCache(),
    MlaRopeKvCacheCat(),
    LayerMlaRope(),
    LayerRopeKvCache(),
    MlaQAbsorb(),
    LayerMlaQAbsorb(),
    AttnQuant(),
    LayerAttnQuant(),
)
