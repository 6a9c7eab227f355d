"""The product that takes MLA's query to the latent space joins its rotation, cache write and cat, or is left alone."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import vllm_standins
from deciding import tuned, winner_of
from like_eager import assert_like_eager
from models import isolate, post_grad_graph, without_code_generation
from rope_dialects import vllm_gptj
from rope_layers import (
    LATENT,
    MLA_ROTATIONS,
    NOPE,
    ROPE,
    H,
    Mla,
    T,
    hidden,
    latents,
    mla_flat,
    mla_operator,
    rotate_by_cat,
)
from torch import nn
from torch._inductor.utils import run_and_get_code
from vllm_standins import layer_name

from autofuse.cache_db import TunedDatabase, default_path
from autofuse.graph.fusions.mla_q_absorb import LayerMlaQAbsorb, MlaQAbsorb
from autofuse.graph.recognise import recognise
from autofuse.graph.report_store import last_reports
from autofuse.ops import Problem
from autofuse.runtime.layer_ops import by_name_op

ABSORBED, WITHOUT = "mla_q_absorb_rope_kv_cache", "mla_rope_kv_cache_cat"
OP = torch.ops.autofuse.mla_q_absorb_rope_kv_cache.default
aten = torch.ops.aten
DTYPE = torch.bfloat16
FUSE = {"autofuse.level": "O3", "autofuse.untuned": "fuse"}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def named(function):
    return getattr(function, "__name__", "")


# ---- layers ---------------------------------------------------------------------------------------------------------


def by_bmm(q, w):
    return torch.bmm(q.transpose(0, 1), w).transpose(0, 1)


def by_einsum(q, w):
    return torch.einsum("thp,hpl->thl", q, w)


def by_einsum_of_the_weight(q, w):
    return torch.einsum("hpl,thp->thl", w, q)


def by_matmul(q, w):
    return (q.transpose(0, 1) @ w).transpose(0, 1)


def by_copies(q, w):
    return torch.bmm(q.permute(1, 0, 2).contiguous(), w).permute(1, 0, 2).contiguous()


def by_rows_of_all_heads(q, w):
    return by_bmm(q, w).reshape(q.shape[0], -1).view(q.shape[0], H, -1)


PRODUCTS = [by_bmm, by_einsum, by_einsum_of_the_weight, by_matmul, by_copies, by_rows_of_all_heads]


def as_it_is(layer):
    return layer.w_uk


class Absorbing(Mla):
    """An MLA layer that multiplies before it rotates.

    Args:
        product: (q_nope [T, H, NOPE], W_UK) → [T, H, LATENT].
        weight: (the layer) → W_UK [H, NOPE, LATENT].
        also: (the product, q, W_UK) → further results.
    """

    def __init__(self, product=by_bmm, weight=as_it_is, also=None, dtype=DTYPE, write=mla_flat, rotate=vllm_gptj):
        super().__init__(rotate, write, dtype=dtype)
        self.product, self.weight, self.also = product, weight, also
        self.kv_b = nn.Parameter(0.125 * torch.randn(H * (NOPE + 16), LATENT).to(dtype), requires_grad=False)
        self.exact = nn.Parameter(self.w_uk.double(), requires_grad=False)

    def forward(self, x, positions, cache, slots):
        q = (x @ self.w_q).view(*x.shape[:-1], H, NOPE + ROPE)
        kv_c, k_pe = (x @ self.w_kv).split([LATENT, ROPE], dim=-1)
        w_uk = self.weight(self)
        nope = self.product(q[..., :NOPE], w_uk)
        q_pe, k_pe = (self.rotate(rows, self.table, positions) for rows in (q[..., NOPE:], k_pe.unsqueeze(-2)))
        self.write(cache, slots, kv_c.flatten(0, -2) * 2, k_pe.flatten(0, -3))
        others = [] if self.also is None else self.also(nope, q, w_uk)
        return torch.cat([nope, q_pe], dim=-1) * 2, cache * 2, *others


def graph_of(model, tokens=T, **options):
    args = (*hidden(tokens or T), *latents(tokens or T))
    if tokens is None:
        options["dynamic"] = None
        for tensor in (*args[:2], args[3]):
            torch._dynamo.mark_dynamic(tensor, 0)
    return post_grad_graph(model, *args, **options)


def site_in(graph):
    (site,) = MlaQAbsorb().match(recognise(graph))
    return site


# ---- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, H, T, None], ids=["one token", "as many as heads", "static", "mark_dynamic"])
@pytest.mark.parametrize("product", PRODUCTS, ids=named)
def test_products_in_every_dialect_are_taken_in(product, tokens):
    site = site_in(graph_of(Absorbing(product), tokens))
    assert site.refusal is None
    assert dict(site.params) == {
        "dtype": DTYPE,
        "heads": H,
        "nope_dim": LATENT,
        "rope_dim": ROPE,
        "latent_dim": LATENT,
        "neox": False,
        "table": DTYPE,
        "cache": "auto",
        "deinterleave": False,
        "qk_nope_dim": NOPE,
        "w_constant": False,
    }
    assert isinstance(site.tokens, torch.SymInt) if tokens is None else site.tokens == tokens


@pytest.mark.parametrize("tokens", [T, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize("product", PRODUCTS, ids=named)
def test_what_is_taken_in_is_gone(product, tokens):
    graph = graph_of(Absorbing(product), tokens)
    site = site_in(graph)
    before = {index: layout(value) for index, value in site.tensors().items()}
    MlaQAbsorb().rewrite(graph, site, "")
    graph.lint()
    left = {node.target for node in graph.nodes if node.op == "call_function"}
    assert not left & {aten.bmm.default, aten.index_put.default}
    (fused,) = [node for node in graph.nodes if node.args and node.args[0] is OP]
    names = [argument.name for argument in OP._schema.arguments]
    assert {*before} == {0, 1, 2, 3, 4, 6, 8}
    for index in (0, 1, 2, 3, 4, 6):
        assert before[index] == layout(fused.kwargs[names[index]].meta["val"]), names[index]
    assert all("val" in node.meta for node in graph.nodes if node.op != "output")


def layout(value):
    return value.dtype, str(list(value.shape)), str(value.stride()), str(value.storage_offset())


def test_the_op_reads_the_query_where_it_was_projected():
    graph = graph_of(Absorbing())
    MlaQAbsorb().rewrite(graph, site_in(graph), "")
    (fused,) = [node for node in graph.nodes if node.args and node.args[0] is OP]
    for name in ("q_nope", "q_pe"):
        assert fused.kwargs[name].target is aten.slice.Tensor
        assert fused.kwargs[name].meta["val"].stride() == (H * (NOPE + ROPE), NOPE + ROPE, 1)


WEIGHTS = {
    "parameter": (as_it_is, True),
    "part of kv_b_proj": (lambda self: self.kv_b.view(H, NOPE + 16, LATENT)[:, :NOPE], True),
    "as vLLM splits kv_b_proj": (
        lambda self: self.kv_b.T.view(LATENT, H, NOPE + 16).split([NOPE, 16], dim=-1)[0].permute(1, 2, 0),
        True,
    ),
    "copy": (lambda self: self.kv_b.view(H, NOPE + 16, LATENT)[:, :NOPE].contiguous(), False),
    "computed": (lambda self: self.w_uk * 0.5, False),
    "cast": (lambda self: self.exact.to(DTYPE), False),
}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_of_every_origin_give_the_results_of_eager(weight):
    form, constant = WEIGHTS[weight]
    site = assert_fused(Absorbing(weight=form))
    assert ("w_constant=1" in site.problem) == constant


@pytest.mark.parametrize("change", ["all of it", "a part"])
def test_a_weight_that_the_graph_writes_is_read_before_that_and_is_not_constant(change):
    def also(nope, q, w_uk):
        (w_uk if change == "all of it" else w_uk[0]).mul_(3)
        return [w_uk * 2]

    site = assert_fused(Absorbing(also=also))
    assert "w_constant" not in site.problem


# ---- results --------------------------------------------------------------------------------------------------------


def assert_fused(model, args=None, cache=None, dynamic=False, options=FUSE, op=ABSORBED, run=None, tolerance=2e-2):
    """One site is fused into ``op``; results and cache are those of eager. Returns the site's report."""
    args, cache = args or hidden(), cache or latents(T)
    eager, fused = assert_like_eager(model, args, cache, options=options, dynamic=dynamic, run=run, tolerance=tolerance)
    (site,) = [site for site in last_reports()[-1].sites if site.fused]
    assert site.op == op, last_reports()[-1]
    assert_written_alike(cache[0], eager[0], fused[0])
    return site


