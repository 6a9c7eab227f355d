"""MLA's value up-projection and the quantisation behind it become one op, and nothing else does."""

from __future__ import annotations

import pytest
import torch
import vllm_standins  # noqa: F401 (registers vLLM's operators)
from models import isolate, post_grad_graph, without_code_generation
from test_graph_quant import column_major, group_op, keepdim, nvfp4, static, static_op, times_448_over_amax

from autofuse.graph.fusions.attn_quant import AttnQuant
from autofuse.graph.recognise import recognise
from autofuse.graph.report_store import last_reports
from autofuse.ops.quant import QuantFormat, ScaleLayout

OP = torch.ops.autofuse.mla_v_up_quant.default
aten = torch.ops.aten
HEADS, LATENT, VALUE = 4, 64, 128
DTYPE = torch.bfloat16
SCALE, GLOBAL_SCALE = torch.full((1,), 0.3), torch.full((1,), 300.0)
FUSE = {"autofuse.untuned": "fuse", "autofuse.level": "O3"}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def operands(tokens=6, heads=HEADS, value=VALUE, dtype=DTYPE):
    torch.manual_seed(0)
    latent = torch.randn(tokens, heads, LATENT, dtype=dtype)
    return latent, (torch.randn(heads, LATENT, value) * LATENT**-0.5).to(dtype)


def by_bmm(latent, weight):
    return torch.bmm(latent.transpose(0, 1), weight).transpose(0, 1).reshape(latent.shape[0], -1)


def by_bmm_and_flatten(latent, weight):
    return torch.bmm(latent.permute(1, 0, 2), weight).permute(1, 0, 2).contiguous().flatten(1)


def by_matmul(latent, weight):
    return torch.matmul(latent.transpose(0, 1), weight).transpose(0, 1).flatten(-2)


def by_einsum(latent, weight):
    return torch.einsum("tnl,nlv->tnv", latent, weight).reshape(latent.shape[0], -1)


def by_einsum_of_heads_first(latent, weight):
    return torch.einsum("ntl,nlv->tnv", latent.transpose(0, 1), weight).flatten(1)


PRODUCTS = [by_bmm, by_bmm_and_flatten, by_matmul, by_einsum, by_einsum_of_heads_first]


def named(function):
    return getattr(function, "__name__", "")


def sites_of(function, *args, dynamic=False):
    return AttnQuant().match(recognise(post_grad_graph(function, *args, dynamic=dynamic)))


def joined(product, quantise):
    return lambda latent, weight, *scale: quantise(product(latent, weight), *scale)


@pytest.mark.parametrize("tokens", [1, 6, None], ids=["one token", "static", "mark_dynamic"])
@pytest.mark.parametrize("quantise", [keepdim, group_op, times_448_over_amax], ids=named)
@pytest.mark.parametrize("product", PRODUCTS, ids=named)
def test_products_in_every_dialect_are_joined(product, quantise, tokens):
    latent, weight = operands(tokens or 6)
    if tokens is None:
        torch._dynamo.mark_dynamic(latent, 0)
    (site,) = sites_of(joined(product, quantise), latent, weight, dynamic=None if tokens is None else False)
    assert site.refusal is None
    assert dict(site.params) == {
        "dtype": DTYPE,
        "heads": HEADS,
        "kv_lora_rank": LATENT,
        "v_head_dim": VALUE,
        "group": 128,
        "ue8m0": 0,
        "layout": 0,
        "w_constant": False,
    }
    assert isinstance(site.tokens, torch.SymInt) if tokens is None else site.tokens == tokens


@pytest.mark.parametrize(
    ("quantise", "scheme"),
    [
        (column_major, QuantFormat(128, layout=ScaleLayout.COLUMN_MAJOR)),
        (lambda x: group_op(x, ScaleLayout.TMA_ALIGNED, 64, True), QuantFormat(64, True, ScaleLayout.TMA_ALIGNED)),
        (lambda x: static(x, SCALE), QuantFormat(0)),
        (lambda x: static_op(x, SCALE.view(1, 1)), QuantFormat(0)),
        (lambda x: nvfp4(x, GLOBAL_SCALE), QuantFormat(16)),
    ],
    ids=["column-major", "TMA-aligned UE8M0 64", "static", "static op", "NVFP4"],
)
@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
def test_every_format_gives_the_results_of_eager_in_their_own_shape_and_strides(quantise, scheme, dynamic):
    latent, weight = operands()
    function = joined(by_bmm, quantise)
    compiled_for = latent.clone()
    if dynamic is None:
        torch._dynamo.mark_dynamic(compiled_for, 0)
    with without_code_generation(), torch.no_grad():
        results = torch.compile(function, backend="autofuse", options=FUSE, dynamic=dynamic)(compiled_for, weight)
    (site,) = (site for site in last_reports()[-1].sites if site.fused)
    assert site.op == "mla_v_up_quant"
    assert f"group={scheme.group},ue8m0={int(scheme.ue8m0)},layout={int(scheme.layout)}" in site.problem
    expected = function(latent, weight)
    for result, right in zip(
        *((each if isinstance(each, tuple) else (each,)) for each in (results, expected)), strict=True
    ):
        assert (result.shape, result.stride(), result.dtype) == (right.shape, right.stride(), right.dtype)
        if scheme.group != 16:
            torch.testing.assert_close(result.float(), right.float(), rtol=2**-3, atol=0.05)
        else:
            assert (result.view(torch.uint8) == right.view(torch.uint8)).float().mean() > 0.9


