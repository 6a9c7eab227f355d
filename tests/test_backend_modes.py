"""One model compiled in several ways: every mode, whole graphs only, and twice with settings that differ."""

from __future__ import annotations

import pytest
import torch
from models import VOCABULARY, decoder, deepseek, isolate, static_cache, without_code_generation

from autofuse.graph.backend import Watch, watching

LAYERS = 2
MODES = ["reduce-overhead", "max-autotune-no-cudagraphs"]


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")
    torch._dynamo.reset()


@pytest.fixture
def reports():
    """Of everything that is compiled in a test."""
    watch = Watch()
    token = watching.set(watch)
    yield watch.reports
    watching.reset(token)


def ids(tokens, seed):
    return torch.randint(0, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decode(model, callable_, steps=3):
    """The logits of some steps after a prompt, and what the cache holds then."""
    cache = static_cache(model, ids(5, 1))
    logits = [callable_(ids(1, step), past_key_values=cache, use_cache=True).logits.clone() for step in range(steps)]
    return [*logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))]


def assert_close(results, expected):
    for result, want in zip(results, expected, strict=True):
        torch.testing.assert_close(result, want, atol=3e-2, rtol=3e-2)


def fused(report):
    return {site.fusion for site in report.sites if site.fused}


@pytest.mark.parametrize("mode", MODES)
def test_generated_code_is_right_in_every_mode(mode, reports):
    """torch.compile takes a mode or options, not both, so nothing is fused here where nobody has measured."""
    model = decoder("llama", 1)
    expected = decode(model, model)
    assert_close(decode(model, torch.compile(model, backend="autofuse", mode=mode, fullgraph=True)), expected)
    (report,) = reports
    assert [site.rule for site in report.sites] == ["untuned"]


@pytest.mark.parametrize("mode", MODES)
def test_the_options_of_every_mode_are_right_with_fusions(mode, reports):
    """What a mode stands for, written as options beside ours."""
    model = decoder("llama", 1)
    expected = decode(model, model)
    options = {**torch._inductor.list_mode_options(mode), "autofuse.untuned": "fuse"}
    assert_close(decode(model, torch.compile(model, backend="autofuse", options=options, fullgraph=True)), expected)
    (report,) = reports
    assert fused(report) == {"fuse_rope_kvcache"}


@pytest.mark.parametrize("kind", ["llama", "phi3", "deepseek"])
def test_no_fusion_breaks_a_graph(kind, reports):
    model = deepseek(2, LAYERS) if kind == "deepseek" else decoder(kind, LAYERS)
    expected = decode(model, model)
    with without_code_generation():
        options = {"autofuse.untuned": "fuse"}
        assert_close(decode(model, torch.compile(model, backend="autofuse", options=options, fullgraph=True)), expected)
    (report,) = reports
    assert report.fused >= LAYERS


def test_two_settings_on_one_model_each_have_their_own_graph(reports):
    model = decoder("llama", 1)
    expected = decode(model, model)
    fuse = {"autofuse.untuned": "fuse"}
    with without_code_generation():
        off = torch.compile(model, backend="autofuse", options={**fuse, "autofuse.level": "O0"})
        on = torch.compile(model, backend="autofuse", options={**fuse, "autofuse.level": "O2"})
        for compiled in (off, on, off):  # the last runs its own graph again
            assert_close(decode(model, compiled), expected)
    assert [fused(report) for report in reports] == [set(), {"fuse_rope_kvcache"}]
