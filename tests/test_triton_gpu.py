"""What only a GPU can show of kernels in Triton: right results, CUDA graphs, overlap with what runs before, tuning."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from autofuse.cache_db import TunedDatabase
from autofuse.ops import OPS, Config, FusedOp, Problem
from autofuse.ops.languages import TRITON, language_of
from autofuse.runtime.dispatch import bind_plan
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of
from autofuse.targets.triton import triton_unavailable
from autofuse.tuner.budgets import EFFORTS, Effort
from autofuse.tuner.compile_ahead import compile_pool
from autofuse.tuner.guards import GuardedCall
from autofuse.tuner.job import Bucket, tune_buckets
from autofuse.tuner.verify import WrongResult, verify
from fuzz_ops import random_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(triton_unavailable() is not None, reason=str(triton_unavailable())),
]

DEVICE = torch.device("cuda", 0)
IN_TRITON = [pytest.param(op, id=op.name) for op in OPS.values() if "cuda" in op.triton_kernels]
CONFIGS = 3  # of each problem


def plan_of(problem: Problem, config: Config) -> Plan:
    return Plan(target_of(DEVICE).arch, problem, ((1, config),))


def some_configs(op: FusedOp, problem: Problem, **fixed: int) -> Iterator[Config]:
    kernel, source = op.triton_kernels["cuda"], random.Random(str(problem))
    if not fixed:
        yield kernel.default(problem, 1 << 20)
    for _ in range(CONFIGS):
        if config := random_config(kernel.space, problem, source, fixed):
            yield config


@pytest.mark.parametrize("op", IN_TRITON)
def test_configs_are_right_for_every_problem_of_the_sweep(op: FusedOp) -> None:
    effort = replace(Effort(), verify_seeds=1)
    kernels = [(problem, config) for problem in op.sweep_problems() for config in some_configs(op, problem)]
    with compile_pool("cuda", target_of(DEVICE).arch) as pool:
        for compiled in pool.submit([op.spec("cuda", *kernel) for kernel in kernels]):
            compiled.result()
    wrong = []
    for problem, config in kernels:
        call = GuardedCall(bind_plan(op, plan_of(problem, config), DEVICE))
        try:
            verify(op, problem, 37, call, DEVICE, effort)
        except WrongResult as error:
            wrong.append(f"{problem} {config}: {error}")
    assert wrong == []


@pytest.mark.parametrize("pdl", [0, 1, 2])
@pytest.mark.parametrize("op", IN_TRITON)
def test_a_captured_call_replays_what_a_launch_gives(op: FusedOp, pdl: int) -> None:
    problem = next(iter(op.sweep_problems()))
    config = next(some_configs(op, problem, PDL=pdl))
    text = str(plan_of(problem, config))
    args = op.example_args(problem, 64, DEVICE, torch.Generator(DEVICE).manual_seed(0))
    call: Any = getattr(torch.ops.autofuse, op.name)
    expected = [result.clone() for result in call(*args, text)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(*args, text)
    for result in results:
        result.view(torch.uint8).zero_()
    graph.replay()
    torch.cuda.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result.view(torch.uint8), right.view(torch.uint8))


def test_both_languages_are_tuned_and_the_faster_one_wins(tmp_path: Any) -> None:
    op = OPS["mla_dual_rms_norm"]
    problem = op.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
    with TunedDatabase(tmp_path / "tuned.db") as database:
        (winner,) = tune_buckets([Bucket(problem, 1)], DEVICE, database, EFFORTS["quick"])
        trials = database.trials(winner.target, problem, 1, *op.source_hashes("cuda"))
    best = {
        language: min(t.time_us for t in trials if t.status == "ok" and language_of(t.config) == language)
        for language in {language_of(trial.config) for trial in trials}
    }
    assert set(best) == {"c++", TRITON}
    print(f"\nwinner {winner.config} {winner.time_us:.3f} µs, best of each language {best}")
    assert winner.source_hash == op.source_hash("cuda", winner.config)
