"""Hugging Face's DeepSeek models: every layer's site is found and fused, and the model computes what it did."""

from __future__ import annotations

import re

import pytest
import torch
from models import VOCABULARY, deepseek, isolate, static_cache, without_code_generation

from autofuse.graph.report_store import last_reports

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
