"""``autofuse compile``: compile kernels for any arch, on a machine that need not have it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.progress import track

from autofuse.cli.options import DtypeOption, JsonOption, OpsOption
from autofuse.cli.output import console, print_json, print_table
from autofuse.errors import AutofuseError, BadInput
from autofuse.ops import OPS, FusedOp, get_op
from autofuse.ops.base import DTYPES
from autofuse.targets import kind_of_arch, toolchain

if TYPE_CHECKING:
    from autofuse.tuner.compile_matrix import Outcome

__all__ = ["compile_kernels"]

_INTERRUPTED = 130  # as a shell reports a command that Ctrl-C ended
_CPU_ARCHES = ("x86-64-v3", "x86-64-v4")


@dataclass(frozen=True)
class _Sum:
    """What came of one arch.

    Attributes:
        compiled: kernels that compile and do not take more of the arch than it has, which are ``skipped``.
        seconds: of the compiler.
        no_kernels_of: ops that have none for this kind of target.
        unavailable: why nothing here compiles for it.
    """

    arch: str
    kernels: int
    compiled: int
    failed: int
    skipped: int
    spilling: int
    seconds: float
    no_kernels_of: tuple[str, ...]
    unavailable: str | None


def compile_kernels(
    arch: Annotated[
        Optional[str],  # noqa: UP045 (typer reads it at run time)
        typer.Option(help="Arches, e.g. sm_80,sm_90a,gfx942 or x86-64-v3."),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All GPU arches that kernels are written for.")] = False,
    op: OpsOption = None,
    configs: Annotated[int, typer.Option(help="Configs of each problem, the default first.", min=1)] = 4,
    triton_configs: Annotated[
        int, typer.Option(help="Configs of each op's kernel in Triton, of one problem, where Triton is.", min=0)
    ] = 1,
    dtype: DtypeOption = "bf16",
    json: JsonOption = False,
) -> None:
    """Compile kernels ahead of time.

    For this machine or another; needs no GPU. The problems are those of the model presets, and a few of each op's own
    with other dtypes, flags and widths; of each the default config and some others. Prints seconds (0 where a kernel
    was in the cache), registers, spilled and shared bytes; with --all only sums, and what spills. A config that takes
    more shared memory than an arch has is skipped. Exit code 1 if a kernel does not compile, 2 if --all has an arch
    that nothing here compiles for.

    Example: autofuse compile --arch sm_80,sm_90a,gfx942
    """
    ops = [get_op(name) for name in op] if op else list(OPS.values())
    if dtype not in DTYPES:
        raise BadInput(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    arches = _arches(arch, all_)
    unavailable = _unavailable(arches) if all_ else {}

    from autofuse.tuner.compile_matrix import compile_jobs, jobs_for

    jobs = jobs_for([name for name in arches if name not in unavailable], ops, dtype, configs, triton_configs)
    done: list[Outcome] = []
    interrupted = False
    try:
        for outcome in _shown(compile_jobs(jobs), len(jobs)):
            done.append(outcome)
    except KeyboardInterrupt:
        interrupted = True
    sums = [_sum(name, unavailable.get(name), [each for each in done if each.job.arch == name], ops) for name in arches]
    if json:
        print_json({"kernels": [_as_dict(each) for each in done], "arches": sums})
    else:
        _print_kernels([each for each in done if _spills(each)] if all_ else done)
        _print_sums(sums)
    for each in done:
        if each.error:
            typer.echo(f"{each.job.arch} {each.job.problem} {each.job.config}: {each.error}", err=True)
    for reason in dict.fromkeys(unavailable.values()):
        names = ", ".join(name for name in arches if unavailable.get(name) == reason)
        typer.echo(f"{names}: {reason}", err=True)
    if interrupted:
        typer.echo("autofuse: stopped; what was compiled is kept, the same command goes on from there", err=True)
        raise typer.Exit(_INTERRUPTED)
    if any(each.error for each in done):
        raise typer.Exit(1)
    if unavailable:
        raise typer.Exit(2)


def _arches(text: str | None, all_: bool) -> list[str]:
    """The arches that were asked for. Raises BadInput, TargetUnavailable for one that was named by hand."""
    from autofuse.tuner.compile_matrix import GPU_ARCHES

    if all_ == (text is not None):
        raise BadInput("give either --arch, with a list such as sm_80,sm_90a, or --all")
    if text is None:
        return list(GPU_ARCHES)
    arches = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(arches):
        raise BadInput(f"arch {text!r}: give a list such as sm_80,sm_90a")
    for name in arches:
        try:
            toolchain(kind_of_arch(name)).check_arch(name)
        except BadInput as error:
            known = [*GPU_ARCHES, *_CPU_ARCHES]
            close = difflib.get_close_matches(name, [each for each in known if each != name], n=1)
            hint = f"; did you mean {close[0]}?" if close and name not in known else ""
            raise BadInput(f"{error}{hint}") from None
    return arches


def _unavailable(arches: Sequence[str]) -> dict[str, str]:
    """Those that nothing here compiles for, and why."""
    reasons = {}
    for name in arches:
        try:
            toolchain(kind_of_arch(name)).check_arch(name)
        except AutofuseError as error:
            reasons[name] = str(error)
    return reasons


def _shown(outcomes: Iterator[Outcome], total: int) -> Iterable[Outcome]:
    """The outcomes, with their progress on standard error: a bar on a terminal, a line for each arch elsewhere."""
    out = console(stderr=True)
    if out.is_terminal:
        yield from track(outcomes, "compiling", total, console=out, transient=True)
        return
    for arch, group in groupby(outcomes, key=lambda outcome: outcome.job.arch):
        count = 0
        for outcome in group:
            count += 1
            yield outcome
        typer.echo(f"{arch}: {count} kernels", err=True)


def _sum(arch: str, unavailable: str | None, outcomes: Sequence[Outcome], ops: Sequence[FusedOp]) -> _Sum:
    failed, skipped = sum(bool(each.error) for each in outcomes), sum(bool(each.skipped) for each in outcomes)
    return _Sum(
        arch,
        kernels=len(outcomes),
        compiled=len(outcomes) - failed - skipped,
        failed=failed,
        skipped=skipped,
        spilling=sum(map(_spills, outcomes)),
        seconds=round(sum(each.artifact.seconds for each in outcomes if each.artifact), 1),
        no_kernels_of=tuple(op.name for op in ops if kind_of_arch(arch) not in op.kernels),
        unavailable=unavailable,
    )


def _print_sums(sums: Sequence[_Sum]) -> None:
    names = ("arch", "kernels", "compiled", "failed", "skipped", "spilling", "seconds")
    rows = [[*(getattr(each, name) for name in names), ", ".join(each.no_kernels_of)] for each in sums]
    print_table("", ["arch", *(f">{name}" for name in names[1:]), "no kernels of"], rows)
    typer.echo(f"{sum(each.compiled for each in sums)} of {sum(each.kernels for each in sums)} kernels compile")


def _print_kernels(outcomes: Sequence[Outcome]) -> None:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(f"{outcome.job.problem} for {outcome.job.arch}", []).append(outcome)
    names = ("seconds", "registers", "spill_bytes", "shared_bytes", "config", "skipped")
    for title, group in groups.items():
        rows = [[_as_dict(each)[name] for name in names] for each in group]
        columns = [">s", ">registers", ">spilled", ">shared", "config", "skipped"]
        skips = any(each.skipped for each in group)
        print_table(title, columns if skips else columns[:-1], rows if skips else [row[:-1] for row in rows])


def _spills(outcome: Outcome) -> bool:
    return outcome.artifact is not None and bool(outcome.artifact.resources.spill_bytes)


def _as_dict(outcome: Outcome) -> dict[str, object]:
    job, artifact = outcome.job, outcome.artifact
    return {
        "arch": job.arch,
        "op": job.problem.op,
        "problem": str(job.problem),
        "config": str(job.config),
        "seconds": artifact and round(artifact.seconds, 3),
        "registers": artifact and artifact.resources.registers,
        "spill_bytes": artifact and artifact.resources.spill_bytes,
        "shared_bytes": outcome.shared_bytes,
        "path": artifact and str(artifact.path),
        "error": outcome.error or None,
        "skipped": outcome.skipped or None,
    }
