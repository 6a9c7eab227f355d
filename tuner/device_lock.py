"""One tuner at a time on a device: two would measure each other."""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from autofuse.errors import TargetUnavailable
from autofuse.paths import cache_folder

__all__ = ["device_lock", "lock_path"]

logger = logging.getLogger("autofuse.tuner")

_LOOK_EVERY_S = 0.5


def lock_path(device: torch.device) -> Path:
    """The file that whoever tunes on ``device`` has locked: in the cache folder, by the GPU's own name, so that numbers
    that CUDA_VISIBLE_DEVICES changes do not matter; a CPU's by its host's, as a home may be shared by several.
    """
    name = f"{device.type}-{platform.node()}"
    if device.type == "cuda":
        name = f"gpu-{torch.cuda.get_device_properties(device).uuid}"
    return cache_folder() / "locks" / f"{re.sub(r'[^A-Za-z0-9-]', '_', name)}.lock"


@contextmanager
def device_lock(
    devices: Sequence[torch.device],
    *,
    wait_s: float | None = None,
    on_wait: Callable[[str], None] = lambda line: None,
) -> Iterator[None]:
    """Holds ``devices`` in a ``with`` block. The system lets go of them when this process ends, however it ends.

    Args:
        wait_s: how long to wait for another tuner; None for as long as it takes.
        on_wait: called once with a line for a person, where there is one to wait for.

    Raises TargetUnavailable if it is still there by then.
    """
    paths = sorted({lock_path(device): device for device in devices}.items())  # in one order: nobody waits in a circle
    end = None if wait_s is None else time.monotonic() + wait_s
    with ExitStack() as held:
        for path, device in paths:
            held.enter_context(_locked(path, device, end, on_wait))
        yield


@contextmanager
def _locked(path: Path, device: torch.device, end: float | None, on_wait: Callable[[str], None]) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_suffix(".holder")
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        who = f"another autofuse tune ({_holder(holder)}) is at work on {device}"
        left = None if end is None else max(end - time.monotonic(), 0.0)
        if left != 0.0:
            on_wait(f"{who}: waiting for it")
        try:
            lock.acquire(timeout=-1 if left is None else left, poll_interval=_LOOK_EVERY_S)
        except Timeout:
            raise TargetUnavailable(f"{who}: try again when that has finished") from None
    try:
        with suppress(OSError):  # for messages only
            holder.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "an unknown process"
    except OSError:
        return "an unknown process"
