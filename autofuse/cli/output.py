"""How commands write: tables and text to standard output, JSON that a program can read, progress to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autofuse.cache_db import Rival, TunedDatabase, Winner
from autofuse.ops import Config, Problem
from autofuse.ops.languages import language_of
from autofuse.targets import Target

__all__ = [
    "baselines_us",
    "console",
    "gain",
    "list_winners",
    "microseconds",
    "plain",
    "print_json",
    "print_table",
    "print_winners",
]

_WIDE = 240  # columns of a table that goes into a file or a pipe


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; wide, and without colours, where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _WIDE, highlight=False)


def print_json(value: Any) -> None:
    """Prints ``value`` as JSON, escaped where the output is not Unicode: nothing is lost to another encoding."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    typer.echo(json.dumps(plain(value), indent=2, ensure_ascii=not unicode))


def plain(value: Any) -> Any:
    """``value`` as JSON has it: problems, configs and targets in canonical form, infinite numbers as text."""
    if isinstance(value, (Problem, Config, Target)):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; columns whose name begins with ``>`` are set to the right."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("–" if cell is None else str(cell)) for cell in row))
    console().print(table)


def microseconds(time_us: float | None) -> str:
    """Three significant digits."""
    if time_us is None:
        return "–"
    return f"{time_us:.2f}" if time_us < 10 else f"{time_us:.1f}" if time_us < 100 else f"{time_us:.0f}"


def gain(winner: Winner) -> str:
    """``1.93× [1.90, 1.96]``: the median and its 95 % interval."""
    return f"{winner.gain:.2f}× [{winner.gain_low:.2f}, {winner.gain_high:.2f}]"


def baselines_us(database: TunedDatabase, winners: Iterable[Winner]) -> dict[Winner, dict[str, float]]:
    """Kind of baseline → median time, for each winner's bucket."""
    known = {w: database.baselines(w.target, w.problem, w.tokens) for w in winners}
    return {w: {kind: baseline.time_us for kind, baseline in found.items()} for w, found in known.items()}


def list_winners(title: str, winners: Sequence[Winner]) -> None:
    """One table of winners of whatever targets and problems; nothing where there are none."""
    if winners:
        columns = ["target", "problem", ">T", ">µs", ">gain [95 %]", "config"]
        rows = [[w.target, w.problem, w.tokens, microseconds(w.time_us), gain(w), w.config] for w in winners]
        print_table(title, columns, rows)


def print_winners(
    winners: Sequence[Winner],
    baselines: Mapping[Winner, Mapping[str, float]],
    states: Mapping[Winner, str] | None = None,
    rivals: Mapping[Winner, Rival | None] | None = None,
) -> None:
    """One table for each target and problem.

    Args:
        baselines: kind → µs, for each winner.
        states: a word for each winner, where it has one.
        rivals: the best in another language than the winner's, where anything was measured in one.
    """
    groups: dict[tuple[Target, Problem], list[Winner]] = {}
    for winner in winners:
        groups.setdefault((winner.target, winner.problem), []).append(winner)
    for (target, problem), group in groups.items():
        kinds = list(dict.fromkeys(kind for winner in group for kind in baselines.get(winner, {})))
        columns = [">T", ">fused µs", *(f">{kind} µs" for kind in kinds), ">gain [95 %]", "over", "config"]
        rows = []
        for winner in group:
            known = baselines.get(winner, {})
            row = [winner.tokens, microseconds(winner.time_us), *(microseconds(known.get(kind)) for kind in kinds)]
            row += [gain(winner), winner.baseline + ("" if winner.beats_baseline else " (not beaten)"), winner.config]
            rival = (rivals or {}).get(winner)
            language = f"{language_of(winner.config)}, {rival}" if rival else ""
            rows.append([*row, language, (states or {}).get(winner, "")])
        columns += ["language", "state"]
        shown = [place for place in range(len(columns)) if place < len(columns) - 2 or any(row[place] for row in rows)]
        print_table(
            f"{problem} on {target}",
            [columns[place] for place in shown],
            [[row[place] for place in shown] for row in rows],
        )
