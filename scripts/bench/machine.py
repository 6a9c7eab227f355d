"""What a figure depends on beside the code that is measured."""

from __future__ import annotations

import os
import platform
import sqlite3
import time

import torch

from autofuse.targets import target_of

__all__ = ["machine_facts", "machine_line"]


def machine_facts() -> dict[str, str | float]:
    """Of this machine, now. ``load``: processes that ran or waited to, on average over the last minute."""
    return {
        "cpu": target_of(torch.device("cpu")).device_name,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def machine_line(facts: dict[str, str | float]) -> str:
    """The facts in a line of Markdown, without a full stop."""
    versions = f"Python {facts['python']}, SQLite {facts['sqlite']}"
    return f"{facts['cpu']}, load {facts['load']} at the start, {versions}, measured {str(facts['measured_at'])[:10]}"
