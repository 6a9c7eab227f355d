"""Which rows are of kernels as they are here."""

from __future__ import annotations

from collections.abc import Collection

from autofuse.cache_db.records import Baseline, Trial, Winner
from autofuse.ops import OPS
from autofuse.ops.languages import TRITON, language_of

__all__ = ["NO_TRITON", "STALE", "is_stale", "why_unused", "why_unused_here"]

STALE = "stale: the kernel changed"
NO_TRITON = "unused: its kernel is in Triton, which is not used here (see `autofuse doctor`)"


def is_stale(record: Trial | Baseline | Winner) -> bool:
    """Whether a row is of another version of its kernel than the one that is here. A baseline is of none."""
    if isinstance(record, Baseline):
        return False
    op = OPS.get(record.problem.op)
    kind = record.target.kind
    return op is None or kind not in op.kernels or op.source_hash(kind, record.config) != record.source_hash


def why_unused(winner: Winner, source_hashes: Collection[str]) -> str | None:
    """Why no lookup is answered by a winner, whoever measured it; None where one may be.

    Args:
        source_hashes: of the op's kernels that can be compiled here, as ``FusedOp.source_hashes`` has them.
    """
    if winner.source_hash in source_hashes:
        return None
    return NO_TRITON if language_of(winner.config) == TRITON and not is_stale(winner) else STALE


def why_unused_here(winner: Winner) -> str | None:
    """The same among the kernels that can be compiled here, for a winner of whatever op and target."""
    op, kind = OPS.get(winner.problem.op), winner.target.kind
    if op is None or kind not in op.kernels:
        return "no such kernel here"
    return why_unused(winner, op.source_hashes(kind))