def assert_written_alike(before, expected, fused):
    """The latent is copied and all other rows are left, to the bit."""
    bits = [each.view(torch.uint8).flatten(0, -2) for each in (before, expected, fused)]
    written = (bits[0] != bits[1]).any(-1)
    width = LATENT * before.element_size()
    assert written.any()
    assert torch.equal(bits[2][~written], bits[0][~written])
    assert torch.equal(bits[2][:, :width], bits[1][:, :width])


@pytest.mark.parametrize("write", [mla_operator, mla_flat], ids=named)
@pytest.mark.parametrize("rotate", MLA_ROTATIONS)
def test_a_layer_that_multiplies_what_it_has_rotated(rotate, write):
    site = assert_fused(Mla(MLA_ROTATIONS[rotate], write))
    assert f"qk_nope_dim={NOPE}" in site.problem
    assert ("deinterleave=1" in site.problem) == ("halves out" in rotate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("product", PRODUCTS, ids=named)
def test_results_and_cache_are_those_of_eager(product, dtype):
    assert_fused(Absorbing(product, dtype=dtype), hidden(dtype=dtype), latents(T, dtype))


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "mark_dynamic"])
def test_one_graph_serves_any_number_of_tokens(dynamic):
    model, before = Absorbing(by_einsum), last_reports()
    with without_code_generation(), torch.no_grad():
        compiled = torch.compile(model, backend="autofuse", dynamic=dynamic, options=FUSE)
        for tokens in (6, 3, 17):
            args, cache, eager = hidden(tokens), latents(tokens), latents(tokens)
            if dynamic is None:
                for tensor in (*args, cache[1]):
                    torch._dynamo.mark_dynamic(tensor, 0)
            for result, right in zip(compiled(*args, *cache), model(*args, *eager), strict=True):
                torch.testing.assert_close(result, right, atol=2e-2, rtol=2e-2)
            assert_written_alike(latents(tokens)[0], eager[0], cache[0])
    (report,) = {report.key: report for report in last_reports()[len(before) :]}.values()
    (site,) = [site for site in report.sites if site.fused]
    assert (site.op, site.tokens) == (ABSORBED, "2…∞")


