"""Times of other libraries' kernels, recorded in a file, to be shown beside ours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autofuse.errors import BadInput
from autofuse.ops import Problem

__all__ = ["Peers", "load_peers"]

Times = Mapping[str, Mapping[int, float]]
"""Name of a peer → T → µs of a call."""

_LONGEST_NAME = 60


@dataclass(frozen=True)
class Peers:
    """What was recorded on one device: problem → times."""

    device: str
    times: Mapping[Problem, Times]


def load_peers(path: Path) -> Peers:
    """Reads a file of the form of benchmarks/h200/peers.json: ``device``, as the driver names it, and ``tables``, each
    with a ``problem`` in canonical form and ``peers``: name → {T: µs}. What else it holds is passed over.

    Raises BadInput, naming the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Peers(_name(content["device"]), dict(_table(table) for table in content["tables"].values()))
    except OSError as error:
        raise BadInput(f"cannot read the peers in {path}: {error.strerror}; name another file") from None
    except KeyError as missing:
        raise BadInput(
            f"{path} is no file of peers: it lacks {missing.args[0]}; see benchmarks/h200/peers.json"
        ) from None
    except (BadInput, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path} is no file of peers: {error}; see benchmarks/h200/peers.json") from None


def _table(table: Mapping[str, Any]) -> tuple[Problem, Times]:
    peers = {_name(name): dict(map(_time, times.items())) for name, times in table.get("peers", {}).items()}
    return Problem.parse(str(table["problem"])), peers


def _time(item: tuple[str, Any]) -> tuple[int, float]:
    tokens, time_us = int(item[0]), float(item[1])
    if tokens < 1 or not (math.isfinite(time_us) and time_us > 0):
        raise ValueError(f"{time_us} µs at T={tokens} is no time")
    return tokens, time_us


def _name(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_NAME:
        raise ValueError(f"{str(value)[:_LONGEST_NAME]!r} is no name")
    return value
