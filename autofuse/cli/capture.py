"""``autofuse capture``: what a program would have to have tuned."""

from __future__ import annotations

import functools
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from autofuse.cache_db import Captured, TunedDatabase
from autofuse.cache_db.faults import AbsentDatabaseError
from autofuse.cli.options import DatabaseOption, JsonOption
from autofuse.cli.output import print_json, print_table
from autofuse.errors import BadInput

__all__ = ["capture"]


def capture(
    program: Annotated[
        Optional[str],  # noqa: UP045 (typer reads it at run time)
        typer.Argument(help="A Python program; without one, what was captured so far is listed.", metavar="PROGRAM"),
    ] = None,
    arguments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="What the program is called with.", metavar="ARGUMENTS"),
    ] = None,
    module: Annotated[bool, typer.Option("-m", help="PROGRAM is a module's name, as for `python -m`.")] = False,
    level: Annotated[str, typer.Option(help="O0 to O3: which fusions to look for.")] = "O2",
    database: DatabaseOption = None,
    json: JsonOption = False,
) -> None:
    """Find what a program would have to have tuned.

    Runs a Python program as it is, but that its torch.compile uses autofuse in place of Inductor, and remembers each
    site that nobody measured, for `autofuse tune --captured`. What the program compiles for autofuse anyway is captured
    whenever it runs. Processes that it starts are not looked into.

    Example: autofuse capture serve.py --batch 16
    """
    code = 0
    summaries: list[str] = []
    if program is not None:
        code = _run(program, arguments or [], module, level, database, quiet=json)
        from autofuse.graph.report_store import last_reports

        summaries = [report.summary for report in last_reports()]
    sites = _captured(database)
    if json:
        print_json({"exit_code": code, "graphs": summaries, "captured": sites})
    else:
        _print(summaries if program is not None else None, sites)
    if code:
        raise typer.Exit(code)


def _captured(path: Path | None) -> list[Captured]:
    try:
        with TunedDatabase(path, read_only=True) as database:
            return database.captured()
    except AbsentDatabaseError:
        return []


def _print(summaries: Sequence[str] | None, sites: Sequence[Captured]) -> None:
    for number, summary in enumerate(summaries or (), start=1):
        typer.echo(f"graph {number}: {summary}")
    if summaries is not None and not summaries:
        typer.echo("The program compiled nothing by torch.compile.")
    if not sites:
        typer.echo("No site is waiting to be tuned.")
        return
    from autofuse.graph.evidence import describe_range

    rows = [[s.problem, describe_range(s.tokens_low, s.tokens_high), s.target, s.seen_at] for s in sites]
    print_table("Waiting to be tuned", ["problem", ">T", "target", "seen"], rows)
    typer.echo("`autofuse tune --captured` tunes those of this machine.")


def _run(
    program: str, arguments: Sequence[str], module: bool, level: str, database: Path | None, *, quiet: bool
) -> int:
    """Runs a program in this process, with autofuse in place of Inductor. Returns its exit code. Raises BadInput."""
    from autofuse.graph.settings import Settings

    options: dict[str, Any] = {"autofuse.level": level}
    if database is not None:
        options["autofuse.database"] = str(database)
    Settings.parse(options)  # says now what is wrong with them
    if not module and not Path(program).is_file():
        raise BadInput(f"there is no program {program!r}; -m runs a module")
    folder = str(Path.cwd() if module else Path(program).resolve().parent)
    saved = (sys.argv, sys.path)
    sys.argv, sys.path = [program, *arguments], [folder, *sys.path]
    try:
        with _in_place_of_inductor(options), redirect_stdout(sys.stderr) if quiet else nullcontext():
            if module:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        return _exit_code(end)
    except Exception:  # the program's own fault, which is told as Python tells it
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path = saved
    return 0


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


@contextmanager
def _in_place_of_inductor(options: dict[str, Any]) -> Iterator[None]:
    """``torch.compile`` takes our backend wherever Inductor is asked for; its mode and options reach Inductor still."""
    import torch

    from autofuse.graph.backend import autofuse

    original: Callable[..., Any] = torch.compile

    @functools.wraps(original)
    def compile(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend", "inductor") == "inductor":
            mode, own = kwargs.pop("mode", None), kwargs.pop("options", None)
            ours = functools.partial(autofuse, mode=mode, options={**(own or {}), **options})
            kwargs["backend"] = ours
        return original(*args, **kwargs)

    torch.compile = compile
    try:
        yield
    finally:
        torch.compile = original