def test_a_batch_of_sequences():
    """As DeepSeek's own inference code multiplies."""

    def product(q, w):
        return torch.einsum("bshp,hpl->bshl", q, w)

    site = assert_fused(Absorbing(product), hidden(2, 3))
    assert site.tokens == "6"


def test_padded_tokens_write_nothing():
    cache, slots = latents(T)
    slots[::2] = -1
    assert_fused(Absorbing(write=mla_operator), cache=(cache, slots))


def test_factors_may_be_read_by_others():
    assert_fused(Absorbing(also=lambda nope, q, w_uk: [q + 1, q[..., :NOPE].transpose(0, 1) * 2, w_uk + 1]))


def test_inference_mode():
    model, args, cache, eager = Absorbing(), hidden(), latents(T), latents(T)
    with without_code_generation(), torch.inference_mode():
        results = torch.compile(model, backend="autofuse", dynamic=False, options=FUSE)(*args, *cache)
        expected = model(*args, *eager)
    (site,) = [site for site in last_reports()[-1].sites if site.fused]
    assert site.op == ABSORBED
    for result, right in zip([*results, *cache], [*expected, *eager], strict=True):
        torch.testing.assert_close(result, right, atol=2e-2, rtol=2e-2)


def test_generated_code_multiplies_nothing_itself_and_copies_nothing():
    codes = []

    def run(compiled, *args):
        results, code = run_and_get_code(compiled, *args)
        codes.extend(code)
        return results

    assert_fused(Absorbing(write=mla_operator, rotate=vllm_gptj), run=run)
    text = "\n".join(codes)
    (call,) = re.findall(rf"{ABSORBED}\.default\((.*)\)", text)
    assert not re.findall(r"bmm|copy_\(|clone|index_put|_cat_|rotary_embedding", text.replace(call, ""))


