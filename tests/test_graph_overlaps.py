"""No node is replaced twice: of two sites that share one, the one that saves more is fused, and the report says so."""

from __future__ import annotations

import pytest
import torch
from models import HIDDEN, MlaLatents, isolate, without_code_generation
from torch.fx import Graph

from autofuse.graph import graph_pass
from autofuse.graph.blocks import Block
from autofuse.graph.conflicts import without_overlaps
from autofuse.graph.decide import Decision
from autofuse.graph.fusions import Site
from autofuse.graph.fusions.mla_dual_rms_norm import MlaDualRMSNorm
from autofuse.graph.report_store import last_reports
from autofuse.ops import Config, get_op
from autofuse.runtime.plan import Plan

PROBLEM = get_op("mla_dual_rms_norm").make_problem(dtype="bf16", q_lora_rank=48, kv_lora_rank=32, cast_before_weight=1)
PLAN = Plan("x86-64", PROBLEM, ((16, Config.of(THREADS=1)),))


@pytest.fixture
def nodes():
    graph = Graph()
    first = graph.placeholder("x")
    return [first, *(graph.call_function(torch.neg, (first,)) for _ in range(5))]


def decided(nodes, op="op", saved=None, plan=PLAN):
    site = Site("fusion", op, (), 16, torch.device("cpu"), (Block(nodes[-1], tuple(nodes)),), None)
    return MlaDualRMSNorm(), site, Decision(plan, "exact", "it is faster", PROBLEM, saved_us=saved, nearest="kept")


def fused(results):
    return [site.op for _, site, decision in results if decision.plan is not None]


def test_the_site_that_saves_more_time_is_kept(nodes):
    results = without_overlaps([decided(nodes[1:4], "small", 0.5), decided(nodes[3:5], "large", 2.0)])
    assert fused(results) == ["large"]
    _, _, lost = results[0]
    assert lost.rule == "overlap"
    assert lost.reason == "large (fusion) replaces nodes of it and saves 2.00 µs; this one saves 0.50 µs"
    assert (lost.saved_us, lost.problem, lost.nearest) == (0.5, PROBLEM, "kept")


def test_what_was_measured_goes_before_what_was_not(nodes):
    assert fused(without_overlaps([decided(nodes[1:5], "unknown"), decided(nodes[4:6], "known", 0.1)])) == ["known"]


def test_a_call_that_cannot_be_measured_goes_after_what_was(nodes):
    fusion, site, _ = decided(nodes[1:5], "call")
    call = (fusion, site, Decision(None, "flag", "it is on", rewrites=True))
    results = without_overlaps([call, decided(nodes[4:6], "known", 0.1)])
    assert [decision.fuses for _, _, decision in results] == [False, True]
    assert results[0][2].reason.endswith("saves 0.10 µs; this one cannot be measured and replaces 4 nodes")
    assert without_overlaps([call]) == [call]


def test_what_nobody_measured_is_decided_by_the_number_of_nodes(nodes):
    results = without_overlaps([decided(nodes[1:3], "two"), decided(nodes[2:5], "three")])
    assert fused(results) == ["three"]
    assert "was never tuned and replaces 3 nodes; this one was never tuned and replaces 2 nodes" in results[0][2].reason


def test_sites_apart_and_sites_that_are_not_fused_stay_as_they_are(nodes):
    given = [
        decided(nodes[1:3], "one", 1.0),
        decided(nodes[3:5], "other", 2.0),
        decided(nodes[1:5], "slower", 9.0, plan=None),
    ]
    assert without_overlaps(given) == given


def test_the_loser_of_a_loser_is_kept(nodes):
    """A chain of overlaps: the middle one loses, so its other neighbour has no rival."""
    given = [decided(nodes[1:3], "a", 3.0), decided(nodes[2:5], "b", 2.0), decided(nodes[4:6], "c", 1.0)]
    assert fused(without_overlaps(given)) == ["a", "c"]


class Twin(MlaDualRMSNorm):
    """The same sites again, under another name."""

    name = "fuse_twin"


def test_a_site_that_two_fusions_claim_is_rewritten_once(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setattr(graph_pass, "FUSIONS", (MlaDualRMSNorm(), Twin()))
    model, x = MlaLatents(), torch.randn(2, 5, HIDDEN, dtype=torch.bfloat16)
    with without_code_generation(), torch.no_grad():
        result = torch.compile(model, backend="autofuse", options={"autofuse.untuned": "fuse"})(x)
    report = last_reports()[-1]
    assert [(site.fused, site.rule) for site in report.sites] == [(True, "default"), (False, "overlap")]
    assert "mla_dual_rms_norm (fuse_mla_dual_rms_norm) replaces nodes of it" in report.sites[1].reason
    torch.testing.assert_close(result, model(x), atol=2e-2, rtol=2e-2)
