"""Compiling every op for many arches: which kernels, and what came of each."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby

from autofuse.errors import CompileError
from autofuse.models import PRESETS
from autofuse.ops import Config, FusedOp, KernelSource, Problem, get_op
from autofuse.ops.drawing import Coverage
from autofuse.ops.languages import TRITON
from autofuse.targets import Artifact, KernelSpec, kind_of_arch, toolchain
from autofuse.tuner.compile_ahead import compile_pool

__all__ = ["GPU_ARCHES", "Job", "Outcome", "compile_jobs", "jobs_for"]

GPU_ARCHES = (
    *("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a"),
    *("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"),
)
"""What kernels are written for: NVIDIA's Ampere to Blackwell, AMD's CDNA 2 to 4 and RDNA 3 and 4."""

_TOKENS = (1024, 1)  # buckets whose configs are compiled: most constraints on T ask for many tokens, some for few
_VARIANTS = 5  # problems of an op's sweep, beside those of the models


@dataclass(frozen=True)
class Job:
    """One kernel to compile."""

    arch: str
    problem: Problem
    config: Config


@dataclass(frozen=True)
class Outcome:
    """What came of a job: an artifact, or one line why it does not compile (``error``) or cannot run (``skipped``).

    Attributes:
        shared_bytes: of a block, static and dynamic; None where it is not known.
    """

    job: Job
    artifact: Artifact | None = None
    error: str = ""
    skipped: str = ""
    shared_bytes: int | None = None


def jobs_for(
    arches: Sequence[str], ops: Sequence[FusedOp], dtype: str, configs: int, triton_configs: int = 1
) -> list[Job]:
    """The kernels of each op for each arch, the same ones each time: the problems that the preset models make, and of
    the op's own sweep those with the most dtypes, flags and widths that these lack. An op that has no kernels for an
    arch has no jobs there.

    Args:
        dtype: of the models' activations.
        configs: of each problem: the default ones first, then such as have values that no earlier one had.
        triton_configs: of each op's kernel in Triton, where Triton is, and for the first problem alone: one takes the
            compiler a second or two.
    """
    chosen: dict[tuple[str, str], list[tuple[Problem, Config]]] = {}
    jobs = []
    for arch in arches:
        kind = kind_of_arch(arch)
        for op in ops:
            if kind in op.kernels:
                if (kind, op.name) not in chosen:
                    chosen[kind, op.name] = [
                        pair
                        for kernel in op.kernel_sources(kind)
                        for pair in _kernels(
                            kind, op, kernel, dtype, triton_configs if kernel.language == TRITON else configs
                        )
                    ]
                jobs += [Job(arch, problem, config) for problem, config in chosen[kind, op.name]]
    return jobs


def compile_jobs(jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Compiles side by side; gives the outcomes in order. Raises TargetUnavailable, BadInput."""
    if not jobs:
        return
    specs = [get_op(job.problem.op).spec(kind_of_arch(job.arch), job.problem, job.config) for job in jobs]
    with compile_pool(kind_of_arch(jobs[0].arch), jobs[0].arch) as pool:
        futures: list[Future[Artifact]] = []
        for arch, group in groupby(zip(jobs, specs, strict=True), key=lambda pair: pair[0].arch):
            futures += pool.submit([spec for _, spec in group], arch)
        for job, spec, future in zip(jobs, specs, futures, strict=True):
            try:
                yield _outcome(job, spec, future.result())
            except CompileError as error:
                yield Outcome(job, error=str(error))


def _outcome(job: Job, spec: KernelSpec, artifact: Artifact) -> Outcome:
    static = artifact.resources.shared_bytes
    if static is None:
        return Outcome(job, artifact)
    shared_bytes = static + spec.shared_bytes
    most = toolchain(kind_of_arch(job.arch)).most_shared_bytes(job.arch)
    skipped = ""
    if most is not None and shared_bytes > most:
        skipped = f"a block has {shared_bytes} bytes of shared memory, {job.arch} at most {most}"
    return Outcome(job, artifact, skipped=skipped, shared_bytes=shared_bytes)


def _kernels(
    kind: str, op: FusedOp, kernel: KernelSource, dtype: str, configs: int
) -> Iterator[tuple[Problem, Config]]:
    source = random.Random(f"{op.name} {kind}")
    space = kernel.space
    coverage = Coverage(space, source)
    problems = _problems(op, dtype)
    for problem in problems[:1] if kernel.language == TRITON else problems:
        chosen = list(dict.fromkeys(kernel.default(problem, tokens) for tokens in _TOKENS))[:configs]
        for config in chosen:
            coverage.take(config)

        def is_another(config: Config, problem: Problem = problem, chosen: list[Config] = chosen) -> bool:
            fits = any(space.refusal(config, problem, tokens) is None for tokens in _TOKENS)
            return fits and config not in chosen

        while len(chosen) < configs and (drawn := coverage.draw(is_another, near=chosen[0])):
            chosen.append(drawn)
        yield from ((problem, config) for config in chosen)


def _problems(op: FusedOp, dtype: str) -> list[Problem]:
    chosen = list(dict.fromkeys(problem for model in PRESETS.values() for problem in op.model_problems(model, dtype)))
    seen = {pair for problem in chosen for pair in problem.params}
    for _ in range(_VARIANTS):
        variant = max(op.sweep_problems(), key=lambda problem: len(set(problem.params) - seen), default=None)
        if variant is None or seen.issuperset(variant.params):
            break
        chosen.append(variant)
        seen.update(variant.params)
    return chosen
