"""What to know of a winner beside its figures: that it is stale, in Triton where that is not used, disputed, suspect,
trusted or only a candidate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from autofuse.cache_db import TunedDatabase, Winner, software_changes, why_unused_here
from autofuse.errors import AutofuseError
from autofuse.targets import KINDS, Target, target_of, toolchain
from autofuse.tuner.stand_in import way_of_timing

__all__ = ["Marks"]


@dataclass
class Marks:
    """Marks winners of one database, by what this machine is now."""

    database: TunedDatabase
    _here: dict[Target, Mapping[str, str | int | float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in KINDS:
            try:
                device = torch.device("cpu" if kind == "cpu" else "cuda:0")
                target = target_of(device)
                if target.kind == kind:
                    self._here[target] = {**toolchain(kind).provenance(device), **way_of_timing(kind)}
            except (AutofuseError, RuntimeError, AssertionError):  # there is no such device
                continue

    def of(self, winner: Winner) -> str:
        """Why the winner would not be used, or what speaks against it; "" where nothing does."""
        if why := why_unused_here(winner):
            return why
        if winner.standing == "candidate":
            return "candidate: imported, not measured here"
        if winner.standing == "disputed":
            return "disputed: measured again, not as recorded"
        if changed := self._changed(winner):
            return f"suspect: {', '.join(changed)}"
        return "trusted: imported, not measured here" if winner.standing == "trusted" else ""

    def _changed(self, winner: Winner) -> list[str]:
        here = self._here.get(winner.target)
        if here is None or not winner.provenance:
            return []
        return software_changes(self.database.provenance(winner.provenance), here)
