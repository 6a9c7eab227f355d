"""``autofuse diff``: in what two files of measurements differ, and how far two tunings agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from autofuse.cache_db import CLOSE, Pair, agreement, compare, read_export
from autofuse.cli.options import JsonOption
from autofuse.cli.output import gain, list_winners, microseconds, print_json, print_table
from autofuse.ops import Problem
from autofuse.targets import Target

__all__ = ["diff"]


def diff(
    here: Annotated[Path, typer.Argument(help="A database or an export.", metavar="A")],
    there: Annotated[Path, typer.Argument(help="Another one.", metavar="B")],
    json: JsonOption = False,
) -> None:
    """Show in what two files of measurements differ, and how far two tunings agree.

    Lists the buckets for which only one has a winner, and those whose winners differ: the ratio of their times, and
    whether it is within the noise that both rows state; the ratio of the two configs by what one and the same file
    measured of both, which another session's clocks do not shift; and whether both are fused. The last lines sum up.
    Exit code 1 if anything differs.

    Example: autofuse diff monday.db friday.db
    """
    found = compare(read_export(here), read_export(there))
    if json:
        names = ("only_a", "only_b", "differ")
        rows = {table: dict(zip(names, counts, strict=True)) for table, counts in found.rows.items()}
        facts = {"only_a": found.only_here, "only_b": found.only_there, "rows": rows}
        print_json({**facts, "changed": [_facts(pair) for pair in found.changed], "agreement": _summed(found.both)})
    else:
        list_winners(f"Only in {here}", found.only_here)
        list_winners(f"Only in {there}", found.only_there)
        _print_pairs(found.changed)
        for table, (only_a, only_b, differ) in found.rows.items():
            if only_a or only_b or differ:
                typer.echo(f"{table}: {only_a} only in A, {only_b} only in B, {differ} differ")
        if found.empty:
            typer.echo(f"{here} and {there} hold the same.")
        else:
            typer.echo("".join(f"{line}\n" for line in _sum_lines(found.both)), nl=False)
    if not found.empty:
        raise typer.Exit(1)


def _print_pairs(pairs: Sequence[Pair]) -> None:
    """A table for each target and problem."""
    groups: dict[tuple[Target, Problem], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.a.target, pair.a.problem), []).append(pair)
    columns = [">T", ">A µs", ">B µs", ">B ÷ A", "", ">A gain", ">B gain", "fused", "configs, B ÷ A", "A", "B"]
    for (target, problem), group in groups.items():
        rows = []
        for pair in group:
            a, b = pair.a, pair.b
            row: list[object] = [a.tokens, microseconds(a.time_us), microseconds(b.time_us), f"{pair.ratio:.3f}"]
            row += [_noise(pair), gain(a), gain(b), _fused(pair)]
            rows.append([*row, _configs(pair), a.config, "the same" if a.config == b.config else b.config])
        print_table(f"Different winners: {problem} on {target}", columns, rows)


def _noise(pair: Pair) -> str:
    if not pair.timed_alike:
        return "timed otherwise"
    return "within noise" if pair.within_noise else "beyond noise"


def _fused(pair: Pair) -> str:
    words = {(True, True): "both", (False, False): "neither", (True, False): "only A", (False, True): "only B"}
    against = ", against the other's interval" if pair.contradicts else ""
    return words[pair.a.beats_baseline, pair.b.beats_baseline] + against


def _configs(pair: Pair) -> str:
    if pair.same_config:
        return "the same"
    ratios = [f"{ratio:.3f} in {name}" for name, ratio in (("A", pair.in_a), ("B", pair.in_b)) if ratio is not None]
    return ", ".join([*ratios, *pair.failed]) or "not compared"


def _sum_lines(both: Sequence[Pair]) -> list[str]:
    """How far the winners agree, in a few lines; none without a bucket that both have."""
    found = agreement(both)
    if not found.buckets:
        return []
    lines, close = [], f"within {CLOSE:.0%}"
    if apart := found.buckets - found.timed_alike:
        lines.append(f"Timed in different ways: {apart} of {found.buckets} buckets, whose times cannot be compared")
    if found.worst_time:
        worst = _worst(found.worst_time, found.worst_time.ratio)
        lines.append(f"Times: {close} of each other in {found.close_times} of {found.timed_alike} buckets; {worst}")
    configs = f"Configs: the same in {found.same_configs}"
    if found.worst_config and found.worst_config.config_ratio:
        worst = _worst(found.worst_config, found.worst_config.config_ratio)
        configs += f"; {close} by one file's measurements in {found.close_configs} of {found.compared}; {worst}"
    left = found.buckets - found.same_configs - found.compared
    lines.append(configs + (f"; {left} that no file measured both of" if left else ""))
    lines += [f"  {_bucket(pair)}: {', '.join(pair.failed)}" for pair in found.failed]
    agreed = found.buckets - len(found.disagree)
    lines.append(f"Fused or not: {agreed} of {found.buckets} agree")
    lines += [f"  {_bucket(pair)}: {_fused(pair)}: {gain(pair.a)}, {gain(pair.b)}" for pair in found.disagree]
    return lines


def _worst(pair: Pair, ratio: float) -> str:
    return f"at worst B ÷ A is {ratio:.3f} ({_bucket(pair)})"


def _bucket(pair: Pair) -> str:
    return f"{pair.a.problem} at T={pair.a.tokens} on {pair.a.target}"


def _facts(pair: Pair) -> dict[str, object]:
    return {
        "a": pair.a,
        "b": pair.b,
        "ratio": pair.ratio,
        "timed_alike": pair.timed_alike,
        "within_noise": pair.within_noise,
        "same_config": pair.same_config,
        "config_ratio": pair.config_ratio,
        "config_ratio_in_a": pair.in_a,
        "config_ratio_in_b": pair.in_b,
        "failed": pair.failed,
        "same_choice": pair.same_choice,
        "contradicts": pair.contradicts,
    }


def _summed(both: Sequence[Pair]) -> dict[str, object]:
    def told(value: object) -> object:
        if isinstance(value, tuple):
            return list(map(told, value))
        return _facts(value) if isinstance(value, Pair) else value

    found = agreement(both)
    return {"close": CLOSE, **{field.name: told(getattr(found, field.name)) for field in fields(found)}}
