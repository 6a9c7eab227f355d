"""A short fuzz of the graph passes, and what the fuzzer finds. ``scripts/fuzz_graphs.py`` runs the long one."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import pytest
import torch
from models import isolate
from torch.fx import Graph

import fuzz_graphs
from autofuse.graph.moves import RefusedError
from autofuse.graph.rewrite import Replacement
from autofuse.runtime import vllm_context
from fuzz_graphs import cut_down, run_layer, run_mutant
from graph_mutants import mutated
from layer_dialects import LIBRARY, layers_known
from random_layers import Input, draw_layer

PIECES = {
    "two caches": r"(cache\d+)\.view\(.*\[slots.*\n(.*\n)*    (?!\1)cache\d+\.view\(.*\[slots",
    "one cache twice": r"(cache\d+)\.view\(.*\[slots.*\n    \1\.view\(.*\[slots",
    "two positions": r"= (vllm_neox|hugging_face|unbound)\(p\d+, (table\d+), (positions\d+)\)\n"
    r".*= \1\(p\d+, \2, (?!\3)positions\d+\)",
    "by name": r"unified_kv_cache_update",
    "norms": r"norm_\w+\(p\d+, g\d+(.|\n)*norm_\w+\(p\d+, g\d+",
    "quantised": r"(norm_cast_first|norm_by_ir)(.|\n)*quant_keepdim",
}
"""What a layer has → where its text says so."""
ABSORBED = r"bmm\(q\d+.*\n(.*\n)*.*torch\.cat\(\[q\d+, q\d+\]"
MUTANTS = 6


def drawn(piece, number=0, dtype="float32"):
    """A random layer of static shapes with that piece."""
    layers = (draw_layer(seed) for seed in itertools.count())
    static = (each for each in layers if each.more_tokens is None and each.tokens > 2 and each.dtype == dtype)
    chosen = (
        each for each in static if re.search(PIECES.get(piece, piece), each.source, re.MULTILINE) and is_valid(each)
    )
    return next(itertools.islice(chosen, number, None))


def with_other_slots(layer):
    """The layer, but its last cache is written elsewhere."""
    lines = [*layer.lines]
    at = max(at for at, line in enumerate(lines) if re.match(r"cache\d+\.view\(.*\[slots", line))
    lines[at] = re.sub(r"\[slots\d+", "[slots0", lines[at])
    inputs = (*layer.inputs, Input("slots0", "torch.randperm(32)[:T]"))
    return replace(layer, inputs=inputs, lines=tuple(lines))


def is_valid(layer):
    with layers_known():
        try:
            layer.function()(**layer.arguments(layer.tokens))
        except RuntimeError:
            return False
    return len(layer.lines) < 30 and len(layer.outputs) > 1


@pytest.fixture(scope="module")
def traced():
    """Layers, and what became of them; those with a graph have mutants."""
    layers = [*(drawn(piece) for piece in PIECES), with_other_slots(drawn("two caches"))]
    return [(layer, run_layer(layer)) for layer in layers]


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


@pytest.mark.parametrize("seed", [269, 697])
def test_columns_that_a_rotation_spares_are_read_where_they_exist_already(seed):
    """What is hoisted for a query that comes late is what its spared columns are read from."""
    layer = draw_layer(seed)
    outcome = run_mutant(layer, run_layer(layer).graph, 1)
    assert outcome.wrong == ""
    assert any(site.fused and "rope" in site.op for report in outcome.reports for site in report.sites)


def test_a_node_that_another_fusion_replaced_is_not_read():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2)
    gone = graph.call_function(torch.ops.aten.relu.default, (x,))
    last = graph.output(x)
    graph.erase_node(gone)

    def rewrite():
        with Replacement(graph, last, x) as new:
            new.call(torch.ops.aten.neg.default, x)
            new.call(torch.ops.aten.neg.default, gone)

    with pytest.raises(RefusedError, match="another fusion has replaced relu"):
        rewrite()
    assert [node.op for node in graph.nodes] == ["placeholder", "output"]


def test_random_layers_are_right(traced):
    for _, outcome in traced:
        assert outcome.wrong == outcome.invalid == ""
    ops = {site.op for _, outcome in traced for report in outcome.reports for site in report.sites if site.fused}
    assert len(ops) > 1


def test_mutants_are_right(traced):
    outcomes = [run_mutant(layer, outcome.graph, number) for layer, outcome in traced for number in range(MUTANTS + 1)]
    assert [(outcome.case, outcome.wrong) for outcome in outcomes if outcome.wrong] == []
    assert sum(bool(outcome.invalid) for outcome in outcomes) < len(outcomes) / 4


@pytest.mark.parametrize(
    ("check", "instead"),
    [
        ("fusions.rope_pairs._same_angles", lambda *_: True),
        ("fusions.rope_pairs._same_slots", lambda *_: True),
        ("fusions.rope_pairs.check_caches", lambda *_: None),
        ("fusions.rope_kv_cache.check_alike", lambda *_: None),
        ("conflicts.without_overlaps", list),
    ],
    ids=["same angles", "same slots", "one cache written twice", "one kind of rotation", "one node, one fusion"],
)
def test_a_check_that_is_left_out_is_found(traced, monkeypatch, check, instead):
    monkeypatch.setattr(f"autofuse.graph.{check}", instead)
    for layer, outcome in traced:
        if any(run_mutant(layer, outcome.graph, number).wrong for number in range(MUTANTS + 1)):
            return
    pytest.fail("no mutant shows it")


def test_an_absorbed_query_is_right():
    outcome = run_layer(drawn(ABSORBED, dtype="bfloat16"))
    assert outcome.wrong == outcome.invalid == ""
    assert "mla_q_absorb_rope_kv_cache" in {s.op for report in outcome.reports for s in report.sites if s.fused}


def test_a_wrong_cache_that_is_found_by_a_name_is_found(monkeypatch):
    layer = drawn("by name")
    right = vllm_context._key_and_value
    monkeypatch.setattr(vllm_context, "_key_and_value", lambda *args: right(*args)[::-1])
    assert "cache of gqa" in run_layer(layer).wrong


def test_the_same_seed_gives_the_same_layer_and_the_same_mutants(traced):
    assert str(draw_layer(7)) == str(draw_layer(7)) != str(draw_layer(8))
    graph = traced[0][1].graph
    made = [mutated(graph, random.Random(seed)) for seed in (1, 1, 2)]
    first, again, other = (None if each is None else (str(each[0]), each[1]) for each in made)
    assert first == again != other


def test_a_wrong_result_and_a_changed_argument_are_found():
    layer = drawn("norms")
    arguments = layer.arguments(layer.tokens)
    right = layer.function()(**arguments)
    assert fuzz_graphs.differences(layer, right, right, strides=True) == []
    wrong = [each.clone() for each in right]
    wrong[0].view(-1)[0] += 1
    assert "is off by" in " ".join(fuzz_graphs.differences(layer, right, wrong, strides=True))
    touched = {name: value.clone() for name, value in arguments.items()}
    next(iter(touched.values())).view(-1)[-1] += 1e-6
    assert "were to stay as they are" in " ".join(fuzz_graphs.changes(layer, arguments, arguments, touched))


def test_of_a_badly_conditioned_result_roundings_are_told_from_what_is_wrong():
    graph, layer = Graph(), drawn("norms")
    x = graph.placeholder("x")
    scores = graph.call_function(torch.mul, (graph.call_function(torch.mul, (x, 3.0)), 30.0))
    graph.output((graph.call_function(torch.softmax, (scores, -1)),))
    rows = (4 + 0.05 * torch.randn(256, 4, generator=torch.Generator().manual_seed(0))).half()

    def off(given, moved=None):
        return fuzz_graphs._off("it", right, given.half(), fuzz_graphs.TOLERANCE["float16"], 0.0, moved)

    (right,) = fuzz_graphs.run_graph(graph, [rows])
    moved = fuzz_graphs._moved_by_noise(layer, graph, [rows], {"result 0": right})["result 0"]
    rounded_once = (90 * rows.float()).softmax(-1)
    wrong = rounded_once.clone()
    wrong[:8] = (90 * rows[:8].float()).flip(0).softmax(-1)
    assert off(rounded_once)
    assert not off(rounded_once, moved)
    assert off(wrong, moved)


def test_a_wrong_layer_is_cut_down_to_what_it_is_wrong_with(monkeypatch):
    layer = drawn("two caches")
    wanted = layer.outputs[0].text

    def fake(shorter, inductor):
        try:
            shorter.function()(**shorter.arguments(shorter.tokens))
        except NameError:
            return False
        return any(output.text == wanted for output in shorter.outputs)

    monkeypatch.setattr(fuzz_graphs, "_is_wrong", fake)
    shorter = cut_down(layer)
    assert len(shorter.outputs) == 1
    assert 0 < len(shorter.lines) < len(layer.lines)
    scope = {**LIBRARY, "T": shorter.tokens, "DTYPE": getattr(torch, shorter.dtype)}
    exec(str(shorter), scope)  # its text is all there is to it
    assert callable(scope["layer"])