class Layer(torch.nn.Module):
    """W_UV as a model has it."""

    def __init__(self, as_used, change=None):
        super().__init__()
        self.weight = torch.nn.Parameter(operands()[1].flatten().clone(), requires_grad=False)
        self.register_buffer("buffer", operands()[1].clone())
        self.register_buffer("exact", operands()[1].float())
        self.as_used, self.change = as_used, change

    def forward(self, latent):
        result = keepdim(by_bmm(latent, self.as_used(self)))
        if self.change is not None:
            self.change(self)
        return result


@pytest.mark.parametrize(
    ("layer", "constant"),
    [
        (Layer(lambda self: self.buffer), True),
        (Layer(lambda self: self.weight.view(HEADS, LATENT, VALUE)), True),
        (Layer(lambda self: self.weight.view(LATENT, HEADS, VALUE).transpose(0, 1)), True),
        (Layer(lambda self: self.weight.view(HEADS, VALUE, LATENT).transpose(1, 2).contiguous()), False),
        (Layer(lambda self: self.exact.to(DTYPE)), False),
        (Layer(lambda self: self.buffer, lambda self: self.buffer.mul_(2)), False),
        (Layer(lambda self: self.buffer, lambda self: self.buffer[0].zero_()), False),
    ],
    ids=["buffer", "parameter", "view of one", "copy of one", "cast", "changed", "changed in part"],
)
def test_only_weights_that_nothing_writes_are_constant(layer, constant):
    with without_code_generation(), torch.no_grad():
        result = torch.compile(layer, backend="autofuse", options=FUSE)(operands()[0])
    (site,) = last_reports()[-1].sites
    assert site.fused, site
    assert ("w_constant=1" in site.problem) == constant
    assert result[0].dtype == torch.float8_e4m3fn


def rewritten(function, *args, **options):
    graph = post_grad_graph(function, *args, **options)
    (site,) = AttnQuant().match(recognise(graph))
    assert site.refusal is None
    before = {index: layout(value) for index, value in site.tensors().items()}
    AttnQuant().rewrite(graph, site, "")
    graph.lint()
    return graph, before


def layout(value):
    return value.dtype, str(list(value.shape)), str(value.stride()), str(value.storage_offset())


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize("quantise", [keepdim, group_op], ids=named)
@pytest.mark.parametrize("product", PRODUCTS, ids=named)
def test_what_is_joined_is_gone(product, quantise, dynamic):
    latent, weight = operands()
    if dynamic is None:
        torch._dynamo.mark_dynamic(latent, 0)
    graph, before = rewritten(joined(product, quantise), latent, weight, dynamic=dynamic)
    left = {node.target for node in graph.nodes if node.op == "call_function"}
    assert not left & {aten.bmm.default, aten.amax.default, aten.clone.default, aten.empty.memory_format}
    (fused,) = graph.find_nodes(op="call_function", target=OP)
    assert before == {index: layout(fused.args[index].meta["val"]) for index in range(2)}
    assert all("val" in node.meta for node in graph.nodes if node.op != "output")


def test_the_op_reads_the_part_of_the_query_that_was_there():
    """Without attention between: o_latent is a slice of wider rows."""

    def sliced(query, weight):
        return keepdim(by_bmm(query[..., :LATENT], weight)), query + 1

    query = torch.randn(6, HEADS, LATENT + 16, dtype=DTYPE)
    graph, _ = rewritten(sliced, query, operands()[1])
    (fused,) = graph.find_nodes(op="call_function", target=OP)
    assert fused.args[0].target is aten.slice.Tensor
    assert fused.args[0].meta["val"].stride() == (HEADS * (LATENT + 16), LATENT + 16, 1)


