"""Mutations of right kernels, each of which the emulator must catch. A kernel's are in a module of their own."""

from __future__ import annotations

from mutations import mla_rope, norms, q_absorb, quant, rope, v_up
from mutations.mutation import Mutation

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS = [mutation for module in (norms, mla_rope, quant, rope, q_absorb, v_up) for mutation in module.MUTATIONS]
