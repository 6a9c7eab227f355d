"""What puts a winner's figures in doubt: other software, or another way of timing."""

from __future__ import annotations

from autofuse.cache_db.store import Provenance

__all__ = ["TIMED", "software_changes", "timed_alike"]

TIMED = "timed"
"""Of provenance: in which way times were taken. Nothing is said of the way that was the only one at first."""

_COUNTS = ("driver", "toolkit", "compiler")
"""What of its provenance may change how fast the same kernel is. Clocks and power caps vary from run to run."""


def software_changes(then: Provenance, here: Provenance) -> list[str]:
    """What is another than it was when something was measured, each as ``driver was 570.1, is 580.65``; beside the
    software, the way of timing.
    """
    changes = [
        f"{name} was {then[name]}, is {here.get(name)}"
        for name in _COUNTS
        if then.get(name) is not None and then[name] != here.get(name)
    ]
    return changes if timed_alike(then, here) else [*changes, "autofuse timed in another way"]


def timed_alike(then: Provenance, here: Provenance) -> bool:
    """Whether times of both say which is the faster."""
    return then.get(TIMED) == here.get(TIMED)
