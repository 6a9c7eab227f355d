"""``autofuse tune``: measure, and remember."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import torch
import typer

from autofuse.cache_db import Captured, TunedDatabase, Winner, rival_of
from autofuse.cli.forecast import print_forecast, read_or_blank
from autofuse.cli.options import DatabaseOption, DtypeOption, JsonOption, OpsOption, SeedOption, parse_duration
from autofuse.cli.output import baselines_us, print_json, print_winners
from autofuse.cli.watch import watch as watch_captured
from autofuse.errors import AutofuseError, BadInput, TargetUnavailable
from autofuse.ops import get_op
from autofuse.targets import target_of

if TYPE_CHECKING:
    from autofuse.tuner.budgets import Effort
    from autofuse.tuner.job import BucketDone
    from autofuse.tuner.queue import Bucket

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
    tp: Annotated[int, typer.Option(help="Ranks of tensor parallelism, which share the model's heads.")] = 1,
    tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Token counts to tune for, e.g. 1,64,2048 [default: 1,64,1024,8192]."),
    ] = None,
    dtype: DtypeOption = "bf16",
    device: Annotated[
        str,
        typer.Option(help="auto (the GPU if there is one), cpu, cuda, cuda:N, several such as cuda:0,cuda:1, or all."),
    ] = "auto",
    effort: Annotated[str, typer.Option(help="quick, default or exhaustive.")] = "default",
    trials: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Configs to measure for each problem and T at most, in place of the effort's.", min=1),
    ] = None,
    retune: Annotated[bool, typer.Option("--retune", help="Measure again what is known.")] = False,
    captured: Annotated[
        bool, typer.Option("--captured", help="Tune what torch.compile found untuned, and forget it once it is tuned.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="As --captured, again and again while the device is idle: for a service.")
    ] = False,
    duty: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="With --watch: the share of the time that may be spent tuning [default: 0.25]."),
    ] = None,
    problem: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="An exact problem, as `autofuse show` prints it; may be repeated."),
    ] = None,
    budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Time, such as 90s or 5m, after which nothing new is begun; the same command goes on."),
    ] = None,
    exclusive: Annotated[
        bool, typer.Option("--exclusive", help="Refuse to tune where the device is busy, in place of waiting.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be measured, and how long it would take.")
    ] = False,
    database: DatabaseOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Measure fused ops, and remember.

    Searches configs, verifies each, times the best beside the unfused code, eager and compiled. What was measured
    before is not measured again. Ctrl-C and SIGTERM keep everything measured so far.

    Example: autofuse tune --model deepseek-v3 --tp 8 --tokens 1,64,2048
    """
    if sum((model is not None, captured or watch, bool(problem))) > 1:
        raise BadInput("--model, --problem and --captured name different things to tune: give one of them")
    if (captured or watch) and tokens is not None:
        raise BadInput("--captured brings its own token counts: leave --tokens out")
    if tp != 1 and (captured or watch or problem):
        raise BadInput("--tp is for models: exact problems and captured sites are a rank's already")
    if watch and (retune or dry_run or json or exclusive or budget is not None):
        raise BadInput(
            "--watch runs until it is stopped, whenever the device is idle: only --duty, --op, --effort, "
            "--trials, --seed, --device and --database go with it"
        )
    if duty is not None and not (watch and 0 < duty <= 1):
        raise BadInput(f"--duty {duty:g} is a share above 0 and up to 1, and goes with --watch")
    ops = [get_op(name).name for name in op] if op else None
    budget_s = None if budget is None else parse_duration(budget, "--budget")

    from autofuse.tuner import api, budgets
    from autofuse.tuner.devices import parse_devices

    counts = api.DEFAULT_TOKENS if tokens is None else api.parse_tokens(tokens)
    effort_budget = budgets.effort(effort)
    if trials is not None:
        most = min(trials, effort_budget.exhaustive_up_to)
        effort_budget = replace(effort_budget, trials=trials, exhaustive_up_to=most)
    devices = parse_devices(device)
    if watch:
        _watch(database, devices, ops, effort_budget, seed, budgets.WATCH_DUTY if duty is None else duty)
        return
    buckets: Sequence[Bucket] = ()
    if problem:
        buckets = api.problem_buckets(problem, counts)
        if ops and any(bucket.problem.op not in ops for bucket in buckets):
            raise BadInput(f"--problem {' '.join(problem)} is not of --op {' '.join(ops)}")
    elif not captured:
        buckets = api.model_buckets(model, counts, dtype, ops, tp)
    with read_or_blank(database) if dry_run else TunedDatabase(database) as opened:
        sites = _captured(opened, devices[0], ops) if captured else {}
        if captured:
            buckets = list(dict.fromkeys(bucket for each in sites.values() for bucket in each))
        if not buckets:
            _say_nothing_to_do(opened, json)
            return
        if dry_run:
            print_forecast(buckets, devices, opened, effort_budget, retune=retune, budget_s=budget_s, json=json)
            return
        done = _tune(opened, devices, buckets, sites, effort_budget, retune, seed, budget_s, exclusive)
        if left := len(buckets) - len(done):
            typer.echo(
                f"autofuse: the {budget} of --budget are over: {left} of {len(buckets)} buckets are not tuned; "
                "the same command goes on from there",
                err=True,
            )
        _report(opened, done, json)
    if any(event.winner is None for event in done):
        raise typer.Exit(1)


