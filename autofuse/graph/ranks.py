"""The ranks of a distributed job decide alike: one reads the database, or tunes, and the others get what it found.

Ranks that compile one model each run parts of the same layers, and a fusion that only some of them have makes all wait
for the slowest. What is known is handed on through the process group's store, which blocks nobody who does not need it:
a collective would hang where ranks compile different graphs, or some compile none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from autofuse.cache_db import Snapshot, Winner
from autofuse.cache_db.rows import from_row, to_row
from autofuse.errors import BadInput
from autofuse.graph.notice import logger, warn_once
from autofuse.targets import Target
from autofuse.tuner.budgets import RANK_WAIT_S

__all__ = ["Ranks", "Shared", "SharedDatabase", "ranks"]


@dataclass(frozen=True)
class SharedDatabase:
    """What one database holds of a target.

    Attributes:
        path: where the rank that read it found it.
        present: whether it was there.
        winners: of the target, stale ones and candidates too, and of other GPUs of its arch.
        compared: (problem, tokens) of winners whose best baseline is eager, and that were compared with Inductor's code
            as well.
    """

    path: Path
    present: bool = False
    winners: tuple[Winner, ...] = ()
    compared: frozenset[tuple[str, int]] = frozenset()

    def encode(self) -> dict[str, object]:
        winners = [to_row(winner) for winner in self.winners]
        compared = sorted(map(list, self.compared))
        return {"path": str(self.path), "present": self.present, "winners": winners, "compared": compared}

    @classmethod
    def decode(cls, fields: Mapping[str, Any]) -> SharedDatabase:
        """Raises as ``Shared.decode``."""
        return cls(
            Path(fields["path"]),
            bool(fields["present"]),
            tuple(from_row(Winner, row) for row in fields["winners"]),
            frozenset((str(problem), int(tokens)) for problem, tokens in fields["compared"]),
        )

    def with_newer(self, newer: SharedDatabase) -> SharedDatabase:
        """Both; of the same bucket the newer winner."""
        buckets = {(w.target, w.problem, w.tokens): w for w in (*self.winners, *newer.winners)}
        winners = sorted(buckets.values(), key=lambda w: (str(w.target), str(w.problem), w.tokens))
        return replace(
            self, present=self.present or newer.present, winners=tuple(winners), compared=self.compared | newer.compared
        )


@dataclass(frozen=True)
class Shared:
    """What one rank found out for those on equal devices.

    Attributes:
        layers: the databases, as ``Snapshot.layers``: the user's own first, which may be absent, then those below it;
            empty where nothing is known.
        fault: why nothing is known, or why tuning found nothing.
    """

    layers: tuple[SharedDatabase, ...] = ()
    fault: str = ""

    def encode(self) -> str:
        return json.dumps({"layers": [layer.encode() for layer in self.layers], "fault": self.fault})

    @classmethod
    def decode(cls, text: str | bytes) -> Shared:
        """Raises BadInput, ValueError, KeyError, TypeError for what is none."""
        fields: dict[str, Any] = json.loads(text)
        return cls(tuple(map(SharedDatabase.decode, fields["layers"])), str(fields["fault"]))

    def with_newer(self, newer: Shared) -> Shared:
        """Both: what was tuned meanwhile is in the user's own database."""
        if not self.layers or not newer.layers:
            return replace(self, layers=self.layers or newer.layers)
        own, *below = self.layers
        return replace(self, layers=(own.with_newer(newer.layers[0]), *below))

    def snapshot(self, path: Path, target: Target) -> Snapshot | None:
        """None where nothing is known. Args: path: of this rank's own database."""
        snapshot: Snapshot | None = None
        for layer in reversed(self.layers):
            at = path if layer is self.layers[0] else layer.path
            snapshot = Snapshot(at, layer.present, target, layer.winners, snapshot)
        return snapshot


