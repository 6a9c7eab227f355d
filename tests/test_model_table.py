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
from model_table import DOCUMENT, RECORDED, Records, Workers, environment, grouped, markdown
from without_code import without_code_generation

CASE = Case("Llama 3", "decode, StaticCache", "mark_dynamic", "bf16", "inference_mode")
OTHER = Case("Llama 3", "decode, StaticCache", "static", "bf16", "inference_mode")
RIGHT = Outcome(
    1, {"fuse_rope_kvcache": [2, 1]}, {"fuse_rope_kvcache: why": 1}, "logits", 0.01, 0.02, 0.03, 0.035, 0.04
)
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
    assert not outcome.failure
    assert outcome.sites == {"fuse_rope_kvcache": [2, 2]}
    assert outcome.graphs == 1, "another batch is no other graph"
    assert 0 < outcome.differs < 0.01
    assert outcome.plain == 0, "without generated code it rounds as eager does"
    assert 0.001 < outcome.eager_error < 0.01, "what bf16 may be off"
    assert outcome.right


@pytest.mark.parametrize("name", ["Llama 3", "DeepSeek-V2-Lite", "DeepSeek-V3"])
def test_a_model_in_fp64_rounds_nothing_to_fp32(name) -> None:
    """Norms, angles and products of experts included: what is between it and the fp32 model is fp32's own error."""
    case = Case(name, "prefill", "static", "fp32", "no_grad")
    model = MODELS[name](torch.float32)
    exact, eager = model_cases._exact_results(case, model), model_cases._results(case, model, model)
    assert model.dtype == torch.float32, "the model itself stays as it is"
    for tensor, numbers in exact.items():
        assert 1e-9 < model_cases._distance(eager[tensor], numbers, numbers) < 1e-5
        written = numbers[numbers != 0]
        assert (written.float().double() != written).double().mean() > 0.99


def test_a_fused_op_that_is_wrong_shows(monkeypatch) -> None:
    """Nothing is compiled, but what stands for autofuse has logits that are 1 % off: more than bf16 rounds."""

    def scaled(case, model, **settings):
        def call(*args, **kwargs):
            result = model(*args, **kwargs)
            result.logits *= 1.01 if settings["backend"] == "autofuse" else 1
            return result

        return call

    monkeypatch.setattr(model_cases, "_compiled", scaled)
    outcome = run_case(OTHER)
    assert not outcome.failure
    assert not outcome.right
    assert outcome.tensor == "logits"


def test_what_is_raised_is_the_outcome(monkeypatch) -> None:
    def broken(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(model_cases, "_compiled", broken)
    outcome = run_case(CASE)
    assert (outcome.failure, outcome.right) == ("RuntimeError: two lines", False)


def judged(fused: list[float], plain: list[float], eager: list[float], exact: list[float]) -> Outcome:
    """One tensor of two elements for each pair of numbers."""
    outcome = Outcome()
    tensors = [
        {str(number): torch.tensor([value, 1.0], dtype=torch.float64) for number, value in enumerate(values)}
        for values in (fused, plain, eager, exact)
    ]
    model_cases._compare(*tensors, outcome)
    return outcome


def test_nearer_to_eager_than_plain_is_right() -> None:
    outcome = judged([1.02], [1.03], [1.0], [1.0])
    assert outcome.right
    assert outcome.differs == pytest.approx(0.02 / 2**0.5)
    assert outcome.plain == pytest.approx(0.03 / 2**0.5)
    assert judged([1.0], [1.0], [1.0], [1.0]).right, "nothing differs"
    assert not judged([1.04], [1.03], [1.0], [1.0]).right


def test_nearer_to_fp64_than_eager_is_right() -> None:
    assert judged([1.1], [1.0], [1.0], [1.06]).right, "eager is off by 0.06, it by 0.04"
    assert not judged([1.1], [1.0], [1.0], [1.04]).right


def test_each_tensor_is_judged_by_itself_and_nan_is_never_right() -> None:
    outcome = judged([100.5, 1.05], [101.0, 1.0], [100.0, 1.0], [100.0, 1.0])
    assert not outcome.right
    assert outcome.tensor == "1"
    assert not judged([1.0, float("nan")], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]).right


def test_reasons_of_all_layers_are_one() -> None:
    assert general("cat_2 pairs halves of add_17, mm has 16") == "cat pairs halves of add, mm has 16"


CASES = [Case("Llama 3", "prefill", shapes, "bf16", "no_grad") for shapes in ("static", "dynamic=True", "mark_dynamic")]


