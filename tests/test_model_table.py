"""The table of models: how a case is run and judged, what is recorded, and what the table shows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import isolate

import model_cases
import model_table
from hf_models import MODELS
from model_cases import Case, Outcome, all_cases, general, run_case
from model_table import DOCUMENT, RECORDED, Records, markdown, run_group
from without_code import without_code_generation

CASE = Case("Llama 3", "decode, StaticCache", "mark_dynamic", "bf16", "inference_mode")
OTHER = Case("Llama 3", "decode, StaticCache", "static", "bf16", "inference_mode")
RIGHT = Outcome(1, {"fuse_rope_kvcache": [2, 1]}, {"fuse_rope_kvcache: why": 1}, 1.0, 0.01, 0.005, 0.02)
FACTS = {"sources": "a", "torch": "2", "transformers": "5", "code_generation": False}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def test_every_model_mode_and_setting_is_a_case() -> None:
    cases = all_cases(list(MODELS))
    assert len(cases) == len(set(cases)) == 7 * 3 * 3 * 2 * 2
    assert all(Case.parse(str(case)) == case for case in cases)
    with pytest.raises(ValueError, match="is no case"):
        Case.parse("Llama 3|prefill|static|fp8|no_grad")


def test_a_case_counts_its_sites_and_compares_with_eager() -> None:
    with without_code_generation():
        outcome = run_case(CASE)
    assert not outcome.error
    assert outcome.sites == {"fuse_rope_kvcache": [2, 2]}
    assert outcome.graphs == 1, "another batch is no other graph"
    assert 0 < outcome.difference <= outcome.allowed
    assert outcome.right


def test_a_fused_op_that_is_wrong_shows(monkeypatch) -> None:
    """The same case, but the logits of what autofuse compiles are 5 % off."""
    compiled = model_cases._compiled

    def scaled(case, model, **settings):
        call = compiled(case, model, **settings)
        if settings["backend"] != "autofuse":
            return call

        def wrong(*args, **kwargs):
            result = call(*args, **kwargs)
            result.logits *= 1.05
            return result

        return wrong

    monkeypatch.setattr(model_cases, "_compiled", scaled)
    with without_code_generation():
        outcome = run_case(OTHER)
    assert not outcome.error
    assert not outcome.right


def test_what_is_raised_is_the_outcome(monkeypatch) -> None:
    def broken(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(model_cases, "_compiled", broken)
    outcome = run_case(CASE)
    assert (outcome.error, outcome.right) == ("RuntimeError: two lines", False)


def test_each_tensor_is_judged_by_its_own_size_and_nan_is_never_right() -> None:
    def judged(got: list[float], plain: list[float], want: list[float]) -> Outcome:
        outcome = Outcome()
        tensors = [[torch.tensor(value, dtype=torch.float64) for value in values] for values in (got, plain, want)]
        model_cases._compare(*tensors, 0.01, outcome)
        return outcome

    assert judged([100.5, 1.0], [100.0, 1.0], [100.0, 1.0]).right
    wrong = judged([100.5, 1.05], [100.0, 1.0], [100.0, 1.0])
    assert not wrong.right
    assert wrong.difference == pytest.approx(0.05)
    assert wrong.allowed == pytest.approx(0.04)
    assert judged([1.05], [1.03], [1.0]).right, "twice what it differs by without fusions"
    assert not judged([1.0, float("nan")], [1.0, 1.0], [1.0, 1.0]).right
    assert judged([0.0], [0.0], [0.0]).right


def test_reasons_of_all_layers_are_one() -> None:
    assert general("cat_2 pairs halves of add_17, mm has 16") == "cat pairs halves of add, mm has 16"


def test_a_process_that_dies_costs_only_its_case(tmp_path, monkeypatch) -> None:
    """A worker that ends itself at the second of three cases."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys\n"
        "for case in sys.argv[2:]:\n"
        "    if 'dynamic=True' in case:\n"
        "        sys.exit(7)\n"
        "    print('{}', flush=True)\n"
    )
    monkeypatch.setattr(model_table, "__file__", str(script))
    cases = [
        Case("Llama 3", "prefill", shapes, "bf16", "no_grad") for shapes in ("static", "dynamic=True", "mark_dynamic")
    ]
    ended = []
    run_group(cases, False, lambda case, outcome: ended.append((case, outcome.error)))
    assert ended == [(cases[0], ""), (cases[1], "the process died (exit code 7)"), (cases[2], "")]


def test_what_was_right_is_resumed_until_something_changes(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    records = Records(path)
    records.keep(FACTS, resume=True, asked=[])
    records.record(CASE, RIGHT)
    records.record(OTHER, Outcome(error="broke"))
    assert set(Records(path).outcomes()) == {CASE, OTHER}

    def kept(facts, resume, asked=(CASE, OTHER)) -> set[Case]:
        again = Records(path)
        again.keep(facts, resume, asked)
        return set(again.outcomes())

    assert kept(FACTS, resume=True) == {CASE}
    assert kept(FACTS, resume=False) == set()
    assert kept(FACTS, resume=False, asked=[OTHER]) == {CASE}
    assert kept({**FACTS, "sources": "b"}, resume=True) == set()


def test_the_command_fails_if_a_case_is_wrong(tmp_path, monkeypatch, capsys) -> None:
    def run_group(cases, graphs_only, done):
        for case in cases:
            done(case, RIGHT if case.shapes == "static" else Outcome(error="broke"))

    monkeypatch.setattr(model_table, "run_group", run_group)
    command = ["--models", "Llama 3", "--json", str(tmp_path / "models.json"), "--only", "prefill", "bf16", "no_grad"]
    assert model_table.main([*command, "static"]) == 0
    assert model_table.main(command) == 1
    assert "Llama 3|prefill|mark_dynamic|bf16|no_grad: FAILED: broke" in capsys.readouterr().out
    assert model_table.main(["--models", "Llama 4"]) == 2
    assert "Llama 4 is none of" in capsys.readouterr().err


def test_what_came_out_alike_is_one_row() -> None:
    fp32 = [Case("Llama 3", CASE.mode, "static", "fp32", grad) for grad in ("no_grad", "inference_mode")]
    worse = Outcome(1, RIGHT.sites, RIGHT.reasons, 1.0, 0.016, 0.001, 0.018)
    failed = Outcome(error="Broke: a|b")
    content = {**FACTS, "cases": {}}
    text = markdown(content, {CASE: RIGHT, OTHER: worse, fp32[0]: failed, fp32[1]: failed})
    rows = [line for line in text.splitlines() if line.startswith("| Llama 3")]
    mode = "| Llama 3 | decode, StaticCache"
    assert rows == [
        f"{mode} | mark_dynamic, static; bf16; inference_mode | yes | 1 of 2 | 0.016 | 0.001 | 1 |",
        f"{mode} | static; fp32; no_grad, inference_mode | **no**: Broke: a/b | – | – | – |  |",
    ]
    assert "1. fuse_rope_kvcache: why" in text
    assert "without code generation; 4 cases, 2 wrong" in text


def test_the_document_shows_what_is_recorded() -> None:
    content = json.loads(RECORDED.read_text(encoding="utf-8"))
    generated = markdown(content, Records(RECORDED).outcomes())
    document = DOCUMENT.read_text(encoding="utf-8")
    assert model_table.replace_generated(document, generated, model_table.BEGIN) == document, (
        "run scripts/model_table.py --markdown"
    )
    assert all(outcome.right for outcome in Records(RECORDED).outcomes().values())