class Ranks:
    """What was agreed in the present process group.

    The lowest rank on a kind of device reads its database, once; what it found holds for all of them until the group is
    destroyed, whatever is tuned elsewhere meanwhile. What a rank tunes while compiling is added for all.
    """

    def __init__(self) -> None:
        self._store: Any = None
        self._agreed: dict[tuple[Target, Path | None], Shared] = {}

    @property
    def several(self) -> bool:
        """Whether there are other ranks to agree with, and a store to do it by (MPI has none)."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
            return False
        return dist.distributed_c10d._get_default_store() is not None

    def read(self, target: Target, database: Path | None, read: Callable[[], Shared]) -> Shared:
        """What the ranks on ``target`` know: ``read`` of the lowest of them.

        A lower rank that does not say within RANK_WAIT_S what it runs on is not waited for: then the first that is here
        decides. Never raises but what ``read`` raises.
        """
        store = self._present_store()
        key = (target, database)
        if key not in self._agreed:
            self._agreed[key] = self._exchange(store, _digest(target, database), str(target), read)
        return self._agreed[key]

    def tune(self, target: Target, database: Path | None, what: str, wait_s: float, work: Callable[[], Shared]) -> str:
        """``work`` of whoever comes first with ``what``; the others wait for it, at most ``wait_s``.

        What was found is in what ``read`` gives from then on. Returns why nothing was, "" if something was. Raises what
        ``work`` raises.
        """
        store = self._present_store()
        name = f"autofuse/tuned/{_digest(target, database, what)}"
        try:
            first = store.add(f"{name}/claims", 1) == 1
        except RuntimeError as error:
            warn_once(f"autofuse cannot reach the other ranks, and tunes for itself: {_line(error)}")
            found = work()
        else:
            found = self._work(store, name, work) if first else _received(store, name, wait_s)
        key = (target, database)
        if key in self._agreed:
            self._agreed[key] = self._agreed[key].with_newer(found)
        return found.fault

    def _present_store(self) -> Any:
        store = dist.distributed_c10d._get_default_store()
        if store is not self._store:  # another process group: its ranks may be others
            self._store, self._agreed = store, {}
        return store

    def _exchange(self, store: Any, name: str, target: str, read: Callable[[], Shared]) -> Shared:
        rank = dist.get_rank()
        agreed = f"autofuse/known/{name}"
        places = [f"autofuse/target/{name}/{each}" for each in range(rank)]
        try:
            # Only ranks on this target write under its name, so a lower one that is here is one to wait for.
            store.set(f"autofuse/target/{name}/{rank}", "here")
            store.set(f"autofuse/rank/{rank}", target)
            if self._lower_is_here(store, rank, places):
                store.wait([agreed], timedelta(seconds=RANK_WAIT_S))
                return Shared.decode(store.get(agreed))
        except (RuntimeError, BadInput, ValueError, KeyError, TypeError) as error:
            warn_once(f"autofuse has nothing from the lowest rank, and reads for itself: {_line(error)}")
        own = read()
        try:
            return Shared.decode(store.compare_set(agreed, "", own.encode()))
        except (RuntimeError, BadInput, ValueError, KeyError, TypeError) as error:
            warn_once(f"autofuse cannot agree with the other ranks, and decides for itself: {_line(error)}")
            return own

    @staticmethod
    def _lower_is_here(store: Any, rank: int, places: list[str]) -> bool:
        """Whether a lower rank runs on the same target; waits for all lower ones to say what they run on."""
        if rank == 0:
            return False
        try:
            store.wait([f"autofuse/rank/{each}" for each in range(rank)], timedelta(seconds=RANK_WAIT_S))
        except RuntimeError as error:
            logger.info("not all lower ranks compile: %s", _line(error))
        return any(store.check([place]) for place in places)

    @staticmethod
    def _work(store: Any, name: str, work: Callable[[], Shared]) -> Shared:
        found = Shared(fault="the rank that tuned was interrupted")
        try:
            found = work()
        finally:
            try:
                store.set(name, found.encode())
            except RuntimeError as error:
                warn_once(f"autofuse cannot tell the other ranks what it tuned: {_line(error)}")
        return found


def _received(store: Any, name: str, wait_s: float) -> Shared:
    try:
        store.wait([name], timedelta(seconds=wait_s))
        return Shared.decode(store.get(name))
    except (RuntimeError, BadInput, ValueError, KeyError, TypeError) as error:
        return Shared(fault=f"another rank tuned, and its result did not come: {_line(error)}")


def _digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


ranks = Ranks()
