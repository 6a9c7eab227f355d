"""``autofuse tune``: measure, and remember."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Optional

import torch
import typer

from autofuse.cache_db import Captured, TunedDatabase, Winner
from autofuse.cli.options import DatabaseOption, DeviceOption, DtypeOption, JsonOption, OpsOption, SeedOption
from autofuse.cli.output import print_json, print_winners
from autofuse.errors import AutofuseError, BadInput
from autofuse.ops import get_op
from autofuse.targets import parse_device, target_of

if TYPE_CHECKING:
    from autofuse.tuner.job import Bucket, BucketDone

__all__ = ["tune"]

logger = logging.getLogger("autofuse.cli")

_INTERRUPTED = 130  # as a shell reports a command that Ctrl-C ended
_TERMINATED = 143  # or SIGTERM


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


def tune(
    op: OpsOption = None,
    model: Annotated[
        Optional[str],  # noqa: UP045 (typer reads it at run time)
        typer.Option(help="A preset such as deepseek-v3, or a path to a config.json; all presets if left out."),
    ] = None,
    tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Token counts to tune for, e.g. 1,64,2048 [default: 1,64,1024,8192]."),
    ] = None,
    dtype: DtypeOption = "bf16",
    device: DeviceOption = "auto",
    effort: Annotated[str, typer.Option(help="quick, default or exhaustive.")] = "default",
    retune: Annotated[bool, typer.Option("--retune", help="Measure again what is known.")] = False,
    captured: Annotated[
        bool, typer.Option("--captured", help="Tune what torch.compile found untuned, and forget it once it is tuned.")
    ] = False,
    problem: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="An exact problem, as `autofuse show` prints it; may be repeated."),
    ] = None,
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Seconds after which nothing new is begun; the same command goes on from there.", min=0.0),
    ] = None,
    database: DatabaseOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Measure fused ops, and remember.

    Searches configs, verifies each, times the best beside the unfused code, eager and compiled. What was measured
    before is not measured again. Ctrl-C and SIGTERM keep everything measured so far.

    Example: autofuse tune --model deepseek-v3 --tokens 1,64,2048
    """
    if sum((model is not None, captured, bool(problem))) > 1:
        raise BadInput("--model, --problem and --captured name different things to tune: give one of them")
    if captured and tokens is not None:
        raise BadInput("--captured brings its own token counts: leave --tokens out")
    ops = [get_op(name).name for name in op] if op else None

    from autofuse.tuner import api, budgets

    counts = api.DEFAULT_TOKENS if tokens is None else api.parse_tokens(tokens)
    effort_budget = budgets.effort(effort)
    where = parse_device(device)
    buckets: Sequence[Bucket] = ()
    if problem:
        buckets = api.problem_buckets(problem, counts)
        if ops and any(bucket.problem.op not in ops for bucket in buckets):
            raise BadInput(f"--problem {' '.join(problem)} is not of --op {' '.join(ops)}")
    elif not captured:
        buckets = api.model_buckets(model, counts, dtype, ops)

    from autofuse.cli.progress import progress
    from autofuse.tuner.job import BucketDone, Event, tune_buckets

    done: list[BucketDone] = []
    with TunedDatabase(database) as opened:
        sites = _captured(opened, where, ops) if captured else {}
        if captured:
            buckets = list(dict.fromkeys(bucket for each in sites.values() for bucket in each))
        if not buckets:
            _say_nothing_to_do(opened, json)
            return
        with progress(len(buckets), effort_budget) as show:

            def observe(event: Event) -> None:
                if isinstance(event, BucketDone):
                    done.append(event)
                show(event)

            handler: Callable[[Event], None] = api.forget_when_tuned(opened, sites, observe)
            try:
                with _terminable():
                    tune_buckets(
                        buckets,
                        where,
                        opened,
                        effort_budget,
                        retune=retune,
                        seed=seed,
                        budget_s=budget,
                        on_event=handler,
                    )
            except KeyboardInterrupt as stopped:
                show(None)
                typer.echo(
                    f"autofuse: stopped; everything measured so far is kept in {opened.path}; "
                    f"the same command{' without --retune' if retune else ''} goes on from there",
                    err=True,
                )
                raise typer.Exit(_TERMINATED if isinstance(stopped, _Terminated) else _INTERRUPTED) from None
        if left := len(buckets) - len(done):
            typer.echo(
                f"autofuse: the {budget:g} s are over: {left} of {len(buckets)} buckets are not tuned; "
                "the same command goes on from there",
                err=True,
            )
        _report(opened, done, json)
    if any(event.winner is None for event in done):
        raise typer.Exit(1)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends this block as Ctrl-C does: in good order."""

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # only there signals are handled
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _captured(database: TunedDatabase, device: torch.device, ops: Sequence[str] | None) -> dict[Captured, list[Bucket]]:
    """The captured sites of this device's target, and what each needs."""
    from autofuse.tuner.api import captured_buckets

    sites = {}
    for site in database.captured(target_of(device)):
        if ops and site.problem.op not in ops:
            continue
        try:
            sites[site] = captured_buckets(site)
        except AutofuseError as error:  # of another version of autofuse; it must not keep the others from being tuned
            logger.warning("a captured site is passed over: %s", error)
    return sites


def _say_nothing_to_do(database: TunedDatabase, json: bool) -> None:
    if json:
        print_json({"database": str(database.path), "buckets": []})
        return
    others = sorted({str(site.target) for site in database.captured()})
    typer.echo(
        f"No captured site is left to tune on this device in {database.path}."
        + (f" There are some of: {', '.join(others)}" if others else "")
    )


def _report(database: TunedDatabase, done: Sequence[BucketDone], json: bool) -> None:
    winners = {event.bucket: event.winner for event in done if event.winner is not None}
    baselines = {
        winner: {
            kind: baseline.time_us
            for kind, baseline in database.baselines(winner.target, winner.problem, winner.tokens).items()
        }
        for winner in winners.values()
    }
    if json:
        buckets = [
            {
                "problem": event.bucket.problem,
                "tokens": event.bucket.tokens,
                "measured": event.measured,
                "winner": event.winner,
                "baselines_us": baselines.get(event.winner, {}) if event.winner else {},
                "beats_baseline": event.winner.beats_baseline if event.winner else None,
            }
            for event in done
        ]
        print_json({"database": str(database.path), "buckets": buckets})
        return
    states: dict[Winner, str] = {
        event.winner: "" if event.measured else "tuned already" for event in done if event.winner is not None
    }
    print_winners(list(winners.values()), baselines, states)
    for event in done:
        if event.winner is None:
            name = f"{event.bucket.problem} at T={event.bucket.tokens}"
            typer.echo(f"{name}: no config works; `autofuse show --failures` says why")
    if not done:
        typer.echo(f"Nothing was tuned; the database is {database.path}")
        return
    known = sum(not event.measured for event in done)
    typer.echo(
        ("Everything was tuned already" if known == len(done) else f"{known} of {len(done)} buckets were tuned already")
        + f"; the database is {database.path}"
    )
