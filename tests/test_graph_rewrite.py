"""A fused site computes what it did before, as one node on strided views, and nothing else of the graph changes."""

from __future__ import annotations

import pytest
import torch
from models import HIDDEN, KV_RANK, Q_RANK, ROPE, MlaLatents, isolate, post_grad_graph, without_code_generation
from torch import nn

from autofuse.graph.fusions.mla_dual_rms_norm import MlaDualRMSNorm
from autofuse.graph.recognise import recognise
from autofuse.graph.report_store import last_reports

OP = torch.ops.autofuse.mla_dual_rms_norm.default
FUSE = {"autofuse.untuned": "fuse"}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def rewritten(function, *args, **options):
    graph = post_grad_graph(function, *args, **options)
    fusion = MlaDualRMSNorm()
    (site,) = fusion.match(recognise(graph))
    assert site.refusal is None
    fusion.rewrite(graph, site, "")
    graph.lint()
    return graph


def hidden(*shape, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return torch.randn(*(shape or (2, 5)), HIDDEN, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dynamic", [False, None, True], ids=["static", "mark_dynamic", "dynamic=True"])
@pytest.mark.parametrize("joint", [True, False], ids=["one projection", "two projections"])
def test_results_are_those_of_eager(joint, dynamic, dtype):
    model, x = MlaLatents(dtype, joint), hidden(dtype=dtype)
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 1)
    with without_code_generation(), torch.no_grad():
        compiled = torch.compile(model, backend="autofuse", dynamic=dynamic, options=FUSE)
        results = [compiled(x), compiled(hidden(2, 7, dtype=dtype)) if dynamic is not False else None]
    report = last_reports()[-1]
    assert (len(report.sites), report.fused) == (1, 1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for result, tokens in zip(results, (5, 7), strict=True):
        if result is not None:
            torch.testing.assert_close(result, model(hidden(2, tokens, dtype=dtype)), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("norm", [nn.RMSNorm], ids=["nn.RMSNorm"])
def test_norms_that_cast_after_the_weight(norm):
    model = MlaLatents()
    model.q_norm, model.kv_norm = (norm(width, eps=1e-5, dtype=torch.bfloat16) for width in (Q_RANK, KV_RANK))
    with without_code_generation(), torch.no_grad():
        result = torch.compile(model, backend="autofuse", options=FUSE)(hidden())
    (site,) = last_reports()[-1].sites
    assert site.fused
    assert "cast_before_weight=0" in site.problem
    torch.testing.assert_close(result, model(hidden()), atol=2e-2, rtol=2e-2)


def test_the_op_reads_slices_of_the_matrix_product():
    graph = rewritten(MlaLatents(), hidden())
    (fused,) = graph.find_nodes(op="call_function", target=OP)
    (product,) = (n for n in graph.nodes if n.target is torch.ops.aten.mm.default and n < fused)
    for operand, offset, width in ((fused.args[0], 0, Q_RANK), (fused.args[2], Q_RANK, KV_RANK)):
        assert operand.args == (product, 1, offset, offset + width)
        assert operand.meta["val"].stride() == (Q_RANK + KV_RANK + ROPE, 1)
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default)


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
def test_new_nodes_carry_the_values_of_those_they_replace(dynamic):
    def results(graph):
        return [node.meta["val"] for node in next(iter(graph.find_nodes(op="output"))).args[0]]

    model, x = MlaLatents(joint=False), hidden()
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 0)
    before, graph = (make(model, x, dynamic=dynamic) for make in (post_grad_graph, rewritten))
    assert all("val" in node.meta for node in graph.nodes if node.op != "output")
    for old, new in zip(results(before), results(graph), strict=True):
        assert (str(list(old.shape)), old.dtype, str(old.stride())) == (
            str(list(new.shape)),
            new.dtype,
            str(new.stride()),
        )


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize("joint", [True, False], ids=["one projection", "two projections"])
def test_a_site_knows_the_tensors_that_the_op_will_get(joint, dynamic):
    x = hidden()
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 1)
    graph = post_grad_graph(MlaLatents(joint=joint), x, dynamic=dynamic)
    fusion = MlaDualRMSNorm()
    (site,) = fusion.match(recognise(graph))
    before = {index: layout(value) for index, value in site.tensors().items()}
    fusion.rewrite(graph, site, "")
    (fused,) = graph.find_nodes(op="call_function", target=OP)
    assert before == {index: layout(fused.args[index].meta["val"]) for index in range(4)}


def layout(value):
    return value.dtype, str(list(value.shape)), str(value.stride()), str(value.storage_offset())


def test_two_symbolic_sizes_are_read_from_the_graph():
    x = hidden(3, 5)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    graph = rewritten(MlaLatents(), x, dynamic=None)
    (fused,) = graph.find_nodes(op="call_function", target=OP)
    reshapes = [user for item in fused.users for user in item.users if user.target is torch.ops.aten.reshape.default]
    assert reshapes
    assert all(size == -1 or isinstance(size, (int, torch.fx.Node)) for node in reshapes for size in node.args[1])


def test_hoisted_nodes_keep_the_graph_in_order():
    graph = rewritten(MlaLatents(joint=False), hidden(), reorder=False)
    (fused,) = graph.find_nodes(op="call_function", target=OP)
    products = [node for node in graph.nodes if node.target is torch.ops.aten.mm.default]
    assert [product < fused for product in products] == [True, True, False]


def test_a_rewrite_that_fails_leaves_the_graph_as_it_was(monkeypatch):
    graph = post_grad_graph(MlaLatents(joint=False), hidden(), reorder=False)
    before = str(graph)
    fusion = MlaDualRMSNorm()
    (site,) = fusion.match(recognise(graph))
    monkeypatch.setattr("autofuse.graph.rewrite.Replacement.reshape_like", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fusion.rewrite(graph, site, "")
    assert str(graph) == before
    graph.lint()


def test_all_tokens_of_an_empty_batch():
    model = MlaLatents()
    with without_code_generation(), torch.no_grad():
        q, kv = torch.compile(model, backend="autofuse", options=FUSE)(hidden(0, 5))
    assert (q.shape, kv.shape) == ((0, 5, HIDDEN), (0, 5, KV_RANK + ROPE))
