"""RoPE and vLLM's cache update by a layer's name become one operator, which finds cache and slots as vLLM's does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import vllm_standins
from models import isolate, post_grad_graph, without_code_generation
from rope_dialects import vllm_neox
from torch import nn
from torch._inductor.utils import run_and_get_code
from vllm_standins import layer_name

from autofuse.graph.fusions.layer_mla_rope import LayerMlaRope
from autofuse.graph.recognise import recognise
from autofuse.graph.report_store import last_reports
from autofuse.runtime.layer_ops import by_name_op

H, HIDDEN, LATENT, ROPE, NOPE, VALUE, P = 4, 64, 32, 16, 24, 16, 64
BLOCKS, BLOCK = 4, 8
DTYPE = torch.bfloat16
FUSE = {"autofuse.untuned": "fuse", "autofuse.fuse_mla_dual_rms_norm": False}
NAMES = ("layers.0.attn", "layers.1.attn")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")
    for name, module in vllm_standins.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_standins, "layers", {})


def set_layers(dtype=DTYPE, slots=None, **changes):
    """The same layers again, with fresh caches. Returns these."""
    torch.manual_seed(3)
    for name in NAMES:
        vllm_standins.layers[name] = vllm_standins.Layer(
            kv_cache=torch.zeros(BLOCKS, BLOCK, LATENT + ROPE, dtype=dtype),
            slot_mapping=torch.arange(6) if slots is None else slots,
            w_uk=torch.randn(H, NOPE, LATENT, dtype=DTYPE) / 4,
            w_uv=torch.randn(H, LATENT, VALUE, dtype=DTYPE) / 4,
            scale=0.01,
        )
        for attribute, value in changes.items():
            setattr(vllm_standins.layers[name], attribute, value)
    return [vllm_standins.layers[name] for name in NAMES]


def by_operator(q, k_pe, table, positions):
    torch.ops._C.rotary_embedding(positions, q, k_pe, ROPE, table, False)
    return q, k_pe


def natively(q, k_pe, table, positions):
    return vllm_neox(q, table, positions), vllm_neox(k_pe, table, positions)


class Attention(nn.Module):
    """An MLA layer as vLLM's ``MultiHeadLatentAttentionWrapper`` runs it: a part of q is rotated in place."""

    def __init__(self, name, rotate=by_operator, kv_cache_dtype="auto"):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.rotate, self.kv_cache_dtype = name, rotate, kv_cache_dtype
        for weight, sizes in (("w_q", (HIDDEN, H * (NOPE + ROPE))), ("w_kv", (HIDDEN, LATENT + ROPE))):
            self.register_buffer(weight, torch.randn(sizes, dtype=DTYPE) / 8)
        self.register_buffer("table", torch.randn(P, ROPE).to(DTYPE))
        self.register_buffer("k_scale", torch.full((), 0.5))

    def forward(self, x, positions):
        q = (x @ self.w_q).view(-1, H, NOPE + ROPE)
        kv_c, k_pe = (x @ self.w_kv).split([LATENT, ROPE], dim=-1)
        kv_c, k_pe = kv_c * 2, k_pe.unsqueeze(1)
        q[..., NOPE:], k_pe = self.rotate(q[..., NOPE:], k_pe, self.table, positions)
        name = layer_name(self.name)
        done = torch.ops.vllm.unified_mla_kv_cache_update(kv_c, k_pe, name, self.kv_cache_dtype, self.k_scale)
        out = torch.empty(x.shape[0], H * VALUE, dtype=x.dtype)
        torch.ops.vllm.unified_mla_attention_with_output(q, kv_c, k_pe, out, name, kv_cache_dummy_dep=done)
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


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("rotate", [by_operator, natively], ids=lambda function: function.__name__)
def test_values_and_caches_are_those_of_eager(rotate, dynamic):
    first, second = (Attention(name, rotate) for name in NAMES)

    def model(x, positions):
        return second(x + first(x, positions), positions)

    layers = set_layers()
    expected, caches = model(*inputs()), [layer.kv_cache.clone() for layer in layers]
    layers = set_layers()
    result = compiled(model, inputs(), dynamic)
    sites = fused_sites()
    assert [(site.op, site.fusion) for site in sites] == [("mla_rope_kv_cache_cat", "fuse_rope_kvcache_cat_mla")] * 2
    assert all(f"latent_dim={LATENT}" in site.problem and "cache=auto" in site.problem for site in sites)
    close(result, expected)
    for layer, cache in zip(layers, caches, strict=True):
        assert layer.updates == 0  # the kernel wrote, and vLLM's operator was not asked
        assert cache.any()
        close(layer.kv_cache, cache)


def test_attention_still_waits_for_the_update():
    set_layers()
    graph = post_grad_graph(Attention(NAMES[0]), *inputs())
    (site,) = LayerMlaRope().match(recognise(graph))
    assert site.refusal is None
    LayerMlaRope().rewrite(graph, site, "")
    graph.lint()
    (fused,) = graph.find_nodes(op="call_function", target=by_name_op(LayerMlaRope.op))
    (attention,) = (node for node in graph.nodes if "auto_functionalized" in str(node.target))
    dependency = attention.kwargs["kv_cache_dummy_dep"]
    assert (dependency.args[0], dependency.args[1]) == (fused, 2)
    left = {str(node.target) for node in graph.nodes}
    assert not any("kv_cache_update" in name or "rotary" in name or "slice_scatter" in name for name in left)
    assert all("val" in node.meta for node in graph.nodes if node.op != "output")


