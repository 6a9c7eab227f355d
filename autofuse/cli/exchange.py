"""``autofuse export`` and ``autofuse import``: carry measurements between machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autofuse.cache_db import TunedDatabase, export_database, import_into
from autofuse.cli.options import DatabaseOption, JsonOption, OpOption, TargetOption, checked_op, choose_targets
from autofuse.cli.output import print_json
from autofuse.errors import BadInput

__all__ = ["export", "import_"]


def export(
    path: Annotated[Path, typer.Argument(help="The file to write: .jsonl gives JSON lines, anything else SQLite.")],
    op: OpOption = None,
    target: TargetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    database: DatabaseOption = None,
    json: JsonOption = False,
) -> None:
    """Write measurements to a file.

    Another machine takes them over with `autofuse import`.

    Example: autofuse export h200.jsonl --target sm_90a
    """
    with TunedDatabase(database, read_only=True) as opened:
        targets = choose_targets(opened, target)
        if len(targets) > 1:
            listed = ", ".join(repr(str(each)) for each in targets)
            raise BadInput(f"target {target!r} is more than one: give one of {listed}")
        summary = export_database(opened, path, op=checked_op(op), target=targets[0], overwrite=overwrite)
    if json:
        print_json({"path": summary.path, "rows": summary.counts})
    else:
        typer.echo(f"Wrote {summary.path}: {_listed(dict(summary.counts))}")


def import_(
    path: Annotated[Path, typer.Argument(help="A file that `autofuse export` wrote.")],
    database: DatabaseOption = None,
    json: JsonOption = False,
) -> None:
    """Take over measurements from a file.

    Of two measurements of the same thing the later one stays.

    Example: autofuse import h200.jsonl
    """
    if not path.is_file():  # before a database is made for it
        raise BadInput(f"cannot import {path}: there is no such file; name one that `autofuse export` wrote")
    with TunedDatabase(database) as opened:
        summary = import_into(opened, path)
    if json:
        print_json({"database": opened.path, "new": summary.new, "kept": summary.kept, "replaced": summary.replaced})
        return
    typer.echo(f"Imported {path} into {opened.path}")
    for word, counts in (("new", summary.new), ("replaced by later ones", summary.replaced), ("kept", summary.kept)):
        if any(counts.values()):
            typer.echo(f"  {word}: {_listed(dict(counts))}")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {table}" for table, count in counts.items() if count) or "nothing"
