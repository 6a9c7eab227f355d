"""A short fuzz of the graph passes, and what the fuzzer finds. ``scripts/fuzz_graphs.py`` runs the long one."""

from __future__ import annotations

import random

import pytest
import torch
from models import isolate

import fuzz_graphs
from fuzz_graphs import cut_down, run_layer, run_mutant
from graph_mutants import mutated
from layer_dialects import LIBRARY
from random_layers import draw_layer

SEEDS = (2, 10425, 2756, 8841)
MUTANTS = 3


@pytest.fixture(scope="module")
def traced():
    """Layers, and what became of them; those with a graph have mutants."""
    layers = [draw_layer(seed) for seed in SEEDS]
    return [(layer, run_layer(layer)) for layer in layers]


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def test_random_layers_are_right(traced):
    for _, outcome in traced:
        assert outcome.wrong == outcome.invalid == ""
    ops = {site.op for _, outcome in traced for report in outcome.reports for site in report.sites if site.fused}
    assert ops


def test_mutants_are_right(traced):
    outcomes = [run_mutant(layer, outcome.graph, number) for layer, outcome in traced for number in range(MUTANTS + 1)]
    assert [(outcome.case, outcome.wrong) for outcome in outcomes if outcome.wrong] == []
    assert sum(bool(outcome.invalid) for outcome in outcomes) < len(outcomes) / 4


@pytest.mark.parametrize(
    ("check", "instead"),
    [
        ("fusions.rope_pairs._same_angles", lambda *_: True),
        ("fusions.rope_pairs._same_slots", lambda *_: True),
        ("fusions.rope_kv_cache.check_caches", lambda *_: None),
        ("graph_pass.without_overlaps", list),
    ],
    ids=["same angles", "same slots", "one cache written twice", "one node, one fusion"],
)
def test_a_check_that_is_left_out_is_found(traced, monkeypatch, check, instead):
    monkeypatch.setattr(f"autofuse.graph.{check}", instead)
    for layer, outcome in traced:
        if any(run_mutant(layer, outcome.graph, number).wrong for number in range(MUTANTS + 1)):
            return
    pytest.fail("no mutant shows it")


def test_the_same_seed_gives_the_same_layer_and_the_same_mutants(traced):
    assert str(draw_layer(7)) == str(draw_layer(7)) != str(draw_layer(8))
    graph = traced[0][1].graph
    made = [mutated(graph, random.Random(seed)) for seed in (1, 1, 2)]
    first, again, other = (None if each is None else (str(each[0]), each[1]) for each in made)
    assert first == again != other


def test_a_wrong_result_and_a_changed_argument_are_found():
    layer = draw_layer(SEEDS[-1])
    arguments = layer.arguments(layer.tokens)
    right = layer.function()(**arguments)
    assert fuzz_graphs.differences(layer, right, right, strides=True) == []
    wrong = [each.clone() for each in right]
    wrong[0].view(-1)[0] += 1
    assert "is off by" in " ".join(fuzz_graphs.differences(layer, right, wrong, strides=True))
    touched = {name: value.clone() for name, value in arguments.items()}
    next(iter(touched.values())).view(-1)[-1] += 1e-6
    assert "were to stay as they are" in " ".join(fuzz_graphs.changes(layer, arguments, arguments, touched))


def test_a_wrong_layer_is_cut_down_to_what_it_is_wrong_with(monkeypatch):
    layer = draw_layer(8)

    def fake(shorter, inductor):
        try:
            shorter.function()(**shorter.arguments(shorter.tokens))
        except NameError:
            return False
        return any("q17" in output.text for output in shorter.outputs)

    monkeypatch.setattr(fuzz_graphs, "_is_wrong", fake)
    shorter = cut_down(layer)
    assert len(shorter.outputs) == 1
    assert 0 < len(shorter.lines) < len(layer.lines)
    scope = {**LIBRARY, "T": shorter.tokens, "DTYPE": getattr(torch, shorter.dtype)}
    exec(str(shorter), scope)  # its text is all there is to it
    assert callable(scope["layer"])
