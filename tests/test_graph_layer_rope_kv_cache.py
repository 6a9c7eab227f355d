"""RoPE and vLLM's update of a GQA cache by its layer's name become one operator, which finds the cache when it runs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
import vllm_standins
from models import RMSNorm, isolate, post_grad_graph, without_code_generation
from rope_dialects import first_columns, hugging_face_interleaved, vllm_neox
from torch import nn
from torch._inductor.utils import run_and_get_code
from vllm_standins import FlashAttentionImpl, HeadLayer, TritonAttentionImpl, layer_name

from autofuse.graph.fusions.layer_rope_kv_cache import LayerRopeKvCache
from autofuse.graph.graph_pass import _layer_facts
from autofuse.graph.recognise import recognise
from autofuse.graph.report_store import last_reports
from autofuse.runtime.layer_ops import by_name_op

H, KV, D, HIDDEN, P = 4, 2, 16, 64, 64
BLOCKS, BLOCK = 4, 8
DTYPE = torch.bfloat16
E4M3 = torch.float8_e4m3fn
FUSE = {"autofuse.untuned": "fuse"}
NAMES = ("layers.0.attn", "layers.1.attn")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")
    for name, module in vllm_standins.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_standins, "layers", {})


def side_by_side(kv, dtype):
    return torch.zeros(BLOCKS, kv, BLOCK, 2 * D, dtype=dtype)


def side_by_side_nhd(kv, dtype):
    return torch.zeros(BLOCKS, BLOCK, kv, 2 * D, dtype=dtype).transpose(1, 2)


def pair_first(kv, dtype):
    return torch.zeros(2, BLOCKS, BLOCK, kv, D, dtype=dtype)


def pair_first_hnd(kv, dtype):
    return torch.zeros(2, BLOCKS, kv, BLOCK, D, dtype=dtype).transpose(2, 3)


def pair_second(kv, dtype):
    return torch.zeros(BLOCKS, 2, BLOCK, kv, D, dtype=dtype)


def pair_second_hnd(kv, dtype):
    return torch.zeros(BLOCKS, 2, kv, BLOCK, D, dtype=dtype).transpose(2, 3)


def set_layers(make=side_by_side, dtype=DTYPE, kv_cache_dtype="auto", scales=(), kv=KV, impl=FlashAttentionImpl):
    """The same layers again, with fresh caches. Returns these."""
    pairs = {"pair_f": 0, "pair_s": 1}.get(make.__name__[:6])
    for name in NAMES:
        cache = make(kv, dtype)
        layer = HeadLayer(cache, torch.tensor([3, 9, 4, 31, 0, 12]), impl(kv_cache_dtype, pairs))
        for attribute, value in zip(("_k_scale", "_v_scale"), scales, strict=False):
            setattr(layer, attribute, value)
        vllm_standins.layers[name] = layer
    return [vllm_standins.layers[name] for name in NAMES]


def by_operator(q, k, table, positions):
    torch.ops._C.rotary_embedding(positions, q, k, D, table, True)
    return q, k


def natively(q, k, table, positions):
    q, k = (vllm_neox(rows.unflatten(-1, (-1, D)), table, positions) for rows in (q, k))
    return q.flatten(-2), k.flatten(-2)


class Attention(nn.Module):
    """As vLLM's Llama and its ``Attention.forward``. With ``norm``, heads are normed first, as in Qwen3."""

    def __init__(self, name, rotate=by_operator, kv=KV, norm=False, table=D):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.rotate, self.kv = name, rotate, kv
        self.norms = nn.ModuleList(RMSNorm(D, DTYPE) for _ in range(2)).requires_grad_(False) if norm else None
        self.register_buffer("w", torch.randn(HIDDEN, (H + 2 * kv) * D, dtype=DTYPE) / 8)
        self.register_buffer("table", torch.randn(P, table).to(DTYPE))

    def forward(self, x, positions):
        q, k, v = (x @ self.w).split([H * D, self.kv * D, self.kv * D], dim=-1)
        if self.norms is not None:
            q, k = (norm(y.unflatten(-1, (-1, D))).flatten(-2) for norm, y in zip(self.norms, (q, k), strict=True))
        q, k = self.rotate(q, k, self.table, positions)
        q, k, v = q.view(-1, H, D), k.view(-1, self.kv, D), v.view(-1, self.kv, D)
        name, out = layer_name(self.name), torch.empty(x.shape[0], H * D, dtype=x.dtype)
        done = torch.ops.vllm.unified_kv_cache_update(k, v, name)
        torch.ops.vllm.unified_attention_with_output(q, k, v, out.view(-1, H, D), name, kv_cache_dummy_dep=done)
        return out