# ---- with the product, or without -----------------------------------------------------------------------------------


def problems():
    """The problems of the layer's two sites, by op."""
    with without_code_generation(), torch.no_grad():
        torch.compile(Absorbing(), backend="autofuse", dynamic=False, options={"autofuse.level": "O3"})(
            *hidden(), *latents(T)
        )
    return {site.op: Problem.parse(site.problem) for site in last_reports()[-1].sites if "rope" in site.op}


MEASURED = {
    "with the product saves more": ({ABSORBED: 8.0, WITHOUT: 5.0}, ABSORBED),
    "without saves more": ({ABSORBED: 4.0, WITHOUT: 5.0}, WITHOUT),
    "with the product is slower": ({ABSORBED: -2.0, WITHOUT: 5.0}, WITHOUT),
    "without is slower": ({ABSORBED: 3.0, WITHOUT: -1.0}, ABSORBED),
    "with the product is not tuned": ({WITHOUT: 5.0}, WITHOUT),
    "without is not tuned": ({ABSORBED: 5.0}, ABSORBED),
}


@pytest.mark.parametrize("measured", MEASURED)
@pytest.mark.parametrize("untuned", ["skip", "fuse"])
def test_the_one_that_saves_more_measured_time_is_fused(measured, untuned):
    saved, op = MEASURED[measured]
    of = problems()
    tuned(*(winner_of(of[each], T, us) for each, us in saved.items()))
    assert_fused(Absorbing(), options={"autofuse.level": "O3", "autofuse.untuned": untuned}, op=op)
    (other,) = [site for site in last_reports()[-1].sites if "rope" in site.op and not site.fused]
    assert other.op == (WITHOUT if op == ABSORBED else ABSORBED)
    if len(saved) == 2 and min(saved.values()) > 0:
        assert other.rule == "overlap"
        assert f"{op} (" in other.reason
        assert f"replaces nodes of it and saves {saved[op]:.2f} µs" in other.reason
        assert f"this one saves {saved[other.op]:.2f} µs" in other.reason
    elif len(saved) == 2:
        assert other.rule not in ("overlap", "untuned")


def test_what_nobody_measured_is_left_and_both_sites_are_noted():
    of = problems()
    assert {*of} == {ABSORBED, WITHOUT}
    assert last_reports()[-1].fused == 0
    with TunedDatabase(default_path()) as database:
        assert {captured.problem for captured in database.captured()} >= {*of.values()}


def test_it_is_on_from_level_3():
    for level, op in (("O2", WITHOUT), ("O3", ABSORBED)):
        assert_fused(Absorbing(), options={**FUSE, "autofuse.level": level}, op=op)


def test_its_flag_beats_the_level():
    assert_fused(Absorbing(), options={**FUSE, "autofuse.fuse_mla_q_absorb": False}, op=WITHOUT)
    alone = {**FUSE, "autofuse.level": "O0", "autofuse.fuse_mla_q_absorb": True}
    assert_fused(Absorbing(), options=alone)


