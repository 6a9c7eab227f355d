"""Sites that read each other's results: all are fused, in an order in which none loses what it reads; or, where each
reads a result of the other, the one that saves more."""

from __future__ import annotations

import operator
from dataclasses import fields

import pytest
import torch
from like_eager import assert_like_eager
from models import RMSNorm, isolate
from rope_dialects import vllm_gptj
from rope_layers import HIDDEN, LATENT, NOPE, ROPE, H, P, T, hidden, latents, mla_flat
from test_graph_overlaps import decided, fused
from test_graph_quant import keepdim
from torch import nn
from torch.fx import Graph

from autofuse.graph.conflicts import needs_of, without_conflicts
from autofuse.graph.fusions import Site
from autofuse.graph.report_store import last_reports

DTYPE = torch.bfloat16
Q_RANK = 128
OPTIONS = {"autofuse.untuned": "fuse", "reorder_for_locality": False}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


# ---- layers ---------------------------------------------------------------------------------------------------------


class KeyFirst(nn.Module):
    """An MLA layer that rotates its key before it normalises the latents, of which it caches one.

    Args:
        quantise: what becomes of the normed query latent; None if the query is made of it.
        circular: the query's down-projection depends on the rotated key.
    """

    def __init__(self, quantise=None, circular=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quantise, self.circular = quantise, circular

        def weight(*sizes):
            return nn.Parameter(0.125 * torch.randn(*sizes, dtype=DTYPE), requires_grad=False)

        self.q_down, self.kv_down = weight(HIDDEN, Q_RANK), weight(HIDDEN, LATENT + ROPE)
        self.q_up = weight(HIDDEN if quantise or circular else Q_RANK, H * (NOPE + ROPE))
        self.q_norm, self.kv_norm = RMSNorm(Q_RANK, DTYPE), RMSNorm(LATENT, DTYPE)
        self.table = weight(P, ROPE)

    def forward(self, x, positions, cache, slots):
        kv, k_pe = (x @ self.kv_down).split([LATENT, ROPE], dim=-1)
        k_pe = vllm_gptj(k_pe.unsqueeze(1), self.table, positions)
        q_down = self.q_down * (1 + k_pe.mean()) if self.circular else self.q_down
        kv, q_c = self.kv_norm(kv), self.q_norm(x @ q_down)
        others = self.quantise(q_c) if self.quantise else [q_c] if self.circular else []
        q = ((x if others else q_c) @ self.q_up).view(-1, H, NOPE + ROPE)
        q = torch.cat([q[..., :NOPE], vllm_gptj(q[..., NOPE:], self.table, positions)], dim=-1)
        mla_flat(cache, slots, kv, k_pe)
        return q * 2, k_pe * 2, *(each.float() for each in others)


def sites_of(model, dynamic=False):
    """What became of the sites of RoPE and of both norms: {op: rule}, "" for what was fused."""
    args, cache = hidden(), latents(T)
    if dynamic is None:
        for tensor in (*args, cache[1]):
            torch._dynamo.mark_dynamic(tensor, 0)
    assert_like_eager(model, args, cache, options=OPTIONS, dynamic=dynamic)
    sites = [site for site in last_reports()[-1].sites if site.op.startswith("mla_")]
    return {site.op: "" if site.fused else site.rule for site in sites}


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize(("quantise", "norms"), [(None, "mla_dual_rms_norm"), (keepdim, "mla_dual_rms_norm_quant")])
def test_a_rotation_that_begins_before_the_norms_whose_result_it_caches(quantise, norms, dynamic):
    sites = sites_of(KeyFirst(quantise), dynamic)
    assert (sites[norms], sites["mla_rope_kv_cache_cat"]) == ("", "")


def test_of_two_sites_that_need_each_other_one_is_fused():
    sites = sites_of(KeyFirst(circular=True))
    assert sorted((sites["mla_dual_rms_norm"], sites["mla_rope_kv_cache_cat"])) == ["", "cycle"]


# ---- graphs ---------------------------------------------------------------------------------------------------------


def call(graph, *inputs):
    return graph.call_function(operator.add if len(inputs) == 2 else operator.neg, inputs)


@pytest.fixture
def crossed():
    """Two sites, each of whose second node reads the other's first: (graph, nodes of one, nodes of the other)."""
    graph = Graph()
    x = graph.placeholder("x")
    one, other = call(graph, x), call(graph, x)
    between = call(graph, other)
    return graph, [one, call(graph, one, between)], [other, call(graph, other, one)]


def results(graph, *given):
    kept, order = without_conflicts(graph, given)
    assert sorted(order) == [index for index, (_, _, decision) in enumerate(kept) if decision.fuses]
    return kept, order


def test_of_a_cycle_the_site_that_saves_less_is_left_alone(crossed):
    graph, one, other = crossed
    kept, order = results(graph, decided(one, "one", 2.0), decided(other, "other", 1.0))
    assert (fused(kept), order) == (["one"], [0])
    _, _, lost = kept[1]
    assert lost.rule == "cycle"
    assert lost.reason == (
        "it and one (fusion, saves 2.00 µs) read each other's results, around a circle; this one saves 1.00 µs"
    )


def test_what_overlaps_the_site_that_a_cycle_leaves_alone_is_fused(crossed):
    graph, one, other = crossed
    given = [decided(one, "one", 3.0), decided(other, "other", 2.0), decided(other[:1], "part", 1.0)]
    kept, _ = results(graph, *given)
    assert fused(kept) == ["one", "part"]
    assert [decision.rule for _, _, decision in kept] == ["exact", "cycle", "exact"]


def test_a_cycle_of_three():
    graph = Graph()
    x = graph.placeholder("x")
    first = [call(graph, x) for _ in range(3)]
    sites = [[first[at], call(graph, first[at], first[at - 1])] for at in range(3)]
    kept, order = results(graph, *(decided(nodes, str(at), 3.0 - at) for at, nodes in enumerate(sites)))
    assert fused(kept) == ["0", "1"]
    assert order == [1, 0]  # 1 reads a result of 0
    assert "it and 0 (fusion, saves 3.00 µs) and 1 (fusion, saves 2.00 µs) read" in kept[2][2].reason or (
        "it and 1 (fusion, saves 2.00 µs) and 0 (fusion, saves 3.00 µs) read" in kept[2][2].reason
    )


def test_readers_are_rewritten_first_wherever_they_begin():
    graph = Graph()
    x = graph.placeholder("x")
    early, node = call(graph, x), call(graph, x)
    nodes = [early, call(graph, early, call(graph, node))]
    assert results(graph, decided([node]), decided(nodes))[1] == [1, 0]
    assert results(graph, decided(nodes), decided([node]))[1] == [0, 1]


def test_what_a_site_leaves_as_it_was_is_no_result_of_it():
    graph = Graph()
    x = graph.placeholder("x")
    buffer = call(graph, x)
    view = call(graph, buffer)

    class Sparing(Site):
        @property
        def spared(self):
            return {view: x}

    (_, site, _), (_, reader, _) = decided([buffer, view]), decided([call(graph, view)])
    sparing = Sparing(**{field.name: getattr(site, field.name) for field in fields(site)})
    assert needs_of(graph, {0: site, 1: reader}) == {0: [], 1: [0]}
    assert needs_of(graph, {0: sparing, 1: reader}) == {0: [], 1: []}
