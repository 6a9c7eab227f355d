"""A norm and the quantisation behind it become one op; in an MLA layer, so do both norms and that quantisation."""

from __future__ import annotations

import pytest
import torch
import vllm_standins  # noqa: F401 (registers vLLM's operators)
from models import RMSNorm, isolate, post_grad_graph, without_code_generation
from test_graph_quant import column_major, group_op, keepdim, static
from torch import nn

from autofuse.graph.fusions.norm_quant import MlaDualNormQuant, NormQuant
from autofuse.graph.recognise import recognise
from autofuse.graph.report_store import last_reports
from autofuse.ops.quant import QuantFormat, ScaleLayout

DTYPE = torch.bfloat16
HIDDEN, Q_RANK, KV_RANK, ROPE = 64, 256, 32, 8
SCALE = torch.full((1,), 0.01)
FUSE = {"autofuse.untuned": "fuse"}
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")
    torch.manual_seed(0)


class NormedLinear(nn.Module):
    """A projection, its norm, and what is made of the normed rows."""

    def __init__(self, quantise, norm=RMSNorm) -> None:
        super().__init__()
        self.down = nn.Linear(HIDDEN, Q_RANK, bias=False, dtype=DTYPE)
        self.norm = norm(Q_RANK, dtype=DTYPE)
        self.quantise = quantise

    def forward(self, x):
        return self.quantise(self.norm(self.down(x)))


class QuantisedLatents(nn.Module):
    """The latents of an MLA layer whose query's up-projection is in FP8."""

    def __init__(self, quantise, joint=True) -> None:
        super().__init__()
        widths = [Q_RANK + KV_RANK + ROPE] if joint else [Q_RANK, KV_RANK + ROPE]
        self.down = nn.ModuleList(nn.Linear(HIDDEN, width, bias=False, dtype=DTYPE) for width in widths)
        self.q_norm, self.kv_norm = RMSNorm(Q_RANK, DTYPE), RMSNorm(KV_RANK, DTYPE)
        self.quantise = quantise

    def forward(self, x):
        if len(self.down) == 1:
            q, kv, rope = self.down[0](x).split([Q_RANK, KV_RANK, ROPE], dim=-1)
        else:
            q, (kv, rope) = self.down[0](x), self.down[1](x).split([KV_RANK, ROPE], dim=-1)
        return *self.quantise(self.q_norm(q)), torch.cat([self.kv_norm(kv), rope], dim=-1)


def hidden(tokens=6):
    return torch.randn(tokens, HIDDEN, dtype=DTYPE)


def sites_of(fusion, function, *args, dynamic=False):
    return fusion.match(recognise(post_grad_graph(function, *args, dynamic=dynamic)))


def fused_and_eager(model, options, dynamic=False):
    x = hidden()
    with without_code_generation(), torch.no_grad():
        marked = x.clone()
        if dynamic is None:
            torch._dynamo.mark_dynamic(marked, 0)
        results = torch.compile(model, backend="autofuse", options=options, dynamic=dynamic)(marked)
        expected = model(x)
    return (each if isinstance(each, tuple) else (each,) for each in (results, expected))


