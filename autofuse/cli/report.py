"""``autofuse report``: the database as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from autofuse.cache_db import TunedDatabase
from autofuse.cli.marks import Marks
from autofuse.cli.options import DatabaseOption, JsonOption
from autofuse.cli.output import print_json
from autofuse.report_page import gather, html_page, load_peers

__all__ = ["report"]


def report(
    path: Annotated[Path, typer.Argument(help="The page to write; one that exists is replaced.")],
    peers: Annotated[
        Optional[list[Path]],  # noqa: UP045 (typer reads it at run time)
        typer.Option(
            help="A file of other libraries' times, as benchmarks/h200/peers.json; may be repeated.", metavar="PATH"
        ),
    ] = None,
    database: DatabaseOption = None,
    json: JsonOption = False,
) -> None:
    """Write what was measured as one HTML page.

    Coverage by GPU, op and T; times beside the unfused code's, other libraries' and the speed of light; what each
    tunable is worth; failures; winners of before. The page needs nothing but itself, and no JavaScript.

    Example: autofuse report tuned.html
    """
    recorded = [load_peers(each) for each in peers or []]
    with TunedDatabase(database, read_only=True) as opened:
        content = gather(opened, Marks(opened).of, recorded)
    path.write_text(html_page(content), encoding="utf-8")
    buckets = sum(len(curve.buckets) for curve in content.curves)
    if json:
        facts = {"problems": len(content.curves), "buckets": buckets, "failures": len(content.failures)}
        print_json({"path": path, **facts, "history": len(content.history)})
    else:
        typer.echo(f"Wrote {path}: {buckets} buckets of {len(content.curves)} problems")