def ended_by(worker: str, tmp_path: Path, monkeypatch, limit_s: float = 60.0) -> list[tuple[Case, str]]:
    """What became of CASES in processes that do ``worker`` for the second one, and end the others."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, subprocess, sys, time\n"
        "for case in sys.argv[2:]:\n"
        f"    if 'dynamic=True' in case:\n        {worker}\n"
        "    print('{}', flush=True)\n"
    )
    monkeypatch.setattr(model_table, "__file__", str(script))
    ended = []
    Workers(False, limit_s).run(CASES, lambda case, outcome: ended.append((case, outcome.failure)))
    return ended


def test_a_process_that_dies_costs_only_its_case(tmp_path, monkeypatch) -> None:
    ended = ended_by("sys.exit(7)", tmp_path, monkeypatch)
    assert ended == [(CASES[0], ""), (CASES[1], "the process died (exit code 7)"), (CASES[2], "")]


def test_a_case_that_hangs_is_ended_with_what_it_started(tmp_path, monkeypatch) -> None:
    """Its child would hold the pipes open for an hour."""
    started = tmp_path / "child"
    worker = f"open({str(started)!r}, 'w').write(str(subprocess.Popen(['sleep', '3600']).pid)); time.sleep(3600)"
    ended = ended_by(worker, tmp_path, monkeypatch, limit_s=2.0)
    assert ended == [(CASES[0], ""), (CASES[1], "it took more than 2 s"), (CASES[2], "")]
    status = Path(f"/proc/{started.read_text()}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_what_was_stopped_is_not_recorded(tmp_path, monkeypatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text("print('{}', flush=True)\nimport time\ntime.sleep(3600)\n")
    monkeypatch.setattr(model_table, "__file__", str(script))
    workers = Workers(False, 60.0)
    ended = []

    def done(case: Case, outcome: Outcome) -> None:
        ended.append(case)
        workers.stop()

    workers.run(CASES, done)
    assert ended == CASES[:1]


def test_workers_have_a_core_each_no_gpu_and_caches_of_their_own(tmp_path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
    one, other = environment(first), environment(second)
    assert one["OMP_NUM_THREADS"] == "1"
    assert one["CUDA_VISIBLE_DEVICES"] == ""
    for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "AUTOFUSE_DB"):
        assert Path(one[name]).is_relative_to(first)
        assert Path(other[name]).is_relative_to(second)


def test_there_is_work_for_all_jobs() -> None:
    cases = all_cases(list(MODELS))
    for jobs, least in ((1, 1), (14, 14), (48, 48), (1000, len(cases))):
        groups = grouped(cases, jobs)
        assert len(groups) >= least
        assert sorted(map(str, cases)) == sorted(str(case) for group in groups for case in group)
    assert len(grouped(cases, 1)) == 14, "as many together as there may be: they share what is generated"


def test_what_was_right_is_resumed_until_something_changes(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    records = Records(path)
    records.keep(FACTS, resume=True, asked=[])
    records.record(CASE, RIGHT)
    records.record(OTHER, Outcome(failure="broke"))
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
    def run(self, cases, done):
        for case in cases:
            done(case, RIGHT if case.shapes == "static" else Outcome(failure="broke"))

    monkeypatch.setattr(Workers, "run", run)
    command = ["--models", "Llama 3", "--json", str(tmp_path / "models.json"), "--only", "prefill", "bf16", "no_grad"]
    assert model_table.main([*command, "static"]) == 0
    assert model_table.main(command) == 1
    assert "Llama 3|prefill|mark_dynamic|bf16|no_grad: FAILED: broke" in capsys.readouterr().out
    assert model_table.main(["--models", "Llama 4"]) == 2
    assert "Llama 4 is none of" in capsys.readouterr().err


def test_what_came_out_alike_is_one_row() -> None:
    fp32 = [Case("Llama 3", CASE.mode, "static", "fp32", grad) for grad in ("no_grad", "inference_mode")]
    worse = Outcome(1, RIGHT.sites, RIGHT.reasons, "logits", 0.016, 0.015, 0.03, 0.035, 0.02)
    failed = Outcome(failure="Broke: a|b")
    content = {**FACTS, "cases": {}}
    text = markdown(content, {CASE: RIGHT, OTHER: worse, fp32[0]: failed, fp32[1]: failed})
    rows = [line for line in text.splitlines() if line.startswith("| Llama 3")]
    mode, both = "| Llama 3 | decode, StaticCache", "mark_dynamic, static; bf16; inference_mode"
    assert rows == [
        f"{mode} | {both} | yes | 1 of 2 | 0.016 | 0.015 | 0.03 | 0.035 | 0.02 | 1 |",
        f"{mode} | static; fp32; no_grad, inference_mode | **no**: Broke: a/b | – | – | – | – | – | – |  |",
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
