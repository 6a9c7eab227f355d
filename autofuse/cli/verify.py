"""``autofuse verify``: are the winners still right, and as fast as recorded?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from autofuse.cache_db import TunedDatabase, Winner, why_unused_here
from autofuse.cache_db.kernels import STALE
from autofuse.cli.marks import Marks
from autofuse.cli.options import DatabaseOption, DeviceOption, JsonOption, OpOption, checked_op
from autofuse.cli.output import console, gain, microseconds, print_json, print_table
from autofuse.ops import Problem
from autofuse.targets import parse_device, target_of

if TYPE_CHECKING:
    from autofuse.tuner.recheck import Checked

__all__ = ["verify"]

_INTERRUPTED = 130  # as a shell reports a command that Ctrl-C ended


def verify(
    op: OpOption = None,
    marked: Annotated[
        bool, typer.Option("--marked", help="Only winners that `autofuse show` marks: disputed, suspect, imported.")
    ] = False,
    device: DeviceOption = "auto",
    effort: Annotated[str, typer.Option(help="quick, default or exhaustive: how many rounds.")] = "quick",
    database: DatabaseOption = None,
    json: JsonOption = False,
) -> None:
    """Check winners again: correctness first, then a few rounds beside the unfused code.

    What agrees with its record loses its mark, and what was imported counts as measured here. What does not is marked
    as disputed, goes by its present figures, and is tuned again by `autofuse tune --captured`. What is wrong is a
    winner no more. Stale winners are left out: `autofuse tune` measures them anew. Exit code 1 if anything did not
    agree.

    Example: autofuse verify --marked
    """
    name, where = checked_op(op), parse_device(device)

    from autofuse.tuner.budgets import effort as effort_named
    from autofuse.tuner.device_lock import device_lock
    from autofuse.tuner.recheck import recheck

    budgets = effort_named(effort)
    with TunedDatabase(database, read_only=True) as known:  # one that is not there is not to be made
        path = known.path
    with TunedDatabase(path) as opened:
        every = opened.every(Winner, target_of(where), name, candidates=True)
        marks = Marks(opened)
        unused = {winner: why for winner in every if (why := why_unused_here(winner))}
        fresh = [winner for winner in every if winner not in unused and (not marked or marks.of(winner))]
        done: list[Checked] = []
        try:
            with device_lock([where], on_wait=_say), _progress(len(fresh)) as show:

                def observe(checked: Checked) -> None:
                    done.append(checked)
                    show(checked)

                recheck(fresh, where, opened, budgets, observe)
        except KeyboardInterrupt:
            _say(f"stopped; {len(done)} of {len(fresh)} winners are checked, and what came of them is in {path}")
            raise typer.Exit(_INTERRUPTED) from None
    left_out = Counter(unused.values())
    if json:
        print_json({"database": path, "left_out": left_out, "checked": done})
    else:
        _print(done, left_out, f"{target_of(where)} in {path}")
    if any(checked.verdict != "agrees" for checked in done):
        raise typer.Exit(1)


def _print(done: Sequence[Checked], left_out: Mapping[str, int], where: str) -> None:
    groups: dict[Problem, list[Checked]] = {}
    for checked in done:
        groups.setdefault(checked.before.problem, []).append(checked)
    for problem, group in groups.items():
        columns = [">T", "verdict", ">µs", ">gain [95 %]", ">recorded µs", ">recorded gain", "config", "note"]
        print_table(str(problem), columns, [_row(checked) for checked in group])
    counts = Counter(checked.verdict for checked in done)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in dict.fromkeys(c.verdict for c in done))
    typer.echo(f"{told} of {where}" if told else f"There is nothing to check of {where}.")
    for why, count in left_out.items():
        typer.echo(f"{count} left out, {why}" + (": `autofuse tune` measures these anew." if why == STALE else "."))
    if counts["unchecked"]:
        typer.echo("What is unchecked stays as it was: `autofuse verify` again, on an idle machine.")
    if counts["disputed"] or counts["failed"]:
        typer.echo("`autofuse tune --captured` tunes what was disputed, or failed, again.")


def _row(checked: Checked) -> list[object]:
    before, now = checked.before, checked.now
    figures = ["–", "–"] if now is None else [microseconds(now.time_us), gain(now)]
    recorded = [microseconds(before.time_us), gain(before)]
    note = "; ".join(filter(None, (checked.status, checked.message, *checked.disturbances)))
    return [before.tokens, checked.verdict, *figures, *recorded, before.config, note]


def _line(checked: Checked) -> str:
    before, now = checked.before, checked.now
    found = checked.message if now is None else f"{gain(now)}, recorded {gain(before)}"
    return f"{before.problem} T={before.tokens}: {checked.verdict}: {found}"


@contextmanager
def _progress(winners: int) -> Iterator[Callable[[Checked], None]]:
    """On standard error: a bar on a terminal, a line for each winner elsewhere."""
    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda checked: _say(_line(checked))
        return
    with Progress(
        TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=out, transient=True
    ) as bar:
        task = bar.add_task("", total=winners)

        def show(checked: Checked) -> None:
            bar.console.print(_line(checked), markup=False, soft_wrap=True)
            bar.advance(task)

        yield show


def _say(line: str) -> None:
    typer.echo(f"autofuse: {line}", err=True)
