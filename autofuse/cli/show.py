"""``autofuse show``: what was measured."""

from __future__ import annotations

from typing import Annotated

import typer

from autofuse.cache_db import Trial, TunedDatabase, Winner, rival_of
from autofuse.cli.marks import Marks
from autofuse.cli.options import DatabaseOption, JsonOption, OpOption, TargetOption, checked_op, choose_targets
from autofuse.cli.output import baselines_us, microseconds, plain, print_json, print_table, print_winners
from autofuse.errors import BadInput
from autofuse.ops.languages import language_of

__all__ = ["show"]


def show(
    op: OpOption = None,
    target: TargetOption = None,
    trials: Annotated[bool, typer.Option("--trials", help="Every config that was measured.")] = False,
    failures: Annotated[bool, typer.Option("--failures", help="The configs that failed, and why.")] = False,
    database: DatabaseOption = None,
    json: JsonOption = False,
) -> None:
    """Show what was measured.

    The winners with their times, baselines, gain with its 95 % interval, and config; or the trials behind them. A
    winner is marked where it is stale (its kernel changed), suspect (the driver, toolkit or compiler did), or was
    imported and not measured here. Where a kernel was measured in several languages, it says which one won, and by
    how much over the best trial in the other.

    Example: autofuse show --op mla_dual_rms_norm --target sm_90a
    """
    if trials and failures:
        raise BadInput("--trials lists the failures as well: give one of --trials and --failures")
    name = checked_op(op)
    with TunedDatabase(database, read_only=True) as opened:
        targets = choose_targets(opened, target)
        if trials:
            measured = [t for each in targets for t in opened.every(Trial, each, name, candidates=True)]
            _show_trials(measured, json)
        elif failures:
            _show_trials([trial for each in targets for trial in opened.failures(each, name)], json)
        else:
            winners = [w for each in targets for w in opened.every(Winner, each, name, candidates=True)]
            _show_winners(opened, winners, json)


def _show_winners(database: TunedDatabase, winners: list[Winner], json: bool) -> None:
    baselines = baselines_us(database, winners)
    marks = Marks(database)
    states = {winner: marks.of(winner) for winner in winners}
    rivals = {winner: rival_of(database, winner) for winner in winners}
    if json:
        print_json(
            [
                {
                    **plain(winner),
                    "beats_baseline": winner.beats_baseline,
                    "state": states[winner] or "fresh",
                    "baselines_us": baselines[winner],
                    "language": language_of(winner.config),
                    "other_language": rivals[winner],
                }
                for winner in winners
            ]
        )
    elif winners:
        print_winners(winners, baselines, states, rivals)
    else:
        typer.echo(f"No winners in {database.path}; `autofuse tune` makes them.")


def _show_trials(trials: list[Trial], json: bool) -> None:
    if json:
        print_json(trials)
        return
    if not trials:
        typer.echo("None.")
        return
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(f"{trial.problem} on {trial.target}", []).append(trial)
    columns = [">T", "status", ">µs", ">±", ">error", ">registers", ">spilled", ">shared", "config", "message"]
    for title, group in groups.items():
        group.sort(key=lambda trial: (trial.tokens, trial.time_us is None, trial.time_us or 0.0, str(trial.config)))
        print_table(
            title,
            columns,
            [
                [
                    trial.tokens,
                    trial.status + (", imported" if trial.standing == "candidate" else ""),
                    microseconds(trial.time_us),
                    microseconds(trial.spread_us),
                    None if trial.error is None else f"{trial.error:.2f}",
                    trial.registers,
                    trial.spill_bytes,
                    trial.shared_bytes,
                    trial.config,
                    trial.message,
                ]
                for trial in group
            ],
        )