# ---- what must not be fused -----------------------------------------------------------------------------------------


def assert_refused(model, why, args=None, cache=None):
    """The product is left, and the rest is fused as without it."""
    assert_fused(model, args, cache, op=WITHOUT)
    (site,) = [site for site in last_reports()[-1].sites if site.op == ABSORBED]
    assert site.rule == "refused"
    assert re.search(why, site.reason), site.reason


@pytest.mark.parametrize(
    ("also", "why"),
    [
        (lambda nope, q, w_uk: [nope + 1], "the absorbed part of the query, is also read by add"),
        (lambda nope, q, w_uk: [nope], "the absorbed part of the query, is also read by the graph's output"),
        (lambda nope, q, w_uk: [nope.transpose(0, 1).sum(0)], "the absorbed part of the query, is also read by "),
    ],
    ids=["another reader", "an output", "a reader of the product itself"],
)
def test_a_product_that_others_read_is_left(also, why):
    assert_refused(Absorbing(also=also), why)


def test_a_weight_that_is_stored_the_other_way_round_is_left():
    stored = Absorbing(weight=lambda self: self.turned.transpose(1, 2))
    stored.turned = nn.Parameter(stored.w_uk.transpose(1, 2).contiguous(), requires_grad=False)
    why = rf"the last dimension of permute\w* is not contiguous: strides \[{NOPE * LATENT}, 1, {NOPE}\]"
    assert_refused(stored, why)


def test_matrices_that_are_the_tokens_are_left():
    """As many tokens as heads: shapes do not tell them apart."""

    def product(q, w):
        return torch.bmm(q, w)

    assert_refused(Absorbing(product), "are not the heads of the query", hidden(H), latents(H))


def test_a_matrix_for_each_token_and_head_is_left():
    def product(q, w):
        return (q.unsqueeze(2) @ w).squeeze(2)

    assert_refused(Absorbing(product), "are not the heads of the query")


def test_fp32_is_left_to_what_multiplies_it():
    assert_fused(Absorbing(dtype=torch.float32), hidden(dtype=torch.float32), latents(T, torch.float32), op=WITHOUT)
    (site,) = [site for site in last_reports()[-1].sites if site.op == ABSORBED]
    assert site.rule == "unsupported"
    assert re.search("fp32.*bf16.*fp16", site.reason), site.reason


def test_a_query_without_a_product_is_no_site():
    for model in (Mla(rotate_by_cat(vllm_gptj), mla_flat, absorbed=False), Absorbing(lambda q, w: by_bmm(q, w) * 2)):
        assert MlaQAbsorb().match(recognise(graph_of(model))) == []


@pytest.mark.parametrize("what", ["rows", "weight"])
def test_nothing_is_read_after_it_is_written(what):
    graph = graph_of(Absorbing(), reorder=False)
    (product,) = graph.find_nodes(op="call_function", target=aten.bmm.default)
    factor = product.args[what == "weight"]
    with graph.inserting_after(product):
        written = graph.call_function(aten.mul_.Tensor, (factor, 2))
        written.meta["val"] = factor.meta["val"]
    assert "may write to a tensor between" in site_in(graph).refusal


def test_factors_of_two_dtypes_are_refused():
    graph = graph_of(Absorbing())
    (product,) = graph.find_nodes(op="call_function", target=aten.bmm.default)
    weight = product.args[1]
    with weight.meta["val"].fake_mode:
        weight.meta["val"] = weight.meta["val"].half()
    assert "is torch.float16, the query torch.bfloat16" in site_in(graph).refusal


def test_what_refuses_the_site_without_the_product_refuses_this_one():
    def write(cache, slots, kv_c, k_pe):
        cache.view(-1, LATENT + ROPE)[slots] = torch.cat([k_pe.squeeze(1), kv_c], dim=-1)

    assert "not the latent, then the rotated key" in site_in(graph_of(Absorbing(write=write))).refusal