def test_a_batch_of_sequences():
    def batched(latent, weight):
        flat = latent.flatten(0, 1)
        return keepdim(by_bmm(flat, weight).view(*latent.shape[:2], -1).flatten(0, 1))

    (site,) = sites_of(batched, torch.randn(2, 3, HEADS, LATENT, dtype=DTYPE), operands()[1])
    assert (site.refusal, site.tokens) == (None, 6)


# ---- what must not be joined ----------------------------------------------------------------------------------------


def read_by_another(latent, weight):
    values = by_bmm(latent, weight)
    return keepdim(values), values + 1


def returned(latent, weight):
    values = by_bmm(latent, weight)
    return keepdim(values), values


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (read_by_another, "is also read by add"),
        (returned, "is also read by the graph's output"),
        (lambda latent, weight: keepdim(by_bmm(latent, weight.transpose(1, 2).contiguous().transpose(1, 2))), None),
    ],
    ids=["another reader", "an output", "a computed weight"],
)
def test_sites_that_must_not_be_fused(function, why):
    sites = sites_of(function, *operands())
    assert [site.refusal is not None for site in sites] == [True] * len(sites)
    if why:
        assert why in sites[0].refusal


def test_groups_that_span_heads_are_refused():
    latent, weight = operands(value=64)
    (site,) = sites_of(joined(by_bmm, keepdim), latent, weight)
    assert "groups of 128 span heads, which have 64 columns each" in site.refusal


def test_a_weight_that_is_stored_the_other_way_round_is_refused():
    latent, weight = operands()
    (site,) = sites_of(joined(by_bmm, keepdim), latent, weight.transpose(1, 2).contiguous().transpose(1, 2))
    assert "is not contiguous: strides [8192, 1, 64]" in site.refusal


def test_nothing_is_joined_over_a_mutation():
    graph = post_grad_graph(joined(by_bmm, keepdim), *operands())
    (product,) = graph.find_nodes(op="call_function", target=aten.bmm.default)
    latent = graph.find_nodes(op="placeholder")[0]
    with graph.inserting_after(product):
        written = graph.call_function(aten.copy_.default, (latent, latent))
        written.meta["val"] = latent.meta["val"]
    (site,) = AttnQuant().match(recognise(graph))
    assert "may write to a tensor" in site.refusal


def not_transposed(latent, weight):
    return keepdim(torch.bmm(latent.transpose(0, 1), weight).reshape(latent.shape[0], -1))


def transposed_too_far(latent, weight):
    return keepdim(torch.bmm(latent.transpose(0, 1), weight).permute(1, 2, 0).reshape(latent.shape[0], -1))


def changed_between(latent, weight):
    return keepdim(by_bmm(latent, weight) * 2)


def attention(latent, weight):
    """Values that are no weight: they come from the tokens."""
    return keepdim(by_bmm(latent, weight + 1))


@pytest.mark.parametrize("function", [not_transposed, transposed_too_far, changed_between, attention], ids=named)
def test_other_products_are_not_joined(function):
    assert sites_of(function, *operands()) == []


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_what_the_op_does_not_multiply_is_left_alone(dtype):
    with without_code_generation(), torch.no_grad():
        torch.compile(joined(by_bmm, keepdim), backend="autofuse", options=FUSE)(*operands(dtype=dtype))
    (site,) = last_reports()[-1].sites
    assert (site.fused, site.rule) == (False, "unsupported")


def test_a_rewrite_that_fails_leaves_the_graph_as_it_was(monkeypatch):
    graph = post_grad_graph(joined(by_bmm, keepdim), *operands())
    before = str(graph)
    (site,) = AttnQuant().match(recognise(graph))
    monkeypatch.setattr("autofuse.graph.rewrite.Replacement.reshape_like", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        AttnQuant().rewrite(graph, site, "")
    assert str(graph) == before
    graph.lint()


def test_roundings_that_differ_are_told():
    with without_code_generation(), torch.no_grad():
        torch.compile(joined(by_bmm, times_448_over_amax), backend="autofuse", options=FUSE)(*operands())
    (site,) = last_reports()[-1].sites
    assert site.fused
    assert "a product with a reciprocal stands for the division" in site.reason


def test_it_is_on_from_level_3():
    for level, fused in (("O2", 0), ("O3", 1)):
        with without_code_generation(), torch.no_grad():
            options = {**FUSE, "autofuse.level": level}
            torch.compile(joined(by_bmm, keepdim), backend="autofuse", options=options)(*operands())
        assert last_reports()[-1].fused == fused
