"""What only a GPU can show: CUDA graphs, streams, and kernels that overlap their predecessors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autofuse.ops import Config, get_op
from autofuse.runtime.plan import Plan
from autofuse.targets import target_of

pytestmark = pytest.mark.gpu

NORMS = get_op("mla_dual_rms_norm")
PROBLEM = NORMS.make_problem(dtype="bf16", q_lora_rank=1536, kv_lora_rank=512, cast_before_weight=True)
DEVICE = torch.device("cuda", 0)


def args_of(tokens: int, seed: int = 0) -> tuple[Any, ...]:
    return NORMS.example_args(PROBLEM, tokens, DEVICE, torch.Generator(DEVICE).manual_seed(seed))


def plan(config: Config) -> str:
    return str(Plan(target_of(DEVICE).arch, PROBLEM, ((1, config),)))


def overlapping_configs(tokens: int) -> list[Config]:
    """Some configs for each way of launching with programmatic dependent launch."""
    configs = [c for c in NORMS.kernel_source("cuda").space.configs(PROBLEM, tokens) if c["VEC_BYTES"] == 16]
    ways = {(c["PDL"], c["PREFETCH"]): c for c in configs if c["PDL"]}
    return list(ways.values())


@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_a_captured_call_replays_on_new_inputs(tokens: int) -> None:
    args, other = args_of(tokens), args_of(tokens, seed=1)
    call = torch.ops.autofuse.mla_dual_rms_norm
    call(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*args)
    expected = [result.clone() for result in call(*other)]
    args[0]._base.copy_(other[0]._base)
    args[1].copy_(other[1])
    args[3].copy_(other[3])
    graph.replay()
    torch.cuda.synchronize()
    for result, right in zip(captured, expected, strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize("captured", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_chained_calls_with_programmatic_launch_see_each_others_results(tokens: int, captured: bool) -> None:
    q_c, q_weight, kv_c, kv_weight, *rest = args_of(tokens)

    def chain(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        q, kv = q_c, kv_c
        for _ in range(40):
            q, kv = torch.ops.autofuse.mla_dual_rms_norm(q, q_weight, kv, kv_weight, *rest, text)
        return q, kv

    expected = chain(plan(NORMS.default_config("cuda", PROBLEM, tokens)))
    for config in overlapping_configs(tokens):
        results = chain(plan(config))
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = chain(plan(config))
            graph.replay()
        torch.cuda.synchronize()
        for result, right in zip(results, expected, strict=True):
            torch.testing.assert_close(result, right, rtol=0.05, atol=0.05, msg=str(config))


def test_calls_run_on_the_current_stream() -> None:
    args = args_of(64)
    expected = torch.ops.autofuse.mla_dual_rms_norm(*args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        results = torch.ops.autofuse.mla_dual_rms_norm(*args)
        assert not stream.query(), "the call waited for the GPU, or ran elsewhere"
    stream.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)
