"""Hugging Face's models: every layer of DeepSeek's is found and fused, and computes what it did; and what any of them
asks for is what tuning for it measures.
"""

from __future__ import annotations

import re

import pytest
import torch
from models import VOCABULARY, decoder, deepseek, dynamic_cache, isolate, static_cache, without_code_generation

from autofuse.graph.explain import explain
from autofuse.graph.report_store import last_reports
from autofuse.models import PRESETS
from autofuse.tuner.api import model_buckets

LAYERS = 3
FUSE = {"autofuse.untuned": "fuse"}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def prompt(tokens=8):
    return torch.randint(0, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(1))


def run(model, step, callable_):
    """Prefill into an empty static cache, or one decode step after a prompt."""
    with torch.no_grad():
        if step == "prefill":
            return callable_(prompt(), past_key_values=static_cache(model), use_cache=True).logits
        cache = static_cache(model, prompt())
        return callable_(prompt(1), past_key_values=cache, use_cache=True).logits


def assert_all_fused(report, op="mla_dual_rms_norm"):
    sites = [site for site in report.sites if site.op == op]
    assert [site.where for site in sites] == [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)]
    assert all(site.fused for site in sites), report
    assert not report.near_misses


@pytest.mark.parametrize(
    ("version", "step", "dynamic", "bias"),
    [
        (3, "prefill", False, False),
        (3, "decode", False, True),
        (3, "decode", True, False),
        (2, "prefill", True, True),
        (2, "decode", False, False),
    ],
)
def test_all_layers_are_fused(version, step, dynamic, bias):
    model = deepseek(version, LAYERS, bias)
    expected = run(model, step, model)
    with without_code_generation():
        result = run(model, step, torch.compile(model, backend="autofuse", dynamic=dynamic, options=FUSE))
    assert_all_fused(last_reports()[-1])
    torch.testing.assert_close(result, expected, atol=2e-2, rtol=2e-2)


def test_generated_code_runs_the_op_on_views_without_a_copy():
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = deepseek(3, LAYERS)
    expected = run(model, "prefill", model)
    compiled = torch.compile(model, backend="autofuse", options=FUSE)
    result, code = run_and_get_code(run, model, "prefill", compiled)
    report = last_reports()[-1]
    assert_all_fused(report)
    torch.testing.assert_close(result, expected, atol=2e-2, rtol=2e-2)
    text = "\n".join(code)
    calls = re.findall(r"norm\.default\((\w+), \w+, reinterpret_tensor\((\w+), \(16, 32\), \(40, 1\), 0\)", text)
    assert len(calls) == LAYERS
    for buffer in (buffer for call in calls for buffer in call):
        # Straight from a matrix product, nothing between.
        assert re.search(rf"extern_kernels\.mm\(.*out={buffer}\)", text)


TUNED_FOR = {
    "DeepSeek-V2-Lite": lambda dtype: deepseek(2, 1, dtype=dtype, q_lora_rank=None, first_k_dense_replace=1),
    "DeepSeek-V3": lambda dtype: deepseek(3, 1, dtype=dtype, first_k_dense_replace=1),
    "DeepSeek-V3, halves": lambda dtype: deepseek(3, 1, dtype=dtype, first_k_dense_replace=1, rope_interleave=False),
    "Llama 3": lambda dtype: decoder("llama", 1, dtype),
    "Qwen3": lambda dtype: decoder("qwen3", 1, dtype),
    "Mistral": lambda dtype: decoder("mistral", 1, dtype),
    "Phi-3": lambda dtype: decoder("phi3", 1, dtype),
}
"""One layer, without experts. Kimi-K2 has DeepSeek-V3's code."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", TUNED_FOR)
def test_tuning_for_a_model_measures_what_compiling_it_asks_for(name, dtype):
    """In fp32 with a cache that is written; in bf16 also with one that grows."""
    model = TUNED_FOR[name](dtype)
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    tuned = {str(bucket.problem) for bucket in model_buckets(model, [1], short)}
    asked = set()
    for make in (static_cache, dynamic_cache)[: 1 + (short == "bf16")]:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="autofuse", options={"autofuse.untuned": "skip"})
        with torch.no_grad():
            found = explain(compiled, prompt(1), past_key_values=make(model, prompt(5)), use_cache=True)
        sites = [site for graph in found.graphs for site in graph.sites]
        assert sites
        asked |= {site.problem for site in sites}
    assert asked <= tuned, sorted(asked - tuned)


def test_a_preset_is_tuned_for_the_attention_of_engines_first_and_for_transformers():
    """The first problem is what `autofuse why` and scripts/bench_ops.py take."""
    texts = {
        name: [str(bucket.problem) for bucket in model_buckets(name, [1], ops=["mla_rope_kv_cache_cat"])]
        for name in PRESETS
        if "kv_lora_rank" in PRESETS[name]
    }
    assert set(texts) == {"deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "deepseek-r1", "kimi-k2"}
    for name, (absorbed, *whole) in texts.items():
        assert "nope_dim=512,rope_dim=64,latent_dim=512,neox=0,table=bf16,cache=auto)" in absorbed
        assert len(whole) == 2
        for text in whole:
            assert "nope_dim=128,rope_dim=64," in text
            assert ("table=fp32" in text) == name.startswith("deepseek-v2")
            assert ("deinterleave=1" in text) == (not name.startswith("deepseek-v2"))
