"""What only a GPU can show: CUDA graphs, streams, and kernels that overlap their predecessors."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import pytest
import torch

import autofuse.kernels_src
from autofuse.ops import OPS, Config, FusedOp, KernelSource, Problem, get_op
from autofuse.ops.languages import TRITON
from autofuse.runtime.dispatch import bind_plan
from autofuse.runtime.plan import Plan
from autofuse.targets import Kernel, KernelSpec, target_of, toolchain
from bench.chain import Chain, launched_plainly
from fuzz_ops import random_config

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


# Programmatic dependent launch of every op that has it: whatever runs before, results are those of a plain launch.

OVERLAPPING = [
    pytest.param(op, kernel, id=f"{op.name} {kernel.language}")
    for op in OPS.values()
    for kernel in (op.kernel_sources("cuda") if "cuda" in op.kernels else ())
    if any(tunable.name == "PDL" for tunable in kernel.space.tunables)
]
REPLAYS = 1000


def drawn(op: FusedOp, kernel: KernelSource, tokens: int, pdl: int, seed: str) -> tuple[Problem, Config, Config]:
    """A problem, a config that lets the next kernel start early (PDL=1) or late (PDL=2), and the same launched plainly.

    It runs on the op's ``example_args``: those of a chain.
    """
    space, source = kernel.space, random.Random(seed)
    while True:
        problem = source.choice(op.sweep_problems())
        config = random_config(space, problem, source, {"PDL": pdl})
        args = op.example_args(problem, tokens, DEVICE, torch.Generator(DEVICE))
        if config and op.binding(problem).launchable(args, op.launch_shape(problem, config).align):
            return problem, config, launched_plainly(op, problem, config)


def captured(run: Callable[[], list[torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    run()  # outside of the capture: first calls load kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaNs, which poison and padding may be, are not equal to themselves; their bits are."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def differ(
    run: Callable[[], list[torch.Tensor]],
    other: Callable[[], list[torch.Tensor]],
    change_inputs: Callable[[int], None],
    put_back: Callable[[], None],
) -> bool:
    """Whether two runs, each captured in a CUDA graph, ever give different results in REPLAYS replays on changing
    inputs.
    """
    (first, results), (second, others) = captured(run), captured(other)
    found = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for replay in range(REPLAYS):
        change_inputs(replay)
        put_back()
        first.replay()
        expected = [result.clone() for result in results]
        put_back()
        second.replay()
        for result, right in zip(others, expected, strict=True):
            found |= (bits(result) != bits(right)).any()
    return bool(found)


@pytest.mark.parametrize("tokens", [1, 64, 500])
@pytest.mark.parametrize("pdl", [1, 2])
@pytest.mark.parametrize(("op", "kernel"), OVERLAPPING)
def test_overlapping_kernels_between_gemms_change_nothing(
    op: FusedOp, kernel: KernelSource, pdl: int, tokens: int
) -> None:
    problem, config, plain = drawn(op, kernel, tokens, pdl, f"{op.name} {tokens} {pdl}")
    chain = Chain(problem, tokens, DEVICE, links=3)
    before = {index: chain.args[index].clone() for index in op.mutates if chain.args[index] is not None}
    generator = torch.Generator(DEVICE).manual_seed(1)

    def change_inputs(replay: int) -> None:
        chain.start.copy_(torch.randn(chain.start.shape, device=DEVICE, generator=generator))

    def put_back() -> None:
        for index, content in before.items():
            chain.args[index].copy_(content)

    assert not differ(lambda: chain.run(plain), lambda: chain.run(config), change_inputs, put_back), (
        f"{problem} {config}"
    )


class LateChain:
    """Late copy → op → late copy → op …: a late copy lets the op start at once, but writes what the op reads, and reads
    what the op returned before, only some microseconds later. A kernel that touches either without waiting is wrong.

    All that the op reads changes from call to call: activations, positions and slots, as well as weights and tables,
    but for what it was promised is constant.
    """

    def __init__(self, problem: Problem, tokens: int, links: int = 3) -> None:
        op = get_op(problem.op)
        sets = [op.example_args(problem, tokens, DEVICE, torch.Generator(DEVICE).manual_seed(i)) for i in range(5)]
        self.args = sets[0]
        constant = {tensor.index for tensor in op.binding(problem).tensors if tensor.constant}
        self._memory = [self._read_only(args, {*op.mutates, *constant}) for args in sets]
        self._sets = [[tensor.clone() for tensor in memory] for memory in self._memory]
        self._staged = [[tensor.clone() for tensor in self._memory[0]] for _ in range(links)]
        self._mutated = [self.args[index] for index in op.mutates if self.args[index] is not None]
        self._before = [tensor.clone() for tensor in self._mutated]
        self._late_copy = self._load()

    def run(self, call: Callable[..., Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        results: list[torch.Tensor] = []
        for staged in self._staged:
            copies = [torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device=DEVICE) for r in results]
            self._copy([*staged, *results], [*self._memory[0], *copies])
            kept += copies
            results = []  # the call gets the same memory again
            results = list(call(*self.args))
        return [*kept, *results, *self._mutated]

    def change_inputs(self, replay: int) -> None:
        for link, staged in enumerate(self._staged):
            for tensor, content in zip(staged, self._sets[(replay + link) % len(self._sets)], strict=True):
                tensor.copy_(content)

    def put_back(self) -> None:
        for tensor, content in zip(self._mutated, self._before, strict=True):
            tensor.copy_(content)

    @staticmethod
    def _read_only(args: Sequence[Any], without: Set[int]) -> list[torch.Tensor]:
        """The memory of all arguments but some, each piece once: several may be views of one tensor."""
        read = [arg for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and i not in without]
        whole = [arg if arg._base is None else arg._base for arg in read]
        return list({tensor.data_ptr(): tensor for tensor in whole}.values())

    MOST, BLOCKS, CYCLES = 20, 32, 8000  # 4 µs at 2 GHz

    def _load(self) -> Kernel:
        shutil.copy(Path(__file__).with_name("late_copy.cu"), autofuse.kernels_src.FOLDER)
        spec = KernelSpec(
            source="late_copy.cu",
            entry="late_copy",
            defines={"THREADS": 256, "BLOCKS": self.BLOCKS, "CYCLES": self.CYCLES},
            params_format="P" * 2 * self.MOST + "i" * self.MOST,
            block=256,
        )
        chain = toolchain("cuda")
        return chain.load(spec, chain.compile(spec, target_of(DEVICE).arch), DEVICE)

    def _copy(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        nothing = [0] * (self.MOST - len(sources))
        sizes = [tensor.untyped_storage().nbytes() for tensor in sources]
        self._late_copy.launch(
            self.BLOCKS,
            *(tensor.data_ptr() for tensor in sources), *nothing,
            *(tensor.data_ptr() for tensor in targets), *nothing,
            *sizes, *nothing,
        )  # fmt: skip


def differ_behind_a_late_copy(op: FusedOp, problem: Problem, config: Config, other: Config, tokens: int) -> bool:
    chain, arch = LateChain(problem, tokens), target_of(DEVICE).arch
    first, second = (bind_plan(op, Plan(arch, problem, ((1, each),)), DEVICE) for each in (config, other))
    return differ(lambda: chain.run(first), lambda: chain.run(second), chain.change_inputs, chain.put_back)


@pytest.mark.usefixtures("edit_kernels")
@pytest.mark.parametrize("tokens", [1, 64, 500])
@pytest.mark.parametrize("pdl", [1, 2])
@pytest.mark.parametrize(("op", "kernel"), OVERLAPPING)
def test_overlapping_kernels_wait_for_one_that_is_late(
    op: FusedOp, kernel: KernelSource, pdl: int, tokens: int
) -> None:
    problem, config, plain = drawn(op, kernel, tokens, pdl, f"{op.name} {tokens} {pdl} late")
    assert not differ_behind_a_late_copy(op, problem, plain, config, tokens), f"{problem} {config}"


@pytest.mark.parametrize("pdl", [1, 2])
@pytest.mark.parametrize(("op", "kernel"), OVERLAPPING)
def test_a_kernel_that_does_not_wait_is_found(
    op: FusedOp, kernel: KernelSource, pdl: int, edit_kernels: Callable[[str, str, str], None]
) -> None:
    if kernel.language == TRITON:
        edit_kernels(kernel.file, "gdc_wait()", "pass")
    else:
        edit_kernels("gpu.cuh", 'asm volatile("griddepcontrol.wait;" ::: "memory");', "")
    problem, config, plain = drawn(op, kernel, 64, pdl, f"{op.name} {pdl}")
    assert differ_behind_a_late_copy(op, problem, plain, config, 64), f"{problem} {config}"