def test_slots_that_are_padded_or_fewer_than_tokens_write_nothing():
    slots = torch.tensor([3, -1, 9, 4])
    model = Attention(NAMES[0])
    (layer, _) = set_layers(slots=slots)
    compiled(model, inputs())
    cached = layer.kv_cache.flatten(0, 1)
    assert [row for row in range(len(cached)) if cached[row].any()] == [3, 4, 9]
    assert layer.updates == 0


def test_without_a_slot_mapping_nothing_is_written():
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
    close(result, model(*inputs()))


class OwnImpl(vllm_standins.MLAAttentionImpl):
    def do_kv_cache_update(self, kv_c, k_pe, kv_cache, slots, kv_cache_dtype, k_scale, skip_scale=False):
        kv_cache.view(-1, LATENT + ROPE)[slots, :LATENT] = -kv_c


@pytest.mark.parametrize(
    "changes",
    [{"impl": OwnImpl()}, {"use_pcp": True}, {"hisparse_cache": object()}],
    ids=lambda changes: "-".join(changes),
)
def test_a_layer_that_writes_in_another_way_is_asked_to(changes):
    model = Attention(NAMES[0])
    layer, _ = set_layers(**changes)
    expected = model(*inputs())
    cache = layer.kv_cache.clone()
    layer, _ = set_layers(**changes)
    result = compiled(model, inputs())
    assert len(fused_sites()) == 1
    assert layer.updates == 1
    close(result, expected)
    close(layer.kv_cache, cache)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
def test_an_fp8_cache_is_written_by_its_scale(dtype, monkeypatch):
    monkeypatch.setattr(vllm_standins, "_attention", lambda q, layer: q.new_zeros(q.shape[0], H, VALUE))
    model = Attention(NAMES[0], kv_cache_dtype="fp8")
    caches = []
    for run in (lambda: model(*inputs()), lambda: compiled(model, inputs())):
        layer, _ = set_layers(dtype)
        run()
        caches.append(layer.kv_cache.view(torch.float8_e4m3fn).float())
    assert "cache=fp8" in fused_sites()[0].problem
    assert caches[0].any()
    torch.testing.assert_close(caches[1], caches[0], rtol=2**-3, atol=2**-9)


def test_a_cache_that_the_op_does_not_write_is_refused_by_name():
    set_layers(torch.uint8)
    graph = post_grad_graph(Attention(NAMES[0], kv_cache_dtype="fp8_e5m2"), *inputs())
    (site,) = LayerMlaRope().match(recognise(graph))
    assert "the cache is of dtype 'fp8_e5m2', which the op does not write" in site.refusal


def test_an_update_does_not_move_above_another_call_of_its_layer():
    """Nothing but the order in the graph says that this attention reads the cache as it was."""
    table, scale = torch.randn(P, ROPE).to(DTYPE), torch.full((), 0.5)

    def function(q, kv_c, k_pe, positions):
        q, k_pe = natively(q, k_pe, table, positions)
        query = torch.cat([q.new_ones(q.shape[0], H, NOPE), q], dim=-1)
        out = torch.empty(q.shape[0], H * VALUE, dtype=q.dtype)
        torch.ops.vllm.unified_mla_attention_with_output(query, kv_c, k_pe, out, layer_name(NAMES[0]))
        return out, torch.ops.vllm.unified_mla_kv_cache_update(kv_c, k_pe, layer_name(NAMES[0]), "auto", scale)

    set_layers()
    sizes = ((6, H, ROPE), (6, LATENT), (6, 1, ROPE))
    args = (*(torch.randn(size, dtype=DTYPE) for size in sizes), torch.arange(6))
    found = recognise(post_grad_graph(function, *args, reorder=False))
    (site,) = LayerMlaRope().match(found)
    assert "may find the same layer" in (site.refusal or "")


def test_inductor_runs_it_as_it_is():
    model = Attention(NAMES[0])
    layer, _ = set_layers()
    expected, cache = model(*inputs()), layer.kv_cache.clone()
    layer, _ = set_layers()
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(model, backend="autofuse", options=FUSE, dynamic=False)
        result, (code,) = run_and_get_code(run, *inputs())
    assert "mla_rope_kv_cache_cat_by_name" in code
    assert "unified_mla_kv_cache_update" not in code
    close(result, expected)
    close(layer.kv_cache, cache)


# ---- graphs that are split ------------------------------------------------------------------------------------------

UPDATE = "vllm::unified_mla_kv_cache_update"


@pytest.mark.parametrize("name", [UPDATE, f"{UPDATE}.default"])
def test_an_update_that_splits_the_graph_is_not_fused(name):
    set_layers()
    compiled(Attention(NAMES[0]), inputs(), options={**FUSE, "autofuse.splitting_ops": [name]})
    by_op = {site.rule: site for site in last_reports()[-1].sites}
    assert not any("latent_dim=32" in site.problem for site in fused_sites())
    assert by_op["split"].reason.startswith(f"{name} is in autofuse.splitting_ops")


def test_inductor_partitions_after_the_fusion():
    set_layers()
    partition = {"autofuse.splitting_ops": [UPDATE], "autofuse.use_inductor_graph_partition": True}
    compiled(Attention(NAMES[0]), inputs(), options={**FUSE, **partition})
    assert "cache=auto" in fused_sites()[0].problem


@pytest.mark.skipif("VLLM_USE_LAYERNAME" in os.environ, reason="this is that process")
def test_all_of_it_with_names_that_are_objects():
    environment = {**os.environ, "VLLM_USE_LAYERNAME": "1"}
    chosen = "eager or waits or slot_mapping or inductor_runs"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
