"""One job on the equal devices of this host: some processes for each, which take buckets from one queue.

Those of one device take turns on it: while one measures, the others compile.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch

from autofuse import kernels_src
from autofuse.cache_db import TunedDatabase, Winner
from autofuse.cores import usable_cores
from autofuse.errors import AutofuseError, BadInput
from autofuse.ops import get_op
from autofuse.targets import parse_device, target_of
from autofuse.tuner.budgets import KILL_GRACE_S, LANE_BYTES, LANE_CORES, LANES, STOP_GRACE_S, Effort
from autofuse.tuner.job import BucketDone, Event, tune_buckets
from autofuse.tuner.processes import kill_group, start_module
from autofuse.tuner.queue import Bucket, BucketQueue

__all__ = ["lanes", "parse_devices", "tune_on_devices"]

_BLAS_THREADS = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Of NumPy, which the search computes with: the other cores are for compilers. A step of it takes 10 ms with one thread
and 23 with two on two cores that are busy. PyTorch's threads are set apart from this."""


def parse_devices(text: str) -> list[torch.device]:
    """``all`` GPUs (the CPU where there is none), or what ``parse_device`` reads, several with commas between.

    Raises BadInput, also for devices of several kinds; TargetUnavailable.

    Example:
        >>> parse_devices("cpu")
        [device(type='cpu')]
    """
    if text == "all":
        gpus = torch.cuda.is_available() and not torch.version.hip
        text = ",".join(f"cuda:{index}" for index in range(torch.cuda.device_count())) if gpus else "cpu"
    devices = list(dict.fromkeys(parse_device(word.strip()) for word in text.split(",")))
    kinds = {target_of(device): device for device in devices}
    if len(kinds) > 1:
        named = ", ".join(f"{device} is {target}" for target, device in kinds.items())
        raise BadInput(f"devices {text!r} are of several kinds ({named}): tune one kind at a time")
    return devices


def lanes(devices: Sequence[torch.device], buckets: int) -> list[torch.device]:
    """The device of each process of a job: a device several times where several buckets are tuned on it at once."""
    each = min(LANES[target_of(devices[0]).kind], usable_cores() // len(devices) // LANE_CORES)
    if devices[0].type == "cuda":
        each = min(each, *(_free_bytes(device) // LANE_BYTES for device in devices))
    return (list(devices) * max(each, 1))[: max(buckets, 1)]


def _free_bytes(device: torch.device) -> int:
    """Of a GPU's memory, what nobody uses; all of it where nobody can say (no nvidia-ml-py). Makes no CUDA context."""
    total: int = torch.cuda.get_device_properties(device).total_memory
    try:
        return total - torch.cuda.device_memory_used(device)
    except Exception:  # no library, no driver, AMD's GPU, an older PyTorch
        return total


class DeviceFailedError(AutofuseError):
    """What tunes on one of several devices failed for a reason that no exception of ours has."""


def tune_on_devices(
    buckets: Sequence[Bucket],
    devices: Sequence[torch.device],
    database: TunedDatabase,
    effort: Effort,
    *,
    retune: bool = False,
    seed: int = 0,
    budget_s: float | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Winner]:
    """``tune_buckets`` on all of ``devices`` at the same time, into one database.

    Whichever device is ready takes the next bucket from their queue. Each has one or more (``lanes``) processes of its
    own, which end with this one; where one fails, the others are stopped, with what they measured kept. Where one is
    enough, this process does.

    Args:
        devices: of one target; see ``parse_devices``.
        on_event: called in this thread, with the events of all of them as they come.

    Returns: the winners, in the order in which their buckets were finished.
    Raises: what ``tune_buckets`` raises, its message led by the device's name.
    """
    devices = lanes(devices, len(buckets))
    if len(devices) == 1:
        return tune_buckets(
            buckets, devices[0], database, effort, retune=retune, seed=seed, budget_s=budget_s, on_event=on_event
        )
    queue = BucketQueue(buckets, budget_s, takers=len(devices))
    shared = {
        "path": database.path,
        "effort": effort,
        "retune": retune,
        "seed": seed,
        "kernels": kernels_src.FOLDER,
        "modules": _modules(buckets),
        "threads": torch.get_num_threads(),
        "log_level": logging.getLogger("autofuse").getEffectiveLevel(),
        "compilers": max(usable_cores() // len(devices), 1),
    }
    workers: list[_DeviceWorker] = []
    winners: list[Winner] = []
    folder = tempfile.TemporaryDirectory(prefix="autofuse-tune-", ignore_cleanup_errors=True)
    try:
        for device in devices:
            turns = Path(folder.name) / str(device).replace(":", "-")
            workers.append(_DeviceWorker(device, {**shared, "device": str(device), "turns": turns}))
        working = {worker.connection: worker for worker in workers}
        while working:
            for ready in wait(list(working)):
                assert isinstance(ready, Connection)
                event = working[ready].next_event(queue)
                if event is None:
                    del working[ready]
                    continue
                if isinstance(event, BucketDone) and event.winner is not None:
                    winners.append(event.winner)
                if not isinstance(event, _Served):
                    on_event(event)
    except BaseException:
        for worker in workers:
            worker.interrupt()
        raise
    finally:
        end = time.monotonic() + STOP_GRACE_S
        for worker in workers:
            worker.end(end)
        folder.cleanup()
    return winners


def _modules(buckets: Sequence[Bucket]) -> list[str]:
    """The modules of the ops. Raises BadInput for one that another process cannot import."""
    modules = {type(get_op(bucket.problem.op)).__module__ for bucket in buckets}
    if "__main__" in modules:
        raise BadInput("an op is defined in the main program, which other processes cannot import: move it to a module")
    return sorted(modules)


class _Served:
    """A worker asked for something, and has it."""


class _DeviceWorker:
    """A process that tunes on a device."""

    def __init__(self, device: torch.device, start: dict[str, Any]) -> None:
        self.connection, theirs = Pipe()
        self._device = device
        with theirs:
            self._process = start_module(
                "autofuse.tuner.device_worker",
                [str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**_BLAS_THREADS, **os.environ},
            )
        self._started = False
        with suppress(OSError):  # it is dead, as whoever waits for its events will find
            self.connection.send(start)

    def next_event(self, queue: BucketQueue) -> Event | _Served | None:
        """What the process says: an event, _Served where it was something else, None once it is done.

        Raises the error that it met.
        """
        try:
            kind, *said = self.connection.recv()
            if kind == "take":
                self._started = True
                self.connection.send(queue.take(self))
                return _Served()
        except (EOFError, OSError):
            code = self._process.wait()
            raise DeviceFailedError(
                f"device {self._device}: the process that tunes on it died (exit code {code}); everything measured "
                "so far is kept, and the same command goes on from there"
            ) from None
        if kind == "event":
            return said[0]
        if kind == "log":
            name, level, message = said
            logging.getLogger(name).log(level, "%s: %s", self._device, message)
            return _Served()
        if kind == "error":
            raise self._named(said[0])
        return None

    def _named(self, error: Exception) -> Exception:
        """``error`` with the device's name before its message, where it is one of ours."""
        if isinstance(error, AutofuseError) and error.args:
            error.args = (f"device {self._device}: {error.args[0]}", *error.args[1:])
        return error

    def interrupt(self) -> None:
        """Stops it in good order; what has not begun is simply ended."""
        with suppress(ProcessLookupError):
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGINT if self._started else signal.SIGKILL)

    def end(self, at: float) -> None:
        """Waits for it until ``at`` (of the monotonic clock), then ends it and what it started."""
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(at - time.monotonic(), 0.0))
        kill_group(self._process, KILL_GRACE_S)
