"""Whether anybody else is using a device just now."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from autofuse.tuner.budgets import BUSY_SHARE, LOOK_S

__all__ = ["Busy", "busy"]

Busy = Callable[[torch.device], str | None]
"""What keeps a device busy, as part of a sentence; None if it is idle, as far as can be seen."""

_NVIDIA_SMI_S = 10.0
_LOOKS = 5


def busy(device: torch.device, *, processes: bool = False) -> str | None:
    """What others do on ``device``, as part of a sentence; None if it is idle. Takes LOOK_S.

    A CPU is busy if more than BUSY_SHARE of its cores work, a GPU if kernels run on it for more than that share of the
    time. This process must do nothing meanwhile. What cannot be found out counts as idle.

    Args: processes: on a GPU, another process that has memory there counts as well, if it does nothing just now.
    """
    return _gpu_busy(device, processes) if device.type == "cuda" else _cpu_busy()


def _cpu_busy() -> str | None:
    before, begin = _cpu_seconds(), time.monotonic()
    time.sleep(LOOK_S)
    after = _cpu_seconds()
    if before is None or after is None:
        return None
    cores = (after - before) / (time.monotonic() - begin)
    share = cores / (os.cpu_count() or 1)
    return f"{cores:.1f} of {os.cpu_count()} cores are at work" if share > BUSY_SHARE else None


def _cpu_seconds() -> float | None:
    """That all cores have worked since the machine was started (``man 5 proc``: user, nice and system)."""
    try:
        numbers = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:4]
        return sum(map(int, numbers)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def _gpu_busy(device: torch.device, processes: bool) -> str | None:
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    if processes:
        asked = _nvidia_smi(uuid, "--query-compute-apps=pid,process_name")
        others = [line for line in asked or () if line.split(",")[0].strip() != str(os.getpid())]
        if others:
            pid, _, name = others[0].partition(",")
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            return f"process {pid.strip()} ({name.strip()}){more} is on it"
    most = 0.0
    for _ in range(_LOOKS):
        found = _nvidia_smi(uuid, "--query-gpu=utilization.gpu")
        try:
            most = max(most, float(found[0].split()[0])) if found else most
        except (ValueError, IndexError):  # "[N/A]", as with MIG
            return None
        time.sleep(LOOK_S / _LOOKS)
    return f"kernels run on it {most:.0f} % of the time" if most > 100 * BUSY_SHARE else None


def _nvidia_smi(uuid: str, query: str) -> list[str] | None:
    """The lines that it answers; None if it cannot be asked."""
    command = ["nvidia-smi", query, "--format=csv,noheader", f"--id={uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [line for line in done.stdout.splitlines() if line.strip()]
