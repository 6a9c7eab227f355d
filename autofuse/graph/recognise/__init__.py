"""Recognisers: each finds one building block in a post-grad graph, in all its dialects.

To add one: a dataclass in ``blocks.py``, a file here with a function ``Graph -> Found``, and its name in
``RECOGNISERS``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph

from autofuse.graph.blocks import Found
from autofuse.graph.recognise.rms_norm import find_rms_norms

__all__ = ["RECOGNISERS", "recognise"]

RECOGNISERS: tuple[Callable[[Graph], Found], ...] = (find_rms_norms,)


def recognise(graph: Graph) -> Found:
    """All blocks of ``graph`` and all near misses; changes nothing."""
    found = Found()
    for find in RECOGNISERS:
        found = found + find(graph)
    return found
