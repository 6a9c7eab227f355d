"""``autofuse rollback`` and ``autofuse gc``: winners of before, and what nothing needs any more."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from autofuse.cache_db import KEPT_WINNERS, FormerWinner, TunedDatabase, collect_garbage
from autofuse.cli.options import DatabaseOption, JsonOption, TargetOption, choose_targets
from autofuse.cli.output import gain, microseconds, print_json, print_table
from autofuse.errors import BadInput
from autofuse.ops import Problem

__all__ = ["gc", "rollback"]


def rollback(
    problem: Annotated[
        Optional[str],  # noqa: UP045 (typer reads it at run time)
        typer.Argument(help="As `autofuse show` prints it; without it, winners of before are listed."),
    ] = None,
    tokens: Annotated[Optional[int], typer.Option(help="The T whose winner goes back.", min=1)] = None,  # noqa: UP045
    target: TargetOption = None,
    database: DatabaseOption = None,
    json: JsonOption = False,
) -> None:
    """Make an earlier winner the winner again.

    Each winner that was replaced is kept. The one that is replaced by this is not: it is a trial still, and `autofuse
    tune --retune` finds it again if it is the best.

    Example: autofuse rollback 'fp8_group_quant(dtype=bf16,…)' --tokens 64 --target sm_90a
    """
    asked = None if problem is None else Problem.parse(problem)
    if asked is None or tokens is None:
        if asked is not None:
            raise BadInput("give the T whose winner is to go back as well: --tokens 64")
        with TunedDatabase(database, read_only=True) as opened:
            listed = [each for one in choose_targets(opened, target) for each in opened.history(one, None, tokens)]
        _print_history(listed, json)
        return
    with TunedDatabase(database) as opened:
        chosen = choose_targets(opened, target)
        former = (each.winner.target for one in chosen for each in opened.history(one, asked, tokens))
        targets = sorted(set(former), key=str)
        if not targets:
            raise BadInput(f"{asked} at T={tokens} has no winner of before in {opened.path}")
        if len(targets) > 1:
            named = ", ".join(repr(str(each)) for each in targets)
            raise BadInput(f"{asked} at T={tokens} has several targets: --target is one of {named}")
        winner = opened.roll_back(targets[0], asked, tokens)
    assert winner is not None
    if json:
        print_json({"winner": winner})
    else:
        typer.echo(
            f"{asked} at T={tokens} on {winner.target} is {winner.config} again: "
            f"{microseconds(winner.time_us)} µs, {gain(winner)}, measured {winner.measured_at}"
        )


def gc(
    keep: Annotated[int, typer.Option(help="How many winners of before to keep of each bucket.", min=0)] = KEPT_WINNERS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; do nothing.")] = False,
    database: DatabaseOption = None,
    json: JsonOption = False,
) -> None:
    """Throw away what nothing needs any more.

    Trials and winners of versions of kernels that are not installed here, old winners of before, and provenance that
    no row names. Of two checkouts that share a database, each takes the other's kernels for old ones.

    Example: autofuse gc --dry-run
    """
    with TunedDatabase(database, read_only=dry_run) as opened:
        removed = collect_garbage(opened, keep=keep, dry_run=dry_run)
        path = opened.path
    if json:
        print_json({"database": path, "dry_run": dry_run, "removed": removed})
        return
    listed = ", ".join(f"{count} of {table}" for table, count in removed.items() if count) or "nothing"
    typer.echo(f"{'Would remove' if dry_run else 'Removed'} from {path}: {listed}")


def _print_history(former: list[FormerWinner], json: bool) -> None:
    if json:
        print_json([{"replaced_at": each.replaced_at, "winner": each.winner} for each in former])
    elif not former:
        typer.echo("No winner was ever replaced.")
    else:
        columns = ["target", "problem", ">T", ">µs", ">gain [95 %]", "config", "measured", "replaced"]
        rows = [
            [w.target, w.problem, w.tokens, microseconds(w.time_us), gain(w), w.config, w.measured_at, each.replaced_at]
            for each in former
            for w in (each.winner,)
        ]
        print_table("Winners of before, the last replaced first", columns, rows)
