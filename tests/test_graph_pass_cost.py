"""What a pass costs: it grows with the layers of a model, not with their square."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import isolate, without_code_generation
from rope_layers import Gqa, flat, paged

from autofuse.graph.graph_pass import FusionPass
from autofuse.graph.report_store import last_reports
from bench_pass import decoder

FUSE = {"autofuse.level": "O3", "autofuse.untuned": "fuse"}
TOKENS = 6


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def gqa(layers: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(layers of attention with caches of their own, around a residual; its arguments)"""
    models = [Gqa(write=flat) for _ in range(layers)]
    caches = [paged(TOKENS) for _ in range(layers)]
    slots = caches[0][-1]
    args = (torch.randn(TOKENS, 64, dtype=torch.bfloat16), torch.arange(TOKENS), slots, [each[:-1] for each in caches])

    def model(x, positions, slots, caches):
        results = []
        for layer, own in zip(models, caches, strict=True):
            made = layer(x, positions, *own, slots)
            results.append(made)
            x = x + made[0].reshape(TOKENS, -1)[:, :64]
        return results

    return model, args


def calls(make: Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]], layers: int, monkeypatch) -> int:
    """How many functions a pass over so many layers calls."""
    count = 0
    run = FusionPass._run

    def counted(this, graph):
        def tell(frame, event, arg):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(tell)
        try:
            return run(this, graph)
        finally:
            sys.setprofile(None)

    model, args = make(layers)
    torch._dynamo.reset()
    with monkeypatch.context() as patch, without_code_generation(), torch.no_grad():
        patch.setattr(FusionPass, "_run", counted)
        torch.compile(model, backend="autofuse", options=FUSE, fullgraph=True, dynamic=False)(*args)
    assert last_reports()[-1].fused >= layers, last_reports()[-1]
    return count


@pytest.mark.parametrize("make", [decoder, gqa], ids=["MLA", "GQA"])
def test_calls_grow_with_layers(make, monkeypatch):
    calls(make, 1, monkeypatch)  # what is asked but once
    two, four, eight = (calls(make, layers, monkeypatch) for layers in (2, 4, 8))
    assert eight - four <= 1.02 * 2 * (four - two), (two, four, eight)
