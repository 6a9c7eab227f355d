"""``autofuse tune --watch``: tunes what ``torch.compile`` finds untuned, as a service that stays out of the way."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING

import torch
import typer

from autofuse.cache_db import Captured, TunedDatabase
from autofuse.errors import AutofuseError, DatabaseError, TargetUnavailable

if TYPE_CHECKING:
    from autofuse.tuner.budgets import Effort
    from autofuse.tuner.job import Event
    from autofuse.tuner.queue import Bucket

__all__ = ["watch"]


def watch(
    database: TunedDatabase,
    devices: Sequence[torch.device],
    sites: Callable[[], Mapping[Captured, Sequence[Bucket]]],
    effort: Effort,
    seed: int,
    duty: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Tunes captured sites on ``devices`` for as long as it is let.

    As many buckets at a time as there are devices, and only while nobody else uses these; after each it rests so long
    that ``duty`` of the time is spent tuning. Where one of several fails, those that it kept from being finished are
    tuned one at a time. What cannot be tuned is not tried again until the service is restarted.
    Lines go to standard error, without a time: the journal has its own.

    Args:
        sites: reads what is captured by now.
        duty: above 0 and up to 1.
        sleep: waits so many seconds.

    Raises DatabaseError, and OSError for a full disk, for whoever started the service to see; a signal's exception
    passes.
    """
    from autofuse.tuner.budgets import WATCH_LOOK_S
    from autofuse.tuner.device_lock import device_lock

    tuned: set[Bucket] = set()
    given_up: set[Bucket] = set()
    suspects: set[Bucket] = set()  # one of them, or several, cannot be tuned
    state = _State()
    _tell_systemd("READY=1")
    while True:
        wanted = sites()
        pending = [b for b in dict.fromkeys(chain(*wanted.values())) if b not in tuned and b not in given_up]
        why = _others(devices) if pending else None
        if not pending or why:
            state.say(f"waiting: {why}" if why else "waiting for sites that are not tuned")
            sleep(WATCH_LOOK_S)
            continue
        batch = [bucket for bucket in pending if bucket in suspects][:1] or pending[: len(devices)]
        begin = time.monotonic()
        try:
            with device_lock(devices, wait_s=0.0):
                state.say(f"{len(pending)} buckets to tune")
                right, wrong = _tune(database, devices, batch, effort, seed, state)
        except TargetUnavailable as error:  # another tuner has them
            state.say(f"waiting: {error}")
            sleep(WATCH_LOOK_S)
            continue
        tuned |= right
        given_up |= wrong
        suspects = suspects.union(batch) - right - wrong
        for site, buckets in wanted.items():
            if tuned.issuperset(buckets):
                database.forget_captured(site)
        tuned &= set(chain(*sites().values()))  # a site that is captured once more is looked at once more
        sleep((time.monotonic() - begin) * (1 / duty - 1))


def _others(devices: Sequence[torch.device]) -> str | None:
    from autofuse.tuner.idleness import busy

    return next((f"{device} is busy: {why}" for device in devices if (why := busy(device))), None)


def _tune(
    database: TunedDatabase,
    devices: Sequence[torch.device],
    batch: Sequence[Bucket],
    effort: Effort,
    seed: int,
    state: _State,
) -> tuple[set[Bucket], set[Bucket]]:
    """Tunes ``batch``. Returns what of it is tuned, and what is not to be tried again. What is in neither was stopped
    by the failure of one that is not known: each is to be tuned alone.
    """
    from autofuse.cli.progress import outcome
    from autofuse.tuner.devices import tune_on_devices
    from autofuse.tuner.job import BucketDone

    right: set[Bucket] = set()
    wrong: set[Bucket] = set()

    def observe(event: Event) -> None:
        if isinstance(event, BucketDone):
            (wrong if event.winner is None else right).add(event.bucket)
            if event.measured or event.winner is None:
                state.say(outcome(event))

    try:
        tune_on_devices(batch, devices, database, effort, seed=seed, on_event=observe)
    except DatabaseError:
        raise
    except (AutofuseError, MemoryError, RuntimeError) as error:  # the last two as an isolated bench raises them
        if len(batch) > 1:
            state.say(f"stopped; what is not finished is tuned one at a time: {error}")
            return right, wrong
        state.say(f"cannot be tuned, and is not tried again: {error}")
    return right, set(batch) - right


class _State:
    """What was said last: a line that says the same again is left out."""

    def __init__(self) -> None:
        self._last = ""

    def say(self, line: str) -> None:
        if line != self._last:
            typer.echo(f"autofuse: {' '.join(line.split())}", err=True)
        self._last = line


def _tell_systemd(state: str) -> None:
    """As sd_notify(3) does, for units of ``Type=notify``."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