FORMATS = [
    (keepdim, QuantFormat(128)),
    (column_major, QuantFormat(128, layout=ScaleLayout.COLUMN_MAJOR)),
    (lambda x: group_op(x, ScaleLayout.TMA_ALIGNED, 64, True), QuantFormat(64, True, ScaleLayout.TMA_ALIGNED)),
    (lambda x: static(x, SCALE), QuantFormat(0)),
]
FORMAT_NAMES = ["groups", "column-major", "TMA-aligned UE8M0 64", "static"]


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize("norm", [RMSNorm, nn.RMSNorm], ids=["cast before", "cast after"])
@pytest.mark.parametrize(("quantise", "scheme"), FORMATS, ids=FORMAT_NAMES)
def test_a_norm_and_its_quantisation_are_one_op(quantise, scheme, norm, dynamic):
    results, expected = fused_and_eager(NormedLinear(quantise, norm), FUSE, dynamic)
    (site,) = (site for site in last_reports()[-1].sites if site.fused)
    assert (site.fusion, site.op) == ("fuse_norm_quant", "fp8_group_quant")
    assert f"norm=1,cast_before_weight={int(norm is RMSNorm)},group={scheme.group}" in site.problem
    for result, right in zip(results, expected, strict=True):
        assert (result.shape, result.stride(), result.dtype) == (right.shape, right.stride(), right.dtype)
        torch.testing.assert_close(result.float(), right.float(), rtol=2**-3, atol=0.05)


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize("joint", [True, False], ids=["one projection", "two projections"])
@pytest.mark.parametrize(("quantise", "scheme"), FORMATS[:3], ids=FORMAT_NAMES[:3])
def test_both_norms_of_an_mla_layer_and_the_quantisation_are_one_op(quantise, scheme, joint, dynamic):
    results, expected = fused_and_eager(QuantisedLatents(quantise, joint), FUSE, dynamic)
    sites = last_reports()[-1].sites
    (fused,) = (site for site in sites if site.fused)
    assert fused.op == "mla_dual_rms_norm_quant"
    assert f"group={scheme.group},ue8m0={int(scheme.ue8m0)}" in fused.problem
    rivals = {site.op: site.rule for site in sites if site is not fused}
    assert rivals == {"mla_dual_rms_norm": "overlap", "fp8_group_quant": "overlap"}
    for result, right in zip(results, expected, strict=True):
        assert (result.shape, result.stride(), result.dtype) == (right.shape, right.stride(), right.dtype)
        torch.testing.assert_close(result.float(), right.float(), rtol=2**-3, atol=0.05)


@pytest.mark.parametrize("fusion", [NormQuant(), MlaDualNormQuant()], ids=lambda fusion: fusion.op)
@pytest.mark.parametrize("quantise", [keepdim, group_op])
def test_what_is_joined_is_gone(fusion, quantise):
    graph = post_grad_graph(QuantisedLatents(quantise), hidden())
    (site,) = fusion.match(recognise(graph))
    before = {index: list(value.stride()) for index, value in site.tensors().items()}
    fusion.rewrite(graph, site, "")
    graph.lint()
    (fused,) = (node for node in graph.nodes if fusion.op in str(node.target))
    assert before == {index: list(fused.args[index].meta["val"].stride()) for index in before}
    left = [node.target for node in graph.nodes if node.op == "call_function"]
    assert left.count(aten.rsqrt.default) == (1 if fusion.op == "fp8_group_quant" else 0)
    assert not set(left) & {aten.amax.default, aten.empty.memory_format, aten.div.Tensor}


def test_flags_choose_among_rivals():
    for flags, op in (
        ({"fuse_norm_quant": False}, "mla_dual_rms_norm"),
        ({"fuse_mla_dual_rms_norm": False}, "mla_dual_rms_norm_quant"),
    ):
        options = {**FUSE, **{f"autofuse.{name}": on for name, on in flags.items()}}
        fused_and_eager(QuantisedLatents(keepdim), options)
        assert [site.op for site in last_reports()[-1].sites if site.fused] == [op]


def and_the_normed(x):
    return *keepdim(x), x


@pytest.mark.parametrize("fusion", [NormQuant(), MlaDualNormQuant()], ids=lambda fusion: fusion.op)
def test_normed_rows_that_others_read_too_are_refused(fusion):
    (site,) = sites_of(fusion, QuantisedLatents(and_the_normed), hidden())
    assert "are also read by the graph's output" in site.refusal


def test_a_norm_of_what_inductor_computes_on_the_way_is_refused():
    model = NormedLinear(keepdim)
    (site,) = sites_of(
        NormQuant(), lambda x, y: model.quantise(model.norm(x + y)), *torch.randn(2, 6, Q_RANK).bfloat16()
    )
    assert "which Inductor joins with the norm" in site.refusal


def test_a_static_scale_makes_no_site_of_the_dual_norms():
    assert sites_of(MlaDualNormQuant(), QuantisedLatents(lambda x: (static(x, SCALE),)), hidden()) == []


def test_another_change_between_makes_no_site():
    assert sites_of(NormQuant(), NormedLinear(lambda x: keepdim(x * 2)), hidden()) == []