def _tune(
    database: TunedDatabase,
    devices: Sequence[torch.device],
    buckets: Sequence[Bucket],
    sites: dict[Captured, list[Bucket]],
    effort: Effort,
    retune: bool,
    seed: int,
    budget_s: float | None,
    exclusive: bool,
) -> list[BucketDone]:
    """Tunes, and shows it. Raises typer.Exit where it is interrupted."""
    from autofuse.cli.progress import progress
    from autofuse.tuner import api
    from autofuse.tuner.device_lock import device_lock
    from autofuse.tuner.devices import tune_on_devices
    from autofuse.tuner.job import BucketDone, Event

    done: list[BucketDone] = []
    begin = time.monotonic()
    try:
        with (
            _terminable(),
            device_lock(devices, wait_s=0.0 if exclusive else budget_s, on_wait=_say),
            progress(len(buckets), effort) as show,
        ):
            if exclusive:
                _check_idle(devices)

            def observe(event: Event) -> None:
                if isinstance(event, BucketDone):
                    done.append(event)
                show(event)

            handler: Callable[[Event], None] = api.forget_when_tuned(database, sites, observe)
            left_s = None if budget_s is None else budget_s - (time.monotonic() - begin) * (budget_s > 0)
            tune_on_devices(
                buckets,
                devices,
                database,
                effort,
                retune=retune,
                seed=seed,
                budget_s=left_s,
                on_event=handler,
            )
    except KeyboardInterrupt as stopped:
        _say(
            f"stopped; everything measured so far is kept in {database.path}; "
            f"the same command{' without --retune' if retune else ''} goes on from there"
        )
        raise typer.Exit(_TERMINATED if isinstance(stopped, _Terminated) else _INTERRUPTED) from None
    return done


def _check_idle(devices: Sequence[torch.device]) -> None:
    from autofuse.tuner.idleness import busy

    for device in devices:
        if why := busy(device, processes=True):
            raise TargetUnavailable(f"device {device} is busy: {why}; --exclusive tunes on idle devices only")


def _watch(
    path: Path | None,
    devices: Sequence[torch.device],
    ops: Sequence[str] | None,
    effort: Effort,
    seed: int,
    duty: float,
) -> None:
    """Watches until a signal comes: SIGTERM is how a service is stopped, and no failure."""
    try:
        with _terminable(), TunedDatabase(path) as opened:
            watch_captured(opened, devices, lambda: _captured(opened, devices[0], ops), effort, seed, duty)
    except KeyboardInterrupt as stopped:
        _say("stopped; everything measured so far is kept")
        raise typer.Exit(0 if isinstance(stopped, _Terminated) else _INTERRUPTED) from None


def _say(line: str) -> None:
    typer.echo(f"autofuse: {line}", err=True)


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
    baselines = baselines_us(database, winners.values())
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
    rivals = {winner: rival_of(database, winner) for winner in winners.values()}
    print_winners(list(winners.values()), baselines, states, rivals)
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
