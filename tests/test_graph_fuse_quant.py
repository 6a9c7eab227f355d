"""A quantisation becomes an op of its own where it is a kernel of its own, and nothing better takes it."""

from __future__ import annotations

import pytest
import torch
import vllm_standins  # noqa: F401 (registers vLLM's operators)
from models import isolate, post_grad_graph, without_code_generation
from test_graph_fuse_norm_quant import FORMAT_NAMES, FORMATS, NormedLinear, fused_and_eager
from test_graph_quant import group_op, keepdim, nvfp4, rows
from torch import nn

from autofuse.graph.fusions.quant import Quant
from autofuse.graph.recognise import recognise
from autofuse.graph.report_store import last_reports

DTYPE = torch.bfloat16
GLOBAL_SCALE = torch.full((1,), 300.0)
FUSE = {"autofuse.untuned": "fuse"}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


class Linear(nn.Module):
    """A projection and what is made of its result."""

    def __init__(self, quantise) -> None:
        super().__init__()
        self.down = nn.Linear(64, 256, bias=False, dtype=DTYPE)
        self.quantise = quantise

    def forward(self, x):
        return self.quantise(self.down(x))


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize(
    ("quantise", "group"),
    [*((quantise, scheme.group) for quantise, scheme in FORMATS), (lambda x: nvfp4(x, GLOBAL_SCALE), 16)],
    ids=[*FORMAT_NAMES, "NVFP4"],
)
def test_what_a_product_leaves_in_memory_is_quantised_by_the_op(quantise, group, dynamic):
    results, expected = fused_and_eager(Linear(quantise), FUSE, dynamic)
    (site,) = last_reports()[-1].sites
    assert (site.op, site.fused) == ("fp8_group_quant", True), site
    assert f"norm=0,cast_before_weight=0,group={group}" in site.problem
    for result, right in zip(results, expected, strict=True):
        assert (result.shape, result.stride(), result.dtype) == (right.shape, right.stride(), right.dtype)
        assert torch.equal(*(each.contiguous().view(torch.uint8) for each in (result, right)))


def test_columns_of_a_wider_product():
    model = Linear(lambda x: keepdim(x[:, 64:192]))
    graph = post_grad_graph(model, torch.randn(6, 64, dtype=DTYPE))
    (site,) = Quant().match(recognise(graph))
    assert (site.refusal, site.rows.offset, site.rows.width) == (None, 64, 128)
    Quant().rewrite(graph, site, "")
    graph.lint()
    (fused,) = (node for node in graph.nodes if "fp8_group_quant" in str(node.target))
    assert fused.args[0].meta["val"].stride() == (256, 1)


@pytest.mark.parametrize("quantise", [keepdim, group_op])
def test_a_norm_takes_it_along(quantise):
    fused_and_eager(NormedLinear(quantise), FUSE)
    sites = last_reports()[-1].sites
    assert [site.fusion for site in sites if site.fused] == ["fuse_norm_quant"]
    # An operator would be a site of its own; generated code goes into the norm's kernel.
    assert [site.rule for site in sites if not site.fused] == (["overlap"] if quantise is group_op else [])


def undone(x):
    values, scales = keepdim(x)
    return (values.view(x.shape[0], -1, 128).float() * scales[..., None]).to(x.dtype)


@pytest.mark.parametrize(
    "function",
    [lambda x: keepdim(x * 2), undone, lambda x: keepdim(x.t().contiguous().view(x.shape))],
    ids=["computed rows", "undone", "a copy"],
)
def test_what_inductor_joins_with_it_keeps_it(function):
    found = recognise(post_grad_graph(function, rows()))
    assert len(found.quants()) == 1
    assert Quant().match(found) == []


def test_an_operator_is_taken_whoever_reads_it():
    def read(x):
        values, scales = group_op(x)
        return values.float() * 2, scales

    (site,) = Quant().match(recognise(post_grad_graph(read, rows())))
    assert site.refusal is None


def test_the_flag_switches_it_off():
    with without_code_generation(), torch.no_grad():
        torch.compile(keepdim, backend="autofuse", options={**FUSE, "autofuse.fuse_quant": False})(rows())
    assert last_reports()[-1].fused == 0
