"""``autofuse export``, ``import`` and ``merge``: carry measurements between machines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Optional

import typer

from autofuse.cache_db import (
    ImportSummary,
    TunedDatabase,
    Winner,
    default_path,
    export_database,
    import_into,
    merge_exports,
    preview_import,
)
from autofuse.cli.options import DatabaseOption, JsonOption, OpOption, TargetOption, checked_op, choose_targets
from autofuse.cli.output import gain, list_winners, microseconds, print_json, print_table
from autofuse.errors import BadInput
from autofuse.models import checked_config, model_config, per_rank
from autofuse.ops import OPS, Problem
from autofuse.ops.base import DTYPES
from autofuse.targets import Target

__all__ = ["export", "import_", "merge"]

_MOST_RANKS = 1024  # that share a model's heads

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")]


def export(
    path: Annotated[Path, typer.Argument(help="The file to write: .jsonl gives JSON lines, anything else SQLite.")],
    op: OpOption = None,
    target: TargetOption = None,
    gpu: Annotated[
        Optional[str],  # noqa: UP045 (typer reads it at run time)
        typer.Option(help="Only devices with this in their name, e.g. H200.", metavar="NAME"),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Only what this model runs, on any number of ranks: a preset, or a path to a config.json.",
            metavar="MODEL",
        ),
    ] = None,
    winners_only: Annotated[
        bool, typer.Option("--winners-only", help="Winners and their baselines, without the trials behind them.")
    ] = False,
    overwrite: OverwriteOption = False,
    database: DatabaseOption = None,
    json: JsonOption = False,
) -> None:
    """Write measurements to a file.

    Another machine takes them over with `autofuse import`, or runs exactly these with the option `autofuse.plan`. The
    same content gives the same bytes. What was imported and neither measured here nor trusted stays here.

    Example: autofuse export h200.jsonl --gpu H200 --winners-only
    """
    name, problems = checked_op(op), None if model is None else _problems(model)
    with TunedDatabase(database, read_only=True) as opened:
        chosen = [each or known for each in choose_targets(opened, target) for known in opened.targets()]
        targets = [each for each in dict.fromkeys(chosen) if gpu is None or _is_gpu(each, gpu)]
        if gpu is not None and not targets:
            listed = ", ".join(repr(each.device_name) for each in opened.targets()) or "nothing yet"
            raise BadInput(f"no device in {opened.path} has {gpu!r} in its name; it holds {listed}")
        summary = export_database(
            opened,
            path,
            op=name,
            targets=targets,
            problems=problems,
            winners_only=winners_only,
            overwrite=overwrite,
        )
    if json:
        print_json({"path": summary.path, "rows": summary.counts})
    else:
        typer.echo(f"Wrote {summary.path}: {_listed(summary.counts)}")


def import_(
    path: Annotated[str, typer.Argument(help="A file that `autofuse export` wrote, or its URL.", metavar="PATH|URL")],
    trust: Annotated[
        bool, typer.Option("--trust", help="Let it decide as if it had been measured here, until it is.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would come, win and conflict; do nothing.")
    ] = False,
    database: DatabaseOption = None,
    json: JsonOption = False,
) -> None:
    """Take over measurements from a file.

    What comes is a candidate: `autofuse tune` tries its configs first, but no graph uses it. With --trust it is used,
    until it is measured here. What was measured here stays, unless that was with another version of the kernel.

    Example: autofuse import h200.jsonl --dry-run
    """
    where = database or default_path()
    summary = (preview_import if dry_run else import_into)(where, path, trust=trust)
    if json:
        conflicts = [{"stays": each.stays, "here": each.here, "there": each.there} for each in summary.conflicts]
        facts = {"new": summary.new, "kept": summary.kept, "replaced": summary.replaced, "left_out": summary.left_out}
        print_json({"database": where, "dry_run": dry_run, **facts, "wins": summary.wins, "conflicts": conflicts})
        return
    typer.echo(f"{'Would import' if dry_run else 'Imported'} {path} into {where}")
    _print_import(summary, trust)


def merge(
    files: Annotated[list[Path], typer.Argument(help="Exports, or databases.", metavar="A B…")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write: .jsonl gives JSON lines, anything else SQLite.")
    ],
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Make one file of several.

    Of two winners of one bucket stays the one of the kernel as it is here; then one that a trial in these files says
    was verified; then one that says where it was measured; then the later one. The lower time never decides, nor does
    the order of the files: the same content gives the same bytes. A config that one of them found wrong does not win.

    Example: autofuse merge h200-a.jsonl h200-b.jsonl -o h200.jsonl
    """
    summary, settled = merge_exports(files, output, overwrite=overwrite)
    if json:
        print_json({"path": summary.path, "rows": summary.counts, "dropped": settled})
        return
    typer.echo(f"Wrote {summary.path}: {_listed(summary.counts)}")
    if settled:
        typer.echo("Winners that are not in it:")
    for each in settled:
        dropped, kept = each.dropped, "none" if each.kept is None else _named(each.kept)
        typer.echo(f"  {dropped.problem} at T={dropped.tokens} on {dropped.target}: {_named(dropped)}: {each.why}")
        typer.echo(f"    in its place: {kept}")


def _compared(mine: Winner, other: Winner) -> list[object]:
    times = [microseconds(mine.time_us), microseconds(other.time_us)]
    same = "the same" if mine.config == other.config else other.config
    return [mine.target, mine.problem, mine.tokens, *times, gain(mine), gain(other), mine.config, same]


def _print_import(summary: ImportSummary, trust: bool) -> None:
    words = (("new", summary.new), ("replaced", summary.replaced), ("kept as they are here", summary.kept))
    for word, counts in words:
        if any(counts.values()):
            typer.echo(f"  {word}: {_listed(counts)}")
    for why, count in summary.left_out.items():
        typer.echo(f"  left out: {count} rows: {why}")
    if summary.conflicts:
        columns = ["target", "problem", ">T", ">here µs", ">there µs", ">here gain", ">there gain", "here", "there"]
        rows = [[*_compared(each.here, each.there), each.stays] for each in summary.conflicts]
        print_table("Conflicts", [*columns, "stays"], rows)
    if summary.wins:
        list_winners("Trusted until measured here", summary.wins)
    elif not trust and (summary.new["winners"] or summary.replaced["winners"]):
        typer.echo("These are candidates: `autofuse tune` measures them first; --trust uses them as they are.")


def _named(winner: Winner) -> str:
    return f"{winner.config} ({microseconds(winner.time_us)} µs, measured {winner.measured_at})"


def _is_gpu(target: Target, name: str) -> bool:
    return name.lower() in target.device_name.lower()


def _problems(model: str) -> set[Problem]:
    """What one rank of a model runs, by whatever number of ranks its heads are shared among. Raises BadInput."""
    config = checked_config(model_config(model), model)
    shared = [config]
    for tp in range(2, _MOST_RANKS + 1):
        with suppress(BadInput):  # so many ranks cannot share the heads equally
            shared.append(per_rank(config, tp, model))
    return {
        problem
        for op in OPS.values()
        for dtype in DTYPES
        for each in shared
        for problem in op.model_problems(each, dtype)
    }


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {table}" for table, count in counts.items() if count) or "nothing"
