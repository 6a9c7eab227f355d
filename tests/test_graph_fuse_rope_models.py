"""Hugging Face's decoders: every layer's rotations and cache writes are fused, and the model computes what it did."""

from __future__ import annotations

import re

import pytest
import torch
from models import VOCABULARY, decoder, deepseek, dynamic_cache, isolate, static_cache, without_code_generation

from autofuse.graph.report_store import last_reports

LAYERS, STEPS = 2, 3
FUSE = {"autofuse.untuned": "fuse"}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def prompt(tokens=8, seed=1):
    return torch.randint(0, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(seed))


def static_prefill(model, callable_):
    cache = static_cache(model)
    return [callable_(prompt(), past_key_values=cache, use_cache=True).logits], cache


def static_decode(model, callable_):
    cache = static_cache(model, prompt(5))
    return [callable_(prompt(1, s), past_key_values=cache, use_cache=True).logits for s in range(STEPS)], cache


def dynamic_prefill(model, callable_):
    cache = dynamic_cache(model)
    return [callable_(prompt(), past_key_values=cache, use_cache=True).logits], cache


def dynamic_decode(model, callable_):
    """Each step sees a cache that is one token longer."""
    cache = dynamic_cache(model, prompt(5))
    return [callable_(prompt(1, s), past_key_values=cache, use_cache=True).logits for s in range(STEPS)], cache


def without_cache(model, callable_):
    return [callable_(prompt(), use_cache=False).logits], None


def run(model, step, callable_):
    """(logits of each step, what the caches hold then)"""
    with torch.no_grad():
        logits, cache = step(model, callable_)
    return logits, [] if cache is None else [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def assert_all_fused(report, op, cache):
    sites = [site for site in report.sites if site.op == op]
    assert [site.where for site in sites] == [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)]
    assert all(site.fused for site in sites), report
    assert all(f"cache={cache}" in site.problem for site in sites), report
    assert not [miss for miss in report.near_misses if miss.block != "RMSNorm"], report


def assert_close(results, expected):
    for part, right in zip(results, expected, strict=True):
        for result, want in zip(part, right, strict=True):
            torch.testing.assert_close(result, want, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("step", [static_prefill, static_decode, without_cache], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
def test_all_layers_of_decoders(kind, step, dynamic):
    model = decoder(kind, LAYERS)
    expected = run(model, step, model)
    with without_code_generation():
        results = run(model, step, torch.compile(model, backend="autofuse", dynamic=dynamic, options=FUSE))
    report = last_reports()[-1]
    assert_all_fused(report, "rope_kv_cache", "none" if step is without_cache else "auto")
    assert_close(results, expected)
    # Under dynamic=True Dynamo makes eps an input of the graph, and the norms stay where they are.
    normed = any("qk_norm=1" in site.problem for site in report.sites)
    assert normed == (kind == "qwen3")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("step", [static_prefill, static_decode, dynamic_decode], ids=lambda f: f.__name__)
@pytest.mark.parametrize("version", [2, 3])
def test_all_layers_of_deepseek(version, step, dynamic):
    """V3's code is Kimi-K2's as well: its neighbours come out as halves. A cache that grows is put together by ``cat``
    and not written: the rotations are fused all the same.
    """
    model = deepseek(version, LAYERS)
    expected = run(model, step, model)
    with without_code_generation():
        results = run(model, step, torch.compile(model, backend="autofuse", dynamic=dynamic, options=FUSE))
    report = last_reports()[-1]
    assert_all_fused(report, "mla_rope_kv_cache_cat", "none" if step is dynamic_decode else "auto_apart")
    sites = [site for site in report.sites if site.op == "mla_rope_kv_cache_cat"]
    assert all(("deinterleave=1" in site.problem) == (version == 3) for site in sites)
    assert_close(results, expected)


@pytest.mark.parametrize("version", [2, 3])
def test_an_empty_cache_that_grows(version):
    model = deepseek(version, LAYERS)
    expected = run(model, dynamic_prefill, model)
    with without_code_generation():
        results = run(model, dynamic_prefill, torch.compile(model, backend="autofuse", options=FUSE))
    assert_all_fused(last_reports()[-1], "mla_rope_kv_cache_cat", "none")
    assert_close(results, expected)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v2", "deepseek_v3"])
def test_generated_code_writes_into_the_cache_and_shares_the_angles(kind):
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = decoder("llama", LAYERS) if kind == "llama" else deepseek(int(kind[-1]), LAYERS)
    op = "rope_kv_cache" if kind == "llama" else "mla_rope_kv_cache_cat"
    expected = run(model, static_decode, model)
    compiled = torch.compile(model, backend="autofuse", options=FUSE)
    results, code = run_and_get_code(run, model, static_decode, compiled)
    assert_close(results, expected)
    text = "\n".join(code)
    calls = re.findall(rf"autofuse\.{op}\.default\((.*)\)", text)
    assert len(calls) == LAYERS
    # Each writes into two caches of the caller's, and all read one table of angles.
    for call in calls:
        assert len(re.findall(r"reinterpret_tensor\(arg\d+_1", call)) == 2
    table = re.compile(r"reinterpret_tensor\((buf\d+), \(1, \d+\), \(\d+, 1\), 0\)")
    assert len({table.search(call)[1] for call in calls}) == 1
    assert not re.findall(r"copy_\(arg|index_put_\(|clone_arg", text)
    if kind == "llama":  # DeepSeek's experts have another use for it
        assert "index_put" not in text
