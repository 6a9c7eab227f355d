"""The fused ops. To add one: a file here, its kernel sources, its line below."""

from __future__ import annotations

import difflib

from autofuse.errors import BadInput
from autofuse.ops.base import FusedOp, KernelSource, Tolerance
from autofuse.ops.binding import Binding, LaunchShape
from autofuse.ops.fp8_group_quant import Fp8GroupQuant
from autofuse.ops.mla_dual_rms_norm import MlaDualRmsNorm
from autofuse.ops.mla_dual_rms_norm_quant import MlaDualRmsNormQuant
from autofuse.ops.mla_q_absorb_rope_kv_cache import MlaQAbsorbRopeKvCache
from autofuse.ops.mla_rope_kv_cache_cat import MlaRopeKvCacheCat
from autofuse.ops.mla_v_up_quant import MlaVUpQuant
from autofuse.ops.problem import Config, Problem
from autofuse.ops.rope_kv_cache import RopeKvCache
from autofuse.ops.space import Constraint, SearchSpace, Tunable

__all__ = [
    "OPS",
    "Binding",
    "Config",
    "Constraint",
    "FusedOp",
    "KernelSource",
    "LaunchShape",
    "Problem",
    "SearchSpace",
    "Tolerance",
    "Tunable",
    "get_op",
]

OPS: dict[str, FusedOp] = {
    op.name: op
    for op in (
        MlaDualRmsNorm(),
        MlaRopeKvCacheCat(),
        Fp8GroupQuant(),
        MlaDualRmsNormQuant(),
        RopeKvCache(),
        MlaVUpQuant(),
        MlaQAbsorbRopeKvCache(),
    )
}


def get_op(name: str) -> FusedOp:
    """The fused op of that name. Raises BadInput."""
    if name not in OPS:
        close = difflib.get_close_matches(name, OPS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadInput(f"op {name!r} is none of {', '.join(OPS)}{hint}")
    return OPS[name]
