"""What else a machine did while it was measured: other work, and a GPU that slowed itself down.

Whoever measures goes on whatever is found; it is written beside the result. What cannot be found out counts as nothing:
a system without /proc, a GPU without NVIDIA's management library (``pip install nvidia-ml-py``), or a container that
does not see the processes of its host.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autofuse.tuner.budgets import OTHERS_SHARE
from autofuse.tuner.measure import Timing

__all__ = ["Comparison", "Watch", "watch"]

_STAT = Path("/proc/stat")
_IDLE = slice(3, 5)  # of a line's numbers: idle and iowait (man 5 proc)
_GUEST = 8  # from here on, numbers are contained in others

# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h). A limit of power that the kernels themselves reach is no
# disturbance: it is how fast this GPU is.
_SLOWDOWNS = {
    0x08: "the GPU slowed down (hardware)",
    0x20: "the GPU was too hot",
    0x40: "the GPU was too hot",
    0x80: "the GPU's power supply slowed it down",
}


@dataclass(frozen=True)
class Comparison:
    """Functions that were timed in turns.

    Attributes:
        timings: one of each.
        disturbances: what else went on meanwhile, in words for a person.
    """

    timings: tuple[Timing, ...]
    disturbances: tuple[str, ...] = ()


class Watch(ABC):
    """Looks at the machine before and after a measurement that this process makes."""

    @abstractmethod
    def begin(self) -> None:
        """The measurement begins."""

    @abstractmethod
    def end(self) -> tuple[str, ...]:
        """What went on since it began."""


def watch(device: torch.device, own: Callable[[], Container[int]] = lambda: (os.getpid(),)) -> Watch:
    """The watch for a device; one that sees nothing where there is no way to look.

    Args: own: gives the processes whose work on a GPU is no disturbance, as they wait while this one measures.
    """
    if device.type == "cpu":
        return _CpuWatch()
    try:
        import pynvml

        return _NvidiaWatch(pynvml, str(torch.cuda.get_device_properties(device).uuid), own)
    except Exception:  # no library, no driver, AMD's GPU, an older PyTorch
        return _BlindWatch()


class _BlindWatch(Watch):
    def begin(self) -> None:
        pass

    def end(self) -> tuple[str, ...]:
        return ()


class _CpuWatch(Watch):
    """Other processes' share of the cores that this one may use."""

    def begin(self) -> None:
        self._before = self._numbers()

    def end(self) -> tuple[str, ...]:
        after = self._numbers()
        if self._before is None or after is None:
            return ()
        busy_s, own_s, total_s = (b - a for a, b in zip(self._before, after, strict=True))
        if total_s <= 0 or (busy_s - own_s) / total_s <= OTHERS_SHARE:
            return ()
        return ("other work on the CPU",)

    def _numbers(self) -> tuple[float, float, float] | None:
        """Seconds since some moment: of all work on these cores, of this process's, and of these cores in all."""
        try:
            cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
            lines = [line.split() for line in _STAT.read_text(encoding="ascii").splitlines()]
            ticks = [[int(number) for number in line[1:]] for line in lines if line and line[0] in cores]
            tick_s = 1 / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            return None
        total = sum(sum(each[:_GUEST]) for each in ticks)
        idle = sum(sum(each[_IDLE]) for each in ticks)
        return (total - idle) * tick_s, time.process_time(), total * tick_s


class _NvidiaWatch(Watch):
    """Slowdowns, and kernels of other processes."""

    def __init__(self, nvml: Any, uuid: str, own: Callable[[], Container[int]]) -> None:
        nvml.nvmlInit()
        self._own = own
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def begin(self) -> None:
        self._began_us = time.time_ns() // 1000
        self._slow = self._slowdowns()

    def end(self) -> tuple[str, ...]:
        slow = self._slow | self._slowdowns()
        found = [text for bit, text in _SLOWDOWNS.items() if slow & bit]
        if self._others():
            found.append("kernels of other processes on the GPU")
        return tuple(dict.fromkeys(found))

    def _slowdowns(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle))
        except Exception:  # not with this driver, on this GPU, or for this user
            return 0

    def _others(self) -> bool:
        try:
            seen = {process.pid for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}
            if os.getpid() not in seen:  # process numbers of another namespace
                return False
            samples: Iterable[Any] = self._nvml.nvmlDeviceGetProcessUtilization(self._handle, self._began_us)
            own = self._own()
            return any(each.smUtil > 0 and each.pid not in own for each in samples)
        except Exception:  # as above; without samples there is nothing to say
            return False
