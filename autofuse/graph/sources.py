"""What stands for this autofuse as it is here, in the names of what is kept for it."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from autofuse.errors import UnsupportedCall
from autofuse.ops import OPS
from autofuse.targets import KINDS

__all__ = ["sources_hash"]


@cache
def sources_hash() -> str:
    """Changes with the sources of the passes, the ops, their dispatch, their kernels, and of what a decision asks.

    Without a folder that a decision depends on, an edit there would still hit graphs of before in Inductor's cache.
    """
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for folder in ("cache_db", "graph", "ops", "runtime", "targets"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode())
            digest.update(path.read_bytes())
    for op in OPS.values():
        for kind in KINDS:
            try:
                digest.update(f"{op.name} {kind} {'+'.join(op.source_hashes(kind))}".encode())
            except UnsupportedCall:
                continue
    return digest.hexdigest()
