"""Recognisers: each finds one building block in a post-grad graph, in all its dialects.

To add one: a dataclass in ``blocks.py``, a file here with a function ``Graph -> Found``, and its name in
``RECOGNISERS``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph

from autofuse.graph.blocks import Found
from autofuse.graph.recognise.attention_output import find_headwise_linears
from autofuse.graph.recognise.kv_cache import find_cache_writes
from autofuse.graph.recognise.layer_calls import find_layer_calls
from autofuse.graph.recognise.quant import find_quants
from autofuse.graph.recognise.rms_norm import find_rms_norms
from autofuse.graph.recognise.rope import find_ropes

__all__ = ["RECOGNISERS", "recognise"]

RECOGNISERS: tuple[Callable[[Graph], Found], ...] = (
    find_rms_norms,
    find_quants,
    find_headwise_linears,
    find_ropes,
    find_cache_writes,
    find_layer_calls,
)


def recognise(graph: Graph) -> Found:
    """All blocks of ``graph`` and all near misses; changes nothing."""
    found = Found()
    for find in RECOGNISERS:
        found = found + find(graph)
    return found
