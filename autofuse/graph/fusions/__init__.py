"""Fusions: each combines blocks into one fused op. To add one: a file here, and its class in ``FUSIONS``."""

from __future__ import annotations

from autofuse.graph.fusions.base import Fusion, Site
from autofuse.graph.fusions.mla_dual_rms_norm import MlaDualRMSNorm

__all__ = ["FUSIONS", "Fusion", "Site"]

FUSIONS: tuple[Fusion, ...] = (MlaDualRMSNorm(),)
