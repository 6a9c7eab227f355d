"""From a site that nobody measured to a fused one: ``autofuse capture``, ``autofuse tune --captured``, and again."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import vllm_standins  # noqa: F401 (registers vLLM's operators)
from models import isolate, without_code_generation
from planting import tune_here
from rope_dialects import vllm_neox
from rope_layers import Gqa, flat, paged
from test_graph_fuse_norm_quant import NormedLinear, QuantisedLatents, hidden
from test_graph_fuse_rope_kv_cache import hidden as hidden_and_positions
from test_graph_quant import keepdim

import bench_layer
from autofuse.cli.app import run
from autofuse.graph.report_store import last_reports
from autofuse.ops import OPS
from autofuse.tuner import baselines, budgets, job
from autofuse.tuner.measure import Gain
from mla_layer import SMALL, random_inputs, random_weights

T = 6
LEVEL = {"autofuse.level": "O3"}


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path, tmp_path_factory):
    isolate(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "cache")


def models() -> dict[str, Callable[[], object]]:
    """Calls of compiled models in which all ops have sites; each is traced anew."""
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(SMALL, torch.bfloat16, torch.device("cpu"), generator)
    inputs = random_inputs(SMALL, T, 50, torch.bfloat16, torch.device("cpu"), generator)

    def compiled(model, *args):
        return lambda: torch.compile(model, backend="autofuse", options=LEVEL)(*args)

    return {
        "mla": lambda: bench_layer.compiled(SMALL, True, LEVEL)(weights, inputs),
        "norm and quant": compiled(NormedLinear(keepdim), hidden(T)),
        "latents and quant": compiled(QuantisedLatents(keepdim), hidden(T)),
        "gqa": compiled(Gqa(vllm_neox, flat), *hidden_and_positions(T), *paged(T)),
    }


def sites() -> list[tuple[str, str]]:
    """(op, verdict) of every site of the models."""
    found = []
    for call in models().values():
        with without_code_generation(), torch.no_grad():
            call()
        found += [(site.op, site.verdict) for site in last_reports()[-1].sites]
    return found


def test_every_op_is_captured_tuned_and_then_fused(tiny, monkeypatch, capsys):
    """Whether a kernel is faster on this machine is not what is tested: every gain is made up to be 2."""
    monkeypatch.setitem(budgets.EFFORTS, "quick", tiny)
    tune_here(monkeypatch)
    monkeypatch.setattr(
        baselines, "baseline_calls", lambda op, args, running: {"eager": op.unfused, "compile": op.unfused}
    )
    monkeypatch.setattr(job, "gain", lambda baseline, candidate: Gain(2.0, 1.9, 2.1))
    before = sites()
    assert {op for op, _ in before} == set(OPS)
    assert {verdict for _, verdict in before} == {"untuned"}

    assert run(["capture", "--json"]) == 0
    waiting = {site["problem"].split("(")[0] for site in json.loads(capsys.readouterr().out)["captured"]}
    assert waiting == set(OPS)
    assert run(["tune", "--captured", "--device", "cpu", "--effort", "quick"]) == 0
    capsys.readouterr()
    assert run(["capture"]) == 0
    assert capsys.readouterr().out == "No site is waiting to be tuned.\n"

    after = sites()
    assert [op for op, _ in after] == [op for op, _ in before]
    # Of sites that share nodes those are fused that save most, and times are not made up: the norms with and without
    # quantisation are both right, and so are RoPE with and without the product before it.
    assert {verdict for _, verdict in after} <= {"fused", "overlap"}
    assert {op for op, _ in after} == set(OPS)
    fused = {op for op, verdict in after if verdict == "fused"}
    either = {"mla_rope_kv_cache_cat", "mla_q_absorb_rope_kv_cache"}
    assert fused & either
    assert fused >= set(OPS) - {"mla_dual_rms_norm_quant"} - either


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import torch
from models import HIDDEN, MlaLatents
model = MlaLatents()
x = torch.randn(int(sys.argv[1]), HIDDEN, dtype=torch.bfloat16)
with torch.no_grad():
    torch.compile(model, mode={mode!r}, options={options!r})(x)
print("the program", *sys.argv[1:])
sys.exit({code})
"""


@pytest.fixture
def program(tmp_path, request):
    """Writes a program that compiles a model by plain ``torch.compile``."""

    def write(code=0, mode=None, options=None):
        path = tmp_path / "program.py"
        text = PROGRAM.format(tests=str(request.path.parent), code=code, mode=mode, options=options)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_a_program_is_run_with_autofuse_in_place_of_inductor(program, capsys):
    original = torch.compile
    with without_code_generation():
        assert run(["capture", program(mode="max-autotune-no-cudagraphs"), "3", "--batch", "16"]) == 0
    assert torch.compile is original
    text = capsys.readouterr().out
    assert text.startswith("the program 3 --batch 16\n")
    assert "graph 1: 0 of 1 sites fused, 1 not tuned" in text.replace(f"graph {len(last_reports())}:", "graph 1:")
    assert "mla_dual_rms_norm(dtype=bf16,q_lora_rank=48" in text
    assert "`autofuse tune --captured` tunes those of this machine." in text


def test_its_exit_code_and_its_faults_are_its_own(program, capsys, tmp_path):
    with without_code_generation():
        assert run(["capture", "--json", program(code=7), "3"]) == 7
    written = capsys.readouterr()
    assert json.loads(written.out)["exit_code"] == 7
    assert "the program 3" in written.err
    (tmp_path / "broken.py").write_text("raise ZeroDivisionError('theirs')")
    assert run(["capture", str(tmp_path / "broken.py")]) == 1
    written = capsys.readouterr()
    assert "ZeroDivisionError: theirs" in written.err
    assert "fault of autofuse" not in written.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "there is no program 'nowhere.py'; -m runs a module"),
        (["--level", "O9", "x.py"], "option autofuse.level must be one of 'O0', 'O1', 'O2', 'O3'"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments, message, capsys):
    assert run(["capture", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_level_reaches_the_program(program, capsys):
    with without_code_generation():
        assert run(["capture", "--level", "O0", program(options={"dce": True}), "3"]) == 0
    assert "1 switched off" in capsys.readouterr().out
