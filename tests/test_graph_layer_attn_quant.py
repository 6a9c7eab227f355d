"""vLLM's attention operators quantise their output themselves, where nothing else reads it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import vllm_standins
from models import isolate, post_grad_graph, without_code_generation
from test_graph_quant import column_major, group_op, keepdim, nvfp4, static, static_op
from torch._inductor.utils import run_and_get_code
from vllm_standins import layer_name

from autofuse.graph.blocks import Found
from autofuse.graph.fusions.layer_attn_quant import LayerAttnQuant
from autofuse.graph.recognise import recognise
from autofuse.graph.report_store import last_reports
from autofuse.ops.quant import QuantFormat, ScaleLayout

HEADS, LATENT, ROPE, NOPE, VALUE = 4, 64, 8, 16, 128
DTYPE = torch.bfloat16
SCALE, GLOBAL_SCALE = torch.full((1,), 0.3), torch.full((1,), 300.0)
FOLD = {"autofuse.level": "O3", "autofuse.fuse_quant": False}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")
    for name, module in vllm_standins.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_standins, "layers", {})
    torch.manual_seed(0)
    for name in ("one", "two"):
        vllm_standins.layers[name] = vllm_standins.Layer(
            kv_cache=torch.randn(2, 16, LATENT + ROPE, dtype=DTYPE),
            slot_mapping=torch.arange(6),
            w_uk=torch.randn(HEADS, NOPE, LATENT, dtype=DTYPE) / 4,
            w_uv=torch.randn(HEADS, LATENT, VALUE, dtype=DTYPE) / 8,
            scale=0.1,
        )


def mla(query, latent, k_pe, name="one"):
    done = torch.ops.vllm.unified_mla_kv_cache_update(latent, k_pe, layer_name(name), "auto", SCALE)
    out = torch.empty(query.shape[0], HEADS * VALUE, dtype=query.dtype)
    torch.ops.vllm.unified_mla_attention_with_output(
        query, latent, k_pe, out, layer_name(name), kv_cache_dummy_dep=done
    )
    return out


def operands(tokens=6):
    torch.manual_seed(1)
    sizes = ((tokens, HEADS, NOPE + ROPE), (tokens, LATENT), (tokens, 1, ROPE))
    return tuple(torch.randn(size, dtype=DTYPE) for size in sizes)


def attended(quantise):
    return lambda *args: quantise(mla(*args))


def sites_of(function, *args):
    return LayerAttnQuant().match(recognise(post_grad_graph(function, *args)))


def compiled(function, args, dynamic=False, options=FOLD):
    args = tuple(arg.clone() for arg in args)
    if dynamic is None:
        for arg in args:
            torch._dynamo.mark_dynamic(arg, 0)
    with without_code_generation(), torch.no_grad():
        return torch.compile(function, backend="autofuse", options=options, dynamic=dynamic)(*args)


def same_bits(one, other):
    return torch.equal(*(each.contiguous().view(torch.uint8) for each in (one, other)))


def tma(x, group=128, ue8m0=False):
    return group_op(x, ScaleLayout.TMA_ALIGNED, group, ue8m0)


FORMATS = {
    "static": (lambda x: static(x, SCALE), QuantFormat(0)),
    "static op": (lambda x: static_op(x, SCALE.view(1, 1)), QuantFormat(0)),
    "128, plain": (keepdim, QuantFormat(128)),
    "128, op": (group_op, QuantFormat(128)),
    "64": (lambda x: group_op(x, ScaleLayout.ROW_MAJOR, 64), QuantFormat(64)),
    "column-major, plain": (column_major, QuantFormat(128, layout=ScaleLayout.COLUMN_MAJOR)),
    "column-major": (
        lambda x: group_op(x, ScaleLayout.COLUMN_MAJOR, 64),
        QuantFormat(64, layout=ScaleLayout.COLUMN_MAJOR),
    ),
    "TMA-aligned": (tma, QuantFormat(128, layout=ScaleLayout.TMA_ALIGNED)),
    "UE8M0": (lambda x: group_op(x, ScaleLayout.ROW_MAJOR, 128, True), QuantFormat(128, True)),
    "UE8M0, TMA-aligned": (lambda x: tma(x, 64, True), QuantFormat(64, True, ScaleLayout.TMA_ALIGNED)),
    "NVFP4": (lambda x: nvfp4(x, GLOBAL_SCALE), QuantFormat(16)),
}


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_values_and_scales_of_eager(name, dynamic):
    function, args = attended(FORMATS[name][0]), operands()
    results, expected = compiled(function, args, dynamic), function(*args)
    (site,) = (site for site in last_reports()[-1].sites if site.fused)
    assert (site.op, site.fusion, site.rule) == (
        "vllm::unified_mla_attention_with_output",
        "fuse_attn_quant",
        "flag",
    )
    assert "no kernel of ours takes part, so nothing was measured" in site.reason
    results, expected = (each if isinstance(each, tuple) else (each,) for each in (results, expected))
    for result, right in zip(results, expected, strict=True):
        assert (result.shape, result.stride(), result.dtype) == (right.shape, right.stride(), right.dtype)
        assert same_bits(result, right)


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize("name", FORMATS)
def test_one_call_is_left_and_it_says_the_format(name, dynamic):
    quantise, scheme = FORMATS[name]
    args = operands()
    if dynamic is None:
        for arg in args:
            torch._dynamo.mark_dynamic(arg, 0)
    graph = post_grad_graph(attended(quantise), *args, dynamic=dynamic)
    (site,) = LayerAttnQuant().match(recognise(graph))
    assert (site.refusal, site.params) == (None, scheme.params)
    LayerAttnQuant().rewrite(graph, site, "")
    graph.lint()
    calls = [node for node in graph.nodes if node.op == "call_function"]
    (call,) = (node for node in calls if "auto_functionalized" in str(node.target))
    assert not {torch.ops.aten.amax.default, torch.ops.aten.div.Tensor} & {node.target for node in calls}
    assert (call.kwargs["output_scale"] is None) == (scheme.group in (64, 128))
    if scheme.group in (64, 128):
        given = [call.kwargs[f"quant_{name}"] for name in ("group_size", "scale_ue8m0", "col_major", "tma_aligned")]
        layout = scheme.layout
        assert given == [scheme.group, scheme.ue8m0, bool(layout), layout == ScaleLayout.TMA_ALIGNED]
    assert call.kwargs["kv_cache_dummy_dep"].target is torch.ops.vllm.unified_mla_kv_cache_update.default
    assert all("val" in node.meta for node in graph.nodes if node.op != "output")


def test_inductor_runs_it_as_it_is():
    def function(*args):
        return tma(mla(*args), 64, True)

    args = operands()
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(function, backend="autofuse", options=FOLD, dynamic=True)
        results, (code,) = run_and_get_code(run, *args)
    assert "ops._C.per_token_group_fp8_quant" not in code
    assert "ops.vllm.unified_mla_attention_with_output" in code
    assert all(same_bits(result, right) for result, right in zip(results, function(*args), strict=True))


def test_two_layers_in_one_graph():
    def function(*args):
        return tuple(part for name in ("one", "two") for part in keepdim(mla(*args, name)))

    args = operands()
    results = compiled(function, args)
    assert last_reports()[-1].fused == 2
    for result, right in zip(results, function(*args), strict=True):
        assert same_bits(result, right)


def test_it_is_on_from_level_3_and_by_its_flag():
    for options, fused in (
        ({"autofuse.level": "O2"}, 0),
        ({"autofuse.level": "O1", "autofuse.fuse_attn_quant": True}, 1),
        ({"autofuse.level": "O3", "autofuse.fuse_attn_quant": False}, 0),
    ):
        compiled(attended(keepdim), operands(), options={"autofuse.fuse_quant": False, **options})
        assert last_reports()[-1].fused == fused


def test_attention_that_splits_the_graph_is_not_folded():
    split = {"autofuse.splitting_ops": ["vllm::unified_mla_attention_with_output"]}
    for partition, fused in ((False, 0), (True, 1)):
        options = {**FOLD, **split, "autofuse.use_inductor_graph_partition": partition}
        compiled(attended(keepdim), operands(), options=options)
        report = last_reports()[-1]
        assert report.fused == fused
        assert ("it splits the graph" in str(report)) == (not partition)


def test_it_goes_before_a_kernel_that_nobody_measured():
    compiled(attended(keepdim), operands(), options={"autofuse.level": "O3", "autofuse.untuned": "fuse"})
    (folded,) = (site for site in last_reports()[-1].sites if site.fused)
    assert folded.fusion == "fuse_attn_quant"  # it replaces more
    lost = next(site for site in last_reports()[-1].sites if site.fusion == "fuse_quant")
    assert "cannot be measured and replaces" in lost.reason


# ---- attention over heads -------------------------------------------------------------------------------------------


def gqa(query, key, value):
    out = torch.empty(query.shape[0], HEADS * 32, dtype=query.dtype)
    torch.ops.vllm.unified_attention_with_output(
        query.view(-1, HEADS, 32), key.view(-1, HEADS, 32), value.view(-1, HEADS, 32), out.view(-1, HEADS, 32),
        layer_name("one"),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "mark_dynamic"])
@pytest.mark.parametrize("name", ["static", "static op", "NVFP4"])
def test_attention_over_heads_quantises_to_static_fp8_and_nvfp4(name, dynamic):
    def function(query, key, value):
        return FORMATS[name][0](gqa(query, key, value))

    torch.manual_seed(2)
    args = tuple(torch.randn(6, HEADS * 32, dtype=DTYPE) for _ in range(3))
    results, expected = compiled(function, args, dynamic), function(*args)
    (site,) = (site for site in last_reports()[-1].sites if site.fused)
    assert site.op == "vllm::unified_attention_with_output"
    results, expected = (each if isinstance(each, tuple) else (each,) for each in (results, expected))
    for result, right in zip(results, expected, strict=True):
        assert (result.shape, result.stride(), result.dtype) == (right.shape, right.stride(), right.dtype)
        assert same_bits(result, right)


def test_attention_over_heads_has_no_groups():
    (site,) = sites_of(lambda *args: keepdim(gqa(*args)), *(torch.randn(6, HEADS * 32, dtype=DTYPE) for _ in range(3)))
    assert "takes no quant_group_size" in site.refusal


# ---- what is refused ------------------------------------------------------------------------------------------------


def read_by_another(*args):
    out = mla(*args)
    return keepdim(out), out + 1


def returned(*args):
    out = mla(*args)
    return keepdim(out), out


def into_zeros(query, latent, k_pe):
    out = torch.zeros(query.shape[0], HEADS * VALUE, dtype=query.dtype)
    torch.ops.vllm.unified_mla_attention_with_output(query, latent, k_pe, out, layer_name("one"))
    return keepdim(out)


def into_a_part(query, latent, k_pe):
    out = torch.empty(query.shape[0], 2 * HEADS * VALUE, dtype=query.dtype)
    torch.ops.vllm.unified_mla_attention_with_output(query, latent, k_pe, out[:, : HEADS * VALUE], layer_name("one"))
    return keepdim(out)


def scale_of_its_own_values(query, latent, k_pe):
    out = mla(query, latent, k_pe)
    return static(out, out.abs().max().float())


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (read_by_another, "is also read by add"),
        (returned, "is also read by the graph's output"),
        (into_zeros, "is not its own, uninitialised one"),
        (into_a_part, "writes a part of a buffer"),
        (scale_of_its_own_values, "is also read by abs"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sites_that_must_not_be_folded(function, why):
    (site,) = sites_of(function, *operands())
    assert why in site.refusal
    results = compiled(function, operands())
    assert last_reports()[-1].fused == 0
    assert results is not None


def test_formats_that_attention_does_not_know_are_refused_by_name():
    def per_tensor(*args):
        out = mla(*args)
        values, scale = torch.empty_like(out, dtype=torch.float8_e4m3fn), torch.empty(1)
        torch.ops._C.dynamic_scaled_fp8_quant(values, out, scale)
        return values, scale

    found = recognise(post_grad_graph(per_tensor, *operands()))
    assert LayerAttnQuant().match(found) == []
    (miss,) = LayerAttnQuant().near_misses(found)
    assert miss.block == "fuse_attn_quant"
    assert "cannot quantise its output so: _C::dynamic_scaled_fp8_quant has one scale for all rows" in miss.reason


class StaticOnly(vllm_standins.MLAAttentionImpl):
    supported = ("kFp8StaticTensorSym",)


def test_a_layer_that_does_not_write_a_format_keeps_its_quantisation():
    vllm_standins.layers["one"].impl = StaticOnly()
    for name, refusal in (("static", None), ("128, op", "the attention of one does not write kFp8Dynamic128Sym")):
        (site,) = sites_of(attended(FORMATS[name][0]), *operands())
        assert site.refusal == refusal


def test_another_answer_of_the_layers_is_another_graph():
    keys = []
    for impl in (vllm_standins.MLAAttentionImpl(), StaticOnly()):
        vllm_standins.layers["one"].impl = impl
        compiled(attended(keepdim), operands())
        keys.append(last_reports()[-1].key)
    assert keys[0] != keys[1]


def test_without_a_forward_context_nothing_is_folded(monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm.forward_context")
    (site,) = sites_of(attended(keepdim), *operands())
    assert "is not known outside of vLLM's forward context" in site.refusal


def test_an_output_that_is_quantised_already_is_left_alone():
    def function(query, latent, k_pe):
        out = torch.empty(query.shape[0], HEADS * VALUE, dtype=torch.float8_e4m3fn)
        torch.ops.vllm.unified_mla_attention_with_output(query, latent, k_pe, out, layer_name("one"), SCALE)
        return out

    assert recognise(post_grad_graph(function, *operands())).attentions() == []
    assert LayerAttnQuant().match(Found()) == []


@pytest.mark.skipif("VLLM_USE_LAYERNAME" in os.environ, reason="this is that process")
def test_all_of_it_with_names_that_are_objects():
    environment = {**os.environ, "VLLM_USE_LAYERNAME": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "TMA or two_layers or NVFP4",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
