"""What a user may ask of the backend, in ``torch.compile(..., options={"autofuse.level": "O2"})``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autofuse.errors import BadInput
from autofuse.graph.fusions import FUSIONS, Fusion
from autofuse.tuner.budgets import COMPILE_BUDGET_S

__all__ = ["LEVELS", "PREFIX", "UNTUNED", "Settings"]

PREFIX = "autofuse."
LEVELS = ("O0", "O1", "O2", "O3")
UNTUNED = ("skip", "fuse", "tune")


@dataclass(frozen=True)
class Settings:
    """The options that begin with ``autofuse.``.

    Attributes:
        level: ``O0`` nothing; ``O1`` to ``O3`` switch on more and more fusions.
        untuned: what happens at a site that nobody measured: ``skip`` leaves it and remembers it for ``autofuse tune
            --captured``, ``fuse`` runs the kernel's default config, ``tune`` measures it while compiling.
        tune_budget: seconds that ``untuned="tune"`` may take in one process, all its compilations together; what is
            not tuned by then is left and remembered as by ``skip``. A measurement that has begun is ended: that may
            take half a minute more.
        flags: (fusion, on or off) as set by hand; each beats the level.
        database: the database's path, None for the default one.

    Example:
        >>> settings, others = Settings.parse({"autofuse.level": "O0", "trace.enabled": True})
        >>> settings.level, others
        ('O0', {'trace.enabled': True})
    """

    level: str = "O2"
    untuned: str = "skip"
    tune_budget: float = COMPILE_BUDGET_S
    flags: tuple[tuple[str, bool], ...] = ()
    database: Path | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> tuple[Settings, dict[str, Any]]:
        """Splits options into autofuse's settings and those for Inductor. Raises BadInput."""
        ours: dict[str, Any] = {}
        flags: dict[str, bool] = {}
        others: dict[str, Any] = {}
        for key, value in (options or {}).items():
            if not key.startswith(PREFIX):
                others[key] = value
                continue
            name = key.removeprefix(PREFIX)
            if name == "level":
                ours[name] = _choice(key, value, LEVELS)
            elif name == "untuned":
                ours[name] = _choice(key, value, UNTUNED)
            elif name == "tune_budget":
                ours[name] = _seconds(key, value)
            elif name == "database":
                ours[name] = _path(key, value)
            elif name in _flag_names():
                if not isinstance(value, bool):
                    raise BadInput(f"option {key} must be True or False, not {value!r}")
                flags[name] = value
            else:
                known = ", ".join(PREFIX + name for name in _names())
                raise BadInput(f"unknown option {key}{_hint(name)}; the known options are {known}")
        return cls(flags=tuple(sorted(flags.items())), **ours), others

    def __str__(self) -> str:
        """What decisions depend on, in canonical form; of the database, its content counts, not its path. What a
        budget of time left untuned is in no cache.
        """
        flags = "".join(f",{name}={'on' if on else 'off'}" for name, on in self.flags)
        return f"level={self.level},untuned={self.untuned}{flags}"

    def switched_on(self, fusion: Fusion) -> tuple[bool, str]:
        """Whether ``fusion`` is on, and by what."""
        by_hand = dict(self.flags).get(fusion.name)
        if by_hand is not None:
            return by_hand, f"{PREFIX}{fusion.name} is {by_hand}"
        needs = f"{fusion.name} is on from level O{fusion.level}, the level is {self.level}"
        return LEVELS.index(self.level) >= fusion.level, needs


def _flag_names() -> list[str]:
    return [*dict.fromkeys(fusion.name for fusion in FUSIONS)]


def _names() -> list[str]:
    return ["level", "untuned", "tune_budget", "database", *_flag_names()]


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, _names(), n=1)
    return f"; did you mean {PREFIX}{close[0]}?" if close else ""


def _choice(key: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise BadInput(f"option {key} must be one of {', '.join(map(repr, choices))}, not {value!r}{hint}")
    return str(value)


def _seconds(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise BadInput(f"option {key} must be a number of seconds from 0, not {value!r}")
    return float(value)


def _path(key: str, value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise BadInput(f"option {key} must be a path, not {value!r}")
    return Path(value).expanduser()
