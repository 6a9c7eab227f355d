"""Tables: which problems are measured at which T, what peers took, what was measured, and what follows from it."""

from __future__ import annotations

import fcntl
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autofuse.ops import Problem
from autofuse.targets import Target

__all__ = ["PEERS", "SMALL_TOKENS", "Results", "Table", "Verdict", "device_name", "load_tables", "summary"]

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "h200" / "peers.json"
COMPILED = ("compile", "graph", "compile+")  # columns of every row that are peers
SMALL_TOKENS, LARGE_TOKENS = 256, 8192  # up to the first latency counts, from the second on bandwidth

Times = Mapping[str, float]  # T, as text → µs
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """One problem at several T.

    Attributes:
        name: of its results' file.
        tokens: its rows.
        device: on which the times below were recorded; they mean nothing on another.
        to_reach: T → µs that are aimed at.
        peers: name → T → µs of other libraries' kernels that compute the same.
        parts: the same of kernels that compute only a part of it: for orientation.
    """

    name: str
    problem: Problem
    tokens: tuple[int, ...]
    about: str = ""
    device: str = ""
    to_reach: Times = field(default_factory=dict)
    peers: Mapping[str, Times] = field(default_factory=dict)
    parts: Mapping[str, Times] = field(default_factory=dict)

    def on(self, device_name: str) -> Table:
        """The table as it is on a device: without what was recorded on another one."""
        same = device_name == self.device
        return self if same else Table(self.name, self.problem, self.tokens, self.about)

    def verdict(self, tokens: int, row: Row) -> Verdict | None:
        """What a measured row says; None if it failed."""
        if "us" not in row:
            return None
        times, key = row["us"], str(tokens)
        peers = {name: times[name] for name in COMPILED if name in times}
        peers |= {name: column[key] for name, column in self.peers.items() if key in column}
        return Verdict(
            self.name, tokens, times["ours"], times["floor"], peers, self.to_reach.get(key), times.get("copy")
        )


@dataclass(frozen=True)
class Verdict:
    """One measured row beside what it is judged by; times in µs.

    Attributes:
        peers: name → µs of everything that computes the same, without eager.
        to_reach_us: None where nothing is aimed at.
        copy_us: of what moves as many bytes and does nothing else; None where it was not measured.
    """

    table: str
    tokens: int
    ours_us: float
    floor_us: float
    peers: Mapping[str, float]
    to_reach_us: float | None
    copy_us: float | None = None

    @property
    def best_peer(self) -> str | None:
        return min(self.peers, key=lambda name: self.peers[name], default=None)

    @property
    def lead(self) -> float | None:
        """The best peer's time ÷ ours."""
        return self.peers[self.best_peer] / self.ours_us if self.best_peer else None

    @property
    def bandwidth_share(self) -> float:
        """Of the bandwidth of a long copy: floor ÷ ours."""
        return self.floor_us / self.ours_us

    @property
    def copy_share(self) -> float | None:
        """Of the bandwidth of a copy of as many bytes, launched as the op is."""
        return self.copy_us / self.ours_us if self.copy_us else None

    @property
    def miss(self) -> float | None:
        """Ours ÷ what is to be reached, where that is more than 1."""
        return self.ours_us / self.to_reach_us if self.to_reach_us and self.ours_us > self.to_reach_us else None

    @property
    def slower_than(self) -> list[str]:
        return [name for name, time_us in self.peers.items() if time_us < self.ours_us]


def load_tables(path: Path = PEERS) -> list[Table]:
    """The tables of a file such as benchmarks/h200/peers.json. Rows are those of ``to_reach``, or of ``tokens``."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [
        Table(
            name,
            Problem.parse(table["problem"]),
            tuple(map(int, table.get("tokens", table.get("to_reach", {})))),
            table["about"],
            content["device"],
            table.get("to_reach", {}),
            table.get("peers", {}),
            table.get("parts", {}),
        )
        for name, table in content["tables"].items()
    ]


class Results:
    """A folder with one JSON file of measured rows for each table. Several processes may record rows at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def read(self, name: str) -> dict[str, Any]:
        """A table's file, ``rows`` from T as text; only empty ``rows`` if there is none."""
        path = self.path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}

    def has(self, table: Table, tokens: int) -> bool:
        """Whether a row is recorded, be it as failed."""
        return str(tokens) in self.read(table.name)["rows"]

    def keep(self, name: str, source_hash: str | None) -> None:
        """Forgets a table's rows, but for those that were measured with kernels of ``source_hash`` and did not fail."""
        content = self.read(name)
        rows = {key: row for key, row in content["rows"].items() if "error" not in row}
        if rows and content["provenance"]["source_hash"] == source_hash:
            self.write(self.path(name), {**content, "rows": rows})
        else:
            self.path(name).unlink(missing_ok=True)

    def record(self, table: Table, tokens: int, row: Row, facts: Mapping[str, Any]) -> None:
        """Adds or replaces one row, and what holds for all (``facts``: target, provenance)."""
        with self._locked():
            rows = {**self.read(table.name)["rows"], str(tokens): row}
            rows = {key: rows[key] for key in sorted(rows, key=int)}
            self.write(self.path(table.name), {"problem": str(table.problem), **facts, "rows": rows})

    @staticmethod
    def write(path: Path, content: Mapping[str, Any]) -> None:
        """Replaces a file in one step: readers never see half of it."""
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def device_name(content: Mapping[str, Any]) -> str:
    """Of the device that a table's file is from; empty if there is no file."""
    return Target.parse(content["target"]).device_name if "target" in content else ""


def summary(tables: Sequence[Table], results: Results) -> dict[str, Any]:
    """What the measured rows of all tables come to: failures, misses, rows slower than a peer, the geometric mean of
    the best peer ÷ ours up to T=256, and shares of the bandwidth from T=8192 on.
    """
    failed, verdicts = [], []
    for table in tables:
        content = results.read(table.name)
        known = table.on(device_name(content))
        for tokens in table.tokens:
            row = content["rows"].get(str(tokens), {"error": "was not measured"})
            if verdict := known.verdict(tokens, row):
                verdicts.append(verdict)
            else:
                failed.append({"table": table.name, "tokens": tokens, "error": row["error"]})
    leads = [verdict.lead for verdict in verdicts if verdict.lead and verdict.tokens <= SMALL_TOKENS]
    return {
        "rows": len(failed) + len(verdicts),
        "failed": failed,
        "missed": [
            {
                "table": verdict.table,
                "tokens": verdict.tokens,
                "ours_us": verdict.ours_us,
                "to_reach_us": verdict.to_reach_us,
                "ratio": verdict.miss,
            }
            for verdict in verdicts
            if verdict.miss
        ],
        "slower_than_a_peer": [
            {"table": verdict.table, "tokens": verdict.tokens, "ours_us": verdict.ours_us, "peers": dict(verdict.peers)}
            for verdict in verdicts
            if verdict.slower_than
        ],
        "geometric_mean_lead_up_to_256": statistics.geometric_mean(leads) if leads else None,
        "least_lead_up_to_256": min(leads, default=None),
        "bandwidth_share_from_8192": [
            {
                "table": verdict.table,
                "tokens": verdict.tokens,
                "share": verdict.bandwidth_share,
                "of_copy": verdict.copy_share,
            }
            for verdict in verdicts
            if verdict.tokens >= LARGE_TOKENS
        ],
    }
