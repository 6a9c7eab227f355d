"""The options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from autofuse.cache_db import TunedDatabase
from autofuse.errors import BadInput
from autofuse.ops import get_op
from autofuse.ops.problem import shortened
from autofuse.targets import Target

__all__ = ["DatabaseOption", "DeviceOption", "DtypeOption", "JsonOption", "OpOption", "OpsOption", "SeedOption"]
__all__ += ["TargetOption", "checked_op", "choose_targets", "parse_duration"]

DatabaseOption = Annotated[
    Optional[Path],  # noqa: UP045 (typer reads it at run time)
    typer.Option(
        "--database", help="The database; else $AUTOFUSE_DB, else the one in the cache folder.", metavar="PATH"
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto (the GPU if there is one), cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="bf16, fp16 or fp32.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]
OpOption = Annotated[Optional[str], typer.Option("--op", help="Only this op.", metavar="OP")]  # noqa: UP045
OpsOption = Annotated[Optional[list[str]], typer.Option("--op", help="Only this op; may be repeated.", metavar="OP")]  # noqa: UP045
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the search.", min=0, max=2**32 - 1)]
TargetOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--target", help="Only this target: a kind (cuda), an arch (sm_90a), or its whole name.", metavar="TARGET"
    ),
]

_DURATION = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,9}(?:\.\d*)?)s?)?", re.ASCII)


def checked_op(name: str | None) -> str | None:
    """``name``, if there is such an op. Raises BadInput."""
    return None if name is None else get_op(name).name


def parse_duration(text: str, option: str) -> float:
    """Seconds: ``300``, ``90s``, ``5m``, ``1h30m``. Raises BadInput, which names ``option``.

    Example:
        >>> parse_duration("300", "--budget"), parse_duration("1h30m", "--budget")
        (300.0, 5400.0)
    """
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise BadInput(f"{option} {shortened(text)} is no duration: give one such as 300, 90s, 5m or 1h30m")
    hours, minutes, seconds = (float(each or 0) for each in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def choose_targets(database: TunedDatabase, text: str | None) -> Sequence[Target | None]:
    """The targets of ``database`` that ``text`` names; ``[None]``, any, without it. Raises BadInput."""
    if text is None:
        return [None]
    known = database.targets()
    chosen = [target for target in known if text in (target.kind, target.arch, target.device_name, str(target))]
    if not chosen:
        listed = ", ".join(repr(str(target)) for target in known) or "no target yet"
        raise BadInput(f"target {text!r} is not in database {database.path}; it holds {listed}")
    return chosen
