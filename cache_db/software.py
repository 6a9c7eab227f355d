"""Which changes of a machine's software put a winner's figures in doubt."""

from __future__ import annotations

from autofuse.cache_db.store import Provenance

__all__ = ["software_changes"]

_COUNTS = ("driver", "toolkit", "compiler")
"""What of its provenance may change how fast the same kernel is. Clocks and power caps vary from run to run."""


def software_changes(then: Provenance, here: Provenance) -> list[str]:
    """What is another than it was when something was measured, each as ``driver was 570.1, is 580.65``."""
    return [
        f"{name} was {then[name]}, is {here.get(name)}"
        for name in _COUNTS
        if then.get(name) is not None and then[name] != here.get(name)
    ]
