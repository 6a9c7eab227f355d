"""``autofuse compile``: compile kernels for any arch, on a machine that need not have it."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from autofuse.cli.options import DtypeOption, JsonOption, OpsOption
from autofuse.cli.output import print_json, print_table
from autofuse.errors import BadInput, CompileError
from autofuse.ops import OPS, Config, Problem, get_op
from autofuse.targets import Artifact, kind_of_arch

__all__ = ["compile_kernels"]

_TOKENS = 1024  # the bucket whose search space the configs are drawn from: few constraints bite there
_KNOWN_ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "x86-64-v3", "x86-64-v4")


@dataclass(frozen=True)
class _Job:
    """One kernel to compile, and what came of it: an artifact, or an error message."""

    arch: str
    problem: Problem
    config: Config
    artifact: Artifact | None = None
    error: str = ""


def compile_kernels(
    arch: Annotated[str, typer.Option(help="Arches, e.g. sm_80,sm_90a,sm_100a or x86-64-v3.")],
    op: OpsOption = None,
    configs: Annotated[int, typer.Option(help="Configs of each problem, the default first.", min=1)] = 4,
    dtype: DtypeOption = "bf16",
    json: JsonOption = False,
) -> None:
    """Compile kernels ahead of time.

    For this machine or another; needs no GPU. For each problem of the model presets: the default config, and a few
    others of its search space. Prints seconds (0 where a kernel was in the cache), registers, spilled and shared
    bytes. Exit code 1 if one does not compile.

    Example: autofuse compile --arch sm_80,sm_90a,sm_100a
    """
    arches = list(dict.fromkeys(name.strip() for name in arch.split(",")))
    if not all(arches):
        raise BadInput(f"arch {arch!r}: give a list such as sm_80,sm_90a")
    ops = [get_op(name) for name in op] if op else list(OPS.values())

    from autofuse.tuner.api import model_buckets

    problems = [bucket.problem for bucket in model_buckets(None, [_TOKENS], dtype, [each.name for each in ops])]
    done = [job for name in arches for job in _compile(name, problems, configs)]
    failed = [job for job in done if job.artifact is None]
    if json:
        print_json([_as_dict(job) for job in done])
    else:
        _print(done)
        for job in failed:
            typer.echo(f"{job.arch} {job.problem} {job.config}: {job.error}", err=True)
        typer.echo(f"{len(done) - len(failed)} of {len(done)} kernels compile")
    if failed:
        raise typer.Exit(1)


def _compile(arch: str, problems: Sequence[Problem], configs: int) -> Iterator[_Job]:
    from autofuse.tuner.compile_ahead import compile_pool

    kind = kind_of_arch(arch)
    jobs = [_Job(arch, problem, config) for problem in problems for config in _configs(kind, problem, configs)]
    specs = [get_op(job.problem.op).spec(kind, job.problem, job.config) for job in jobs]
    with compile_pool(kind, arch) as pool:
        for job, future in zip(jobs, pool.submit(specs), strict=True):
            try:
                yield replace(job, artifact=future.result())
            except CompileError as error:
                yield replace(job, error=str(error))
            except BadInput as error:
                close = difflib.get_close_matches(arch, _KNOWN_ARCHES, n=1)
                raise BadInput(f"{error}{f'; did you mean {close[0]}?' if close else ''}") from None


def _configs(kind: str, problem: Problem, count: int) -> list[Config]:
    """The default config, and others of the space, the same each time."""
    op = get_op(problem.op)
    if kind not in op.kernels:
        return []
    default = op.default_config(kind, problem, _TOKENS)
    others = [config for config in op.kernel_source(kind).space.configs(problem, _TOKENS) if config != default]
    return [default, *random.Random(0).sample(others, min(count - 1, len(others)))]


def _print(jobs: Sequence[_Job]) -> None:
    groups: dict[str, list[_Job]] = {}
    for job in jobs:
        groups.setdefault(f"{job.problem} for {job.arch}", []).append(job)
    for title, group in groups.items():
        rows = []
        for job in group:
            facts = _as_dict(job)
            seconds = None if job.artifact is None else f"{job.artifact.seconds:.2f}"
            rows.append([seconds, *(facts[name] for name in ("registers", "spill_bytes", "shared_bytes", "config"))])
        print_table(title, [">s", ">registers", ">spilled", ">shared", "config"], rows)


def _as_dict(job: _Job) -> dict[str, object]:
    facts: dict[str, object] = {"arch": job.arch, "problem": str(job.problem), "config": str(job.config)}
    if job.artifact is None:
        return {**facts, "error": job.error, **dict.fromkeys(("seconds", "registers", "spill_bytes", "shared_bytes"))}
    return {
        **facts,
        "seconds": round(job.artifact.seconds, 3),
        **job.artifact.resources.as_dict(),
        "path": str(job.artifact.path),
    }
