"""Plans as text, the lazy package, and the native dispatcher where it cannot be had."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import autofuse
from autofuse.errors import BadInput, UnsupportedCall
from autofuse.ops import Config, FusedOp, Problem, get_op
from autofuse.runtime.dispatch import bind_plan, registry
from autofuse.runtime.native import load_native
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of

CPU = torch.device("cpu")
TEXT = "sm_90a|mla_dual_rms_norm(dtype=bf16)|1:ROWS=1|64:ROWS=2|1024:ROWS=4"


def test_a_call_runs_the_next_larger_bucket_or_the_largest() -> None:
    plan = Plan.parse(TEXT)
    configs = {tokens: str(plan.config_for(tokens)) for tokens in (0, 1, 2, 64, 65, 1024, 9999)}
    assert configs == {0: "ROWS=1", 1: "ROWS=1", 2: "ROWS=2", 64: "ROWS=2"} | dict.fromkeys((65, 1024, 9999), "ROWS=4")


def test_a_plan_is_named_by_its_content() -> None:
    plan = Plan.parse(TEXT)
    assert str(plan) == TEXT
    assert Plan.parse(TEXT).name == plan.name
    assert Plan.parse(TEXT.replace("ROWS=4", "ROWS=2")).name != plan.name


def test_a_bucket_may_run_unfused_and_a_plan_names_its_source() -> None:
    plan = Plan("sm_90a", Problem.parse("op(a=1)"), ((1, Config.of(ROWS=1)), (64, None)), source="0123456789abcdef")
    assert str(plan) == "sm_90a@0123456789abcdef|op(a=1)|1:ROWS=1|64:unfused"
    assert Plan.parse(str(plan)) == plan
    assert (str(plan.config_for(1)), plan.config_for(2)) == ("ROWS=1", None)
    assert plan.made_for("0123456789abcdef")
    assert not plan.made_for("1123456789abcdef")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sm_90a",
        "sm_90a|op(a=1)",
        "|op(a=1)|1:A=1",
        "sm_90a|op|1:A=1",
        "sm_90a|op(a=1)|A=1",
        "sm_90a|op(a=1)|x:A=1",
        "sm_90a|op(a=1)|64:A=1|1:A=1",
        "sm_90a|op(a=1)|1:A=1|1:A=2",
        "sm_90a|op(a=1)|1:A=x",
        "sm_90a|op(a=1)|1:A=1,A=2",
        "sm_90a|op(a=1)|1:Unfused",
        "sm_90a@|op(a=1)|1:A=1",
        "@1234|op(a=1)|1:A=1",
    ],
)
def test_malformed_plans_are_refused(text: str) -> None:
    with pytest.raises(BadInput):
        Plan.parse(text)


def test_importing_autofuse_registers_the_ops_and_loads_neither_tuner_nor_graph_passes() -> None:
    script = (
        "import sys, autofuse, torch\n"
        "torch.ops.autofuse.mla_dual_rms_norm.default\n"
        "heavy = ('optuna', 'sqlite_utils', 'transformers', 'autofuse.tuner', 'autofuse.graph')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_public_names_are_there() -> None:
    assert callable(autofuse.tune)
    assert callable(autofuse.explain)
    assert {"tune", "explain", "AutofuseError", "__version__"} <= set(dir(autofuse))
    with pytest.raises(AttributeError, match="module 'autofuse' has no attribute 'fuse'"):
        _ = autofuse.fuse


def test_without_a_compiler_calls_go_through_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load_native() is None


def test_the_native_dispatcher_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOFUSE_NATIVE", "0")
    assert load_native() is None


def test_a_plan_outside_the_search_space_is_not_run() -> None:
    op = get_op("mla_dual_rms_norm")
    problem = op.make_problem(dtype="bf16", q_lora_rank=88, kv_lora_rank=24, cast_before_weight=True)
    device = torch.device("cpu")
    config = Config.of(op.default_config("cpu", problem, 4), TASK_ROWS=0)
    with pytest.raises(UnsupportedCall, match="not of the search space: TASK_ROWS=0"):
        bind_plan(op, Plan(target_of(device).arch, problem, ((4, config),)), device)


@pytest.fixture
def latents() -> tuple[FusedOp, Problem, Callable[[int], tuple[Any, ...]]]:
    """An op, a problem of its own, and arguments of so many tokens."""
    op = get_op("mla_dual_rms_norm")
    problem = op.make_problem(dtype="bf16", q_lora_rank=72, kv_lora_rank=56, cast_before_weight=True)
    return op, problem, lambda tokens: op.example_args(problem, tokens, CPU, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("native", [False, True])
def test_an_unfused_bucket_runs_the_reference(latents, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    op, problem, args_of = latents
    if native and not registry.go_native():
        pytest.skip("the native dispatcher cannot be had here")
    config = op.default_config("cpu", problem, 8 + native)  # a plan of its own for each run of this test
    plan = str(Plan(target_of(CPU).arch, problem, ((8 + native, config), (64, None)), op.source_hash("cpu")))
    ran: list[int] = []
    reference = type(op).reference

    def watched(self: FusedOp, *args: Any) -> tuple[torch.Tensor, ...]:
        ran.append(args[0].shape[0])
        return reference(self, *args)

    monkeypatch.setattr(type(op), "reference", watched)
    for tokens in (8, 9 + native, 64, 65, 3):
        args = args_of(tokens)
        results = torch.ops.autofuse.mla_dual_rms_norm(*args, plan)
        for result, expected in zip(results, reference(op, *args), strict=True):
            torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
    assert ran == [9 + native, 64, 65]


@pytest.mark.parametrize("fault", ["source", "config"])
def test_a_plan_for_other_kernels_is_one_warning_and_the_reference(latents, fault: str, caplog) -> None:
    op, problem, args_of = latents
    source, config = op.source_hash("cpu"), op.default_config("cpu", problem, 8)
    if fault == "source":
        source = "0" * len(source)
    else:
        config = Config.of(config, NO_LONGER=1)
    plan = str(Plan(target_of(CPU).arch, problem, ((8, config),), source))
    for tokens in (3, 8, 8):
        args = args_of(tokens)
        results = torch.ops.autofuse.mla_dual_rms_norm(*args, plan)
        for result, expected in zip(results, op.reference(*args), strict=True):
            assert torch.equal(result, expected)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    said = "another version of the kernel" if fault == "source" else "not of the search space"
    assert said in warning
    assert "runs its reference" in warning


def test_results_have_the_dtype_that_tracing_promises_whatever_the_weights_have() -> None:
    op = get_op("mla_dual_rms_norm")
    problem = op.make_problem(dtype="bf16", q_lora_rank=88, kv_lora_rank=24, cast_before_weight=True)
    args = list(op.example_args(problem, 3, torch.device("cpu"), torch.Generator()))
    args[1], args[3] = args[1].float(), args[3].float()
    assert [result.dtype for result in torch.ops.autofuse.mla_dual_rms_norm(*args)] == [torch.bfloat16] * 2
    torch.library.opcheck(torch.ops.autofuse.mla_dual_rms_norm.default, tuple(args))


def test_calls_find_an_implementation_while_the_native_one_is_put_in_place() -> None:
    code = """
import threading, torch, autofuse
from autofuse.ops import get_op
from autofuse.runtime.dispatch import registry
op = get_op("mla_dual_rms_norm")
args = op.example_args(op.sweep_problems()[0], 2, torch.device("cpu"), torch.Generator())
failures = []
def calls():
    for _ in range(300):
        try:
            torch.ops.autofuse.mla_dual_rms_norm(*args)
        except Exception as error:
            failures.append(error)
threads = [threading.Thread(target=calls) for _ in range(3)]
for thread in threads: thread.start()
registry.go_native()
for thread in threads: thread.join()
assert not failures, failures[0]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