def inputs(tokens=6):
    torch.manual_seed(1)
    return torch.randn(tokens, HIDDEN, dtype=DTYPE), torch.randperm(P)[:tokens]


def compiled(model, args, dynamic=False, options=FUSE):
    with without_code_generation(), torch.no_grad():
        return torch.compile(model, backend="autofuse", options=options, dynamic=dynamic)(*args)


def fused_sites():
    return [site for site in last_reports()[-1].sites if site.fused]


def close(result, expected):
    torch.testing.assert_close(result.float(), expected.float(), atol=2e-2, rtol=2e-2)


def compare(model, args, fresh_layers, dynamic=False):
    """Eager and compiled: the same results, and the same caches, which the kernel wrote."""
    layers = fresh_layers()
    expected, caches = model(*args), [layer.kv_cache.clone() for layer in layers]
    layers = fresh_layers()
    result = compiled(model, args, dynamic)
    close(result, expected)
    for layer, cache in zip(layers, caches, strict=True):
        assert layer.updates == 0  # vLLM's operator was not asked
        kept = (each.view(E4M3) if each.dtype == torch.uint8 else each for each in (layer.kv_cache, cache))
        close(*kept)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("rotate", [by_operator, natively], ids=lambda function: function.__name__)
def test_values_and_caches_are_those_of_eager(rotate, dynamic):
    first, second = (Attention(name, rotate) for name in NAMES)
    compare(lambda x, positions: second(x + first(x, positions), positions), inputs(), set_layers, dynamic)
    sites = fused_sites()
    assert [(site.op, site.fusion) for site in sites] == [("rope_kv_cache", "fuse_rope_kvcache")] * 2
    assert all("cache=auto" in site.problem and "return_k=1" in site.problem for site in sites)


LAYOUTS = [side_by_side, side_by_side_nhd, pair_first, pair_first_hnd, pair_second, pair_second_hnd]


def one_layer(model, make, **options):
    """``compare`` with a model of one layer."""
    compare(model, inputs(), lambda: set_layers(make, **options)[:1])
    (site,) = fused_sites()
    return site


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_a_cache_is_written_in_each_layout(make):
    one_layer(Attention(NAMES[0]), make, impl=TritonAttentionImpl)


@pytest.mark.parametrize("make", [side_by_side_nhd, pair_second], ids=lambda make: make.__name__)
@pytest.mark.parametrize("sizes", [(), (KV,)], ids=["one scale", "for each head"])
@pytest.mark.parametrize("dtype", [torch.uint8, E4M3], ids=str)
def test_an_fp8_cache_is_written_by_its_layers_scales(dtype, sizes, make, monkeypatch):
    monkeypatch.setattr(vllm_standins, "_attention_to_cache", lambda query, layer: query.clone())
    scales = tuple(0.02 + 0.02 * torch.rand(sizes) for _ in range(2))
    options = {"dtype": dtype, "kv_cache_dtype": "fp8", "scales": scales}
    site = one_layer(Attention(NAMES[0]), make, **options)
    assert ("cache=fp8_per_head" if sizes else "cache=fp8,") in site.problem


def test_norms_of_the_heads_are_taken_along():
    assert "qk_norm=1" in one_layer(Attention(NAMES[0], natively, norm=True), side_by_side).problem