def test_a_rewrite_that_fails_leaves_the_graph_as_it_was(monkeypatch):
    graph = graph_of(Absorbing())
    before = str(graph)
    site = site_in(graph)
    monkeypatch.setattr("autofuse.graph.rewrite.Replacement.reshape_like", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        MlaQAbsorb().rewrite(graph, site, "")
    assert str(graph) == before
    graph.lint()


# ---- where the layer's name tells the cache -------------------------------------------------------------------------

NAME = "layers.0.attn"


@pytest.fixture
def vllm_layer(monkeypatch):
    for name, module in vllm_standins.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_standins, "layers", {})

    def fresh():
        cache, slots = latents(T)
        vllm_standins.layers[NAME] = vllm_standins.Layer(
            kv_cache=cache, slot_mapping=slots, w_uk=torch.empty(0), w_uv=torch.empty(0), scale=1.0
        )
        return vllm_standins.layers[NAME]

    return fresh


class ByName(Absorbing):
    def forward(self, x, positions):
        q = (x @ self.w_q).view(-1, H, NOPE + ROPE)
        kv_c, k_pe = (x @ self.w_kv).split([LATENT, ROPE], dim=-1)
        nope = by_bmm(q[..., :NOPE], self.w_uk)
        q_pe, k_pe = (self.rotate(rows, self.table, positions) for rows in (q[..., NOPE:], k_pe.unsqueeze(1)))
        scale = torch.ones(())
        done = torch.ops.vllm.unified_mla_kv_cache_update(kv_c * 2, k_pe, layer_name(NAME), "auto", scale)
        return torch.cat([nope, q_pe], dim=-1) * 2, done


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_cache_that_the_layers_name_tells(vllm_layer, dynamic):
    model, args = ByName(), hidden()
    layer = vllm_layer()
    before = layer.kv_cache.clone()
    (expected, _), eager = model(*args), layer.kv_cache
    layer = vllm_layer()
    with without_code_generation(), torch.no_grad():
        result, _ = torch.compile(model, backend="autofuse", dynamic=dynamic, options=FUSE)(*args)
    (site,) = [site for site in last_reports()[-1].sites if site.fused]
    assert (site.op, site.fusion) == (ABSORBED, "fuse_mla_q_absorb")
    assert "cache=auto" in site.problem
    assert layer.updates == 0  # the kernel wrote, and vLLM's operator was not asked
    torch.testing.assert_close(result, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(layer.kv_cache, eager, atol=2e-2, rtol=2e-2)
    assert_written_alike(before, eager, layer.kv_cache)


def test_vllms_operator_writes_where_the_layer_does_so_in_its_own_way(vllm_layer):
    model, args = ByName(), hidden()
    layer = vllm_layer()
    layer.slot_mapping = None
    expected, _ = model(*args)
    before = layer.kv_cache.clone()
    with without_code_generation(), torch.no_grad():
        result, _ = torch.compile(model, backend="autofuse", dynamic=False, options=FUSE)(*args)
    torch.testing.assert_close(result, expected, atol=2e-2, rtol=2e-2)
    assert layer.updates == 2  # by the model, and by the compiled one
    assert torch.equal(layer.kv_cache, before)


def test_the_operator_by_name_takes_the_place_of_the_product(vllm_layer):
    vllm_layer()
    graph = post_grad_graph(ByName(), *hidden())
    (site,) = LayerMlaQAbsorb().match(recognise(graph))
    assert site.refusal is None
    LayerMlaQAbsorb().rewrite(graph, site, "")
    graph.lint()
    (fused,) = graph.find_nodes(op="call_function", target=by_name_op(ABSORBED))
    assert fused.args[0].meta["val"].shape == (T, H, NOPE)
    assert not graph.find_nodes(op="call_function", target=aten.bmm.default)
