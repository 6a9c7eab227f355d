"""``autofuse tune --dry-run``: what would be done, and how long it would take."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer

from autofuse.cache_db import TunedDatabase
from autofuse.cache_db.faults import AbsentDatabaseError
from autofuse.cli.output import print_json, print_table
from autofuse.targets import target_of

if TYPE_CHECKING:
    from autofuse.tuner.budgets import Effort
    from autofuse.tuner.forecast import Outlook
    from autofuse.tuner.queue import Bucket

__all__ = ["duration", "print_forecast", "read_or_blank"]


@contextmanager
def read_or_blank(path: Path | None) -> Iterator[TunedDatabase]:
    """The database as it is, for reading only; one without rows where there is none. Makes nothing at ``path``."""
    try:
        known = TunedDatabase(path, read_only=True)
    except AbsentDatabaseError:
        with (
            tempfile.TemporaryDirectory() as folder,
            TunedDatabase(Path(folder) / "none.db") as blank,
        ):
            yield blank
        return
    with known:
        yield known


def print_forecast(
    buckets: Sequence[Bucket],
    devices: Sequence[torch.device],
    database: TunedDatabase,
    effort: Effort,
    *,
    retune: bool,
    budget_s: float | None,
    json: bool,
) -> None:
    """Prints what tuning on these devices, of one target, would do."""
    from autofuse.tuner.forecast import forecast

    target = target_of(devices[0])
    found = forecast(buckets, devices, database, effort, retune=retune, budget_s=budget_s)
    if json:
        print_json(
            {
                "target": target,
                "devices": [str(device) for device in devices],
                "buckets": [{**_plain(outlook), **_plain(outlook.bucket)} for outlook in found.outlooks],
                "seconds": found.seconds,
                "basis": found.basis,
            }
        )
        return
    rows = [
        [o.bucket.problem, o.bucket.tokens, o.state, o.known, o.trials, duration(o.seconds) if o.seconds else None]
        for o in found.outlooks
    ]
    title = f"To tune on {target} ({', '.join(map(str, devices))})"
    print_table(title, ["problem", ">T", "state", ">known", ">to measure", ">time"], rows)
    left = [outlook for outlook in found.outlooks if outlook.state != "tuned"]
    typer.echo(
        f"{len(left)} of {len(rows)} buckets to tune, up to {sum(o.trials for o in left)} configs: "
        f"about {duration(found.seconds)}, {found.basis}"
    )


def _plain(record: Outlook | Bucket) -> dict[str, object]:
    return {each.name: getattr(record, each.name) for each in fields(record) if each.name != "bucket"}


def duration(seconds: float) -> str:
    """Two units at most.

    Example:
        >>> duration(7.4), duration(312), duration(7300)
        ('7 s', '5 min 12 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