def test_a_part_of_the_heads_may_be_rotated_and_neighbours_come_out_as_halves():
    def rotate(q, k, table, positions):
        rope = first_columns(hugging_face_interleaved)
        q, k = (rope(rows.unflatten(-1, (-1, D)), table, positions) for rows in (q, k))
        return q.flatten(-2), k.flatten(-2)

    site = one_layer(Attention(NAMES[0], rotate, table=D // 2), side_by_side)
    assert "rope_dim=8" in site.problem
    assert "deinterleave=1" in site.problem


def test_of_as_many_heads_the_key_is_what_is_written():
    def rotate(q, k, table, positions):
        k, q = natively(k, q, table, positions)
        return q, k

    assert "kv_heads=4" in one_layer(Attention(NAMES[0], rotate, kv=H), side_by_side, kv=H).problem


def test_attention_still_waits_for_the_update():
    set_layers()
    graph = post_grad_graph(Attention(NAMES[0]), *inputs())
    (site,) = LayerRopeKvCache().match(recognise(graph))
    assert site.refusal is None
    LayerRopeKvCache().rewrite(graph, site, "")
    graph.lint()
    (fused,) = graph.find_nodes(op="call_function", target=by_name_op("rope_kv_cache"))
    (attention,) = (node for node in graph.nodes if "auto_functionalized" in str(node.target))
    dependency = attention.kwargs["kv_cache_dummy_dep"]
    assert (dependency.args[0], dependency.args[1]) == (fused, 2)
    left = {str(node.target) for node in graph.nodes}
    assert not any("kv_cache_update" in name or "rotary" in name or "slice_scatter" in name for name in left)
    assert all("val" in node.meta for node in graph.nodes if node.op != "output")


def test_a_key_that_nobody_else_reads_is_not_returned():
    def function(x, positions, table):
        q, k, v = (x[:, part * KV * D : (part + 1) * KV * D].view(-1, KV, D) for part in range(3))
        q, k = (vllm_neox(rows, table, positions) for rows in (q, k))
        return q, torch.ops.vllm.unified_kv_cache_update(k, v, layer_name(NAMES[0]))

    set_layers()
    args = (torch.randn(6, 3 * KV * D, dtype=DTYPE), torch.arange(6), torch.randn(P, D).to(DTYPE))
    graph = post_grad_graph(function, *args)
    (site,) = LayerRopeKvCache().match(recognise(graph))
    assert ("return_k", False) in site.params
    LayerRopeKvCache().rewrite(graph, site, "")
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)


def test_slots_that_are_padded_or_fewer_than_tokens_write_nothing():
    layer, _ = set_layers(pair_first)
    layer.slot_mapping = torch.tensor([3, -1, 9, 4])
    compiled(Attention(NAMES[0]), inputs())
    for cached in layer.kv_cache.flatten(1, 2):
        assert [row for row in range(len(cached)) if cached[row].any()] == [3, 4, 9]
    assert layer.updates == 0


# ---- where a kernel must not write ----------------------------------------------------------------------------------


def test_without_a_slot_mapping_nothing_is_written_and_nothing_said(caplog):
    """As while vLLM measures how much memory a model takes."""
    model = Attention(NAMES[0])
    layer, _ = set_layers()
    layer.slot_mapping = None
    layer.kv_cache.normal_()
    before = layer.kv_cache.clone()
    result = compiled(model, inputs())
    assert len(fused_sites()) == 1
    assert torch.equal(layer.kv_cache, before)
    assert layer.updates == 1  # vLLM's operator was asked, which skips
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    close(result, model(*inputs()))


class OwnImpl(FlashAttentionImpl):
    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        keys, values = self.key_and_value(kv_cache)
        for cache, rows in ((keys, key), (values, value)):
            cache[slots // BLOCK, slots % BLOCK] = -rows


def shares(layer):
    layer.impl.kv_sharing_target_layer_name = NAMES[1]


def encodes(layer):
    layer.impl.attn_type = "encoder_only"


def has_its_own_way(layer):
    layer.impl = OwnImpl()


@pytest.mark.parametrize("change", [shares, encodes, has_its_own_way], ids=lambda change: change.__name__)
def test_a_layer_that_writes_in_another_way_is_left_alone(change):
    change(set_layers()[0])
    (site,) = LayerRopeKvCache().match(recognise(post_grad_graph(Attention(NAMES[0]), *inputs())))
    assert f"the attention of {NAMES[0]} writes its cache in a way of its own" in site.refusal


@pytest.mark.parametrize("change", [has_its_own_way], ids=lambda change: change.__name__)
def test_a_layer_that_has_changed_since_is_asked_and_said_so_once(change, caplog):
    model, args = Attention(NAMES[0]), inputs()
    layer, _ = set_layers()
    change(layer)
    expected, cache = model(*args), layer.kv_cache.clone()
    layer, _ = set_layers()
    with without_code_generation(), torch.no_grad():
        run = torch.compile(model, backend="autofuse", options=FUSE, dynamic=False)
        run(*args)
        change(layer)
        for _ in range(2):
            close(run(*args), expected)
    assert layer.updates == 2
    close(layer.kv_cache, cache)
    said = [record.message for record in caplog.records if "leaves the cache" in record.message]
    assert said == [f"rope_kv_cache leaves the cache of {NAMES[0]} to vLLM: OwnImpl writes it in a way of its own"]


def test_a_cache_that_is_of_another_kind_than_the_plan_is_written_by_the_reference(caplog):
    model, args = Attention(NAMES[0]), inputs()
    fp8 = {"dtype": torch.uint8, "kv_cache_dtype": "fp8"}
    layer, _ = set_layers(**fp8)
    model(*args)
    cache = layer.kv_cache.view(E4M3)
    set_layers()
    with without_code_generation(), torch.no_grad():
        run = torch.compile(model, backend="autofuse", options=FUSE, dynamic=False)
        run(*args)
        layer, _ = set_layers(**fp8)
        run(*args), run(*args)
    assert layer.updates == 0
    torch.testing.assert_close(layer.kv_cache.view(E4M3).float(), cache.float(), rtol=2**-3, atol=2**-9)
    assert len([record for record in caplog.records if "the plan is for" in record.message]) == 1


@pytest.mark.parametrize(
    ("cache", "why"),
    [
        (torch.zeros(2, 2, BLOCK, KV, D, dtype=DTYPE), "it is [2, 2, 8, 2, 16], the key has 2 heads of 16"),
        (torch.zeros(BLOCKS, KV, BLOCK, 3 * D, dtype=DTYPE), "it is [4, 2, 8, 48]"),
        (torch.zeros(BLOCKS, KV, BLOCK, 2 * D), "it holds torch.float32, not contiguous rows of torch.bfloat16"),
        (torch.zeros(BLOCKS, KV, 2 * D, BLOCK, dtype=DTYPE).transpose(2, 3), "not contiguous rows"),
    ],
    ids=["either dimension tells key from value", "wider", "of another dtype", "columns apart"],
)
def test_a_cache_that_is_not_understood_is_left_to_vllm(cache, why, caplog, monkeypatch):
    monkeypatch.setattr(FlashAttentionImpl, "do_kv_cache_update", lambda self, *args: None)
    monkeypatch.setattr(vllm_standins, "_attention_to_cache", lambda query, layer: query.clone())
    layer, _ = set_layers()
    layer.kv_cache = cache
    compiled(Attention(NAMES[0]), inputs())
    assert layer.updates == len(fused_sites()) == 1
    assert why in caplog.text


def test_a_cache_that_the_op_does_not_write_is_refused_by_name():
    set_layers(kv_cache_dtype="fp8_e5m2", dtype=torch.uint8)
    (site,) = LayerRopeKvCache().match(recognise(post_grad_graph(Attention(NAMES[0]), *inputs())))
    assert f"the cache of {NAMES[0]} is of dtype 'fp8_e5m2', which the op does not write" in site.refusal


def test_outside_of_a_forward_context_nothing_is_known_of_the_cache(monkeypatch):
    set_layers()
    monkeypatch.delitem(sys.modules, "vllm.forward_context")
    (site,) = LayerRopeKvCache().match(recognise(post_grad_graph(Attention(NAMES[0]), *inputs())))
    assert "not known outside of vLLM's forward context" in site.refusal


def test_an_update_does_not_move_above_another_call_of_its_layer():
    """Nothing but the order in the graph says that this attention reads the cache as it was."""
    table = torch.randn(P, D).to(DTYPE)

    def function(q, k, v, positions):
        q, k = (vllm_neox(rows, table, positions) for rows in (q, k))
        out = torch.empty(q.shape[0], H, D, dtype=q.dtype)
        torch.ops.vllm.unified_attention_with_output(q, k, v, out, layer_name(NAMES[0]))
        return out, torch.ops.vllm.unified_kv_cache_update(k, v, layer_name(NAMES[0]))

    set_layers()
    args = (*(torch.randn(6, heads, D, dtype=DTYPE) for heads in (H, KV, KV)), torch.arange(6))
    (site,) = LayerRopeKvCache().match(recognise(post_grad_graph(function, *args, reorder=False)))
    assert "may find the same layer" in (site.refusal or "")


def test_an_update_without_a_rotation_is_a_near_miss():
    def function(k, v):
        return torch.ops.vllm.unified_kv_cache_update(k, v, layer_name(NAMES[0]))

    set_layers()
    found = recognise(post_grad_graph(function, *(torch.randn(6, KV, D) for _ in range(2))))
    (miss,) = LayerRopeKvCache().near_misses(found)
    assert miss.reason == "its key is not the rotated key of just one query"


def test_graphs_are_kept_apart_by_what_their_layers_caches_are():
    facts = []
    for options in ({}, {"kv_cache_dtype": "fp8"}, {"scales": (torch.ones(KV), torch.ones(KV))}):
        set_layers(**options)
        facts.append(str(_layer_facts()))
    assert len(set(facts)) == 3


def test_inductor_runs_it_as_it_is():
    model = Attention(NAMES[0])
    layer, _ = set_layers()
    expected, cache = model(*inputs()), layer.kv_cache.clone()
    layer, _ = set_layers()
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(model, backend="autofuse", options=FUSE, dynamic=False)
        result, (code,) = run_and_get_code(run, *inputs())
    assert "rope_kv_cache_by_name" in code
    assert "unified_kv_cache_update" not in code
    close(result, expected)
    close(layer.kv_cache, cache)


# ---- graphs that are split ------------------------------------------------------------------------------------------

UPDATE = "vllm::unified_kv_cache_update"


@pytest.mark.parametrize("name", [UPDATE, f"{UPDATE}.default"])
def test_an_update_that_splits_the_graph_is_not_fused(name):
    set_layers()
    compiled(Attention(NAMES[0]), inputs(), options={**FUSE, "autofuse.splitting_ops": [name]})
    by_rule = {site.rule: site for site in last_reports()[-1].sites}
    assert not any("cache=auto" in site.problem for site in fused_sites())
    assert by_rule["split"].reason.startswith(f"{name} is in autofuse.splitting_ops")


def test_inductor_partitions_after_the_fusion():
    set_layers()
    partition = {"autofuse.splitting_ops": [UPDATE], "autofuse.use_inductor_graph_partition": True}
    compiled(Attention(NAMES[0]), inputs(), options={**FUSE, **partition})
    assert "cache=auto" in fused_sites()[0].problem


# ---- names that are objects -----------------------------------------------------------------------------------------


@pytest.mark.skipif("VLLM_USE_LAYERNAME" not in os.environ, reason="here names are strings")
def test_a_name_that_is_an_input_may_be_any_layers():
    model = Attention(NAMES[0])
    set_layers()
    vllm_standins.layers[NAMES[1]].impl.kv_cache_dtype = "fp8"
    (site,) = LayerRopeKvCache().match(recognise(post_grad_graph(model, *inputs())))
    assert "the layers' caches are of several kinds, auto, fp8" in site.refusal


@pytest.mark.skipif("VLLM_USE_LAYERNAME" in os.environ, reason="this is that process")
def test_all_of_it_with_names_that_are_objects():
    environment = {**os.environ, "VLLM_USE_LAYERNAME": "1"}
    chosen = "eager or waits or slot_mapping or inductor_runs or may_be_any or changed_since"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
