"""What a user may ask of the backend, in ``torch.compile(..., options={"autofuse.level": "O2"})``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autofuse.errors import BadInput
from autofuse.graph.fusions import FUSIONS, Fusion
from autofuse.tuner.budgets import COMPILE_BUDGET_S

__all__ = ["LEVELS", "PLAN_VARIABLE", "PREFIX", "UNTUNED", "Settings", "hint_for"]

PREFIX = "autofuse."
LEVELS = ("O0", "O1", "O2", "O3")
UNTUNED = ("skip", "fuse", "tune")
PLAN_VARIABLE = "AUTOFUSE_PLAN"
"""Names the plan where ``autofuse.plan`` does not; ``autofuse.load_plan`` sets it."""


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
        plan: a file that ``autofuse export`` wrote: its winners decide, and nothing else does; None for the database.
        splitting_ops: the operators (``namespace::name``) at which whoever hands graphs over splits them, as in vLLM's
            ``CompilationConfig``. What runs between two graphs cannot be fused in either.
        use_inductor_graph_partition: the graph is whole until Inductor has run its passes, and only then partitioned at
            ``splitting_ops``: nothing is lost to fusions. Inductor is told so.

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
    plan: Path | None = None
    splitting_ops: tuple[str, ...] = ()
    use_inductor_graph_partition: bool = False

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
            elif name == "database" or name == "plan":
                ours[name] = _path(key, value)
            elif name == "splitting_ops":
                ours[name] = _operators(key, value)
            elif name == "use_inductor_graph_partition":
                ours[name] = _bool(key, value)
            elif name in _flag_names():
                flags[name] = _bool(key, value)
            else:
                known = ", ".join(PREFIX + name for name in _names())
                raise BadInput(f"unknown option {key}{_hint(name)}; the known options are {known}")
        if "plan" not in ours and (named := os.environ.get(PLAN_VARIABLE)):
            ours["plan"] = _path(PLAN_VARIABLE, named)
        settings = cls(flags=tuple(sorted(flags.items())), **ours)
        settings._check_plan()
        return settings, others

    def _check_plan(self) -> None:
        if self.plan is None:
            return
        if not self.plan.is_file():
            raise BadInput(f"the plan {self.plan} is no file; name one that `autofuse export` wrote")
        if self.untuned == "tune":
            raise BadInput(f"{PREFIX}untuned is 'tune', but with {PREFIX}plan nothing else is to run; give one of them")

    def __str__(self) -> str:
        """What decisions depend on, in canonical form; of the database, its content counts, not its path. What a
        budget of time left untuned is in no cache.
        """
        flags = "".join(f",{name}={'on' if on else 'off'}" for name, on in self.flags)
        split = f",splitting_ops={'+'.join(self.splitting_ops)}" if self.splitting_ops else ""
        partition = ",use_inductor_graph_partition=on" if self.use_inductor_graph_partition else ""
        return f"level={self.level},untuned={self.untuned}{flags}{split}{partition}"

    def switched_on(self, fusion: Fusion) -> tuple[bool, str]:
        """Whether ``fusion`` is on, and by what."""
        by_hand = dict(self.flags).get(fusion.name)
        if by_hand is not None:
            return by_hand, f"{PREFIX}{fusion.name} is {by_hand}"
        needs = f"{fusion.name} is on from level O{fusion.level}, the level is {self.level}"
        return LEVELS.index(self.level) >= fusion.level, needs

    def split_at(self, operators: Collection[str]) -> str | None:
        """Why a fusion that needs these operators inside a graph is off; None if it is not."""
        if self.use_inductor_graph_partition:
            return None
        for name in self.splitting_ops:
            if name.removesuffix(".default") in operators:
                return f"{name} is in {PREFIX}splitting_ops: it splits the graph, and cannot be fused"
        return None

    @property
    def inductor_options(self) -> dict[str, Any]:
        """What Inductor must be told: where to partition a graph."""
        if not self.use_inductor_graph_partition:
            return {}
        return {"graph_partition": True, "custom_should_partition_ops": list(self.splitting_ops)}


def hint_for(name: str) -> str:
    """What to say of an option that Inductor lacks."""
    known = ", ".join(PREFIX + each for each in _names())
    return f"Inductor has none such, and those of autofuse are {known}{_hint(name)}"


def _flag_names() -> list[str]:
    return [*dict.fromkeys(fusion.name for fusion in FUSIONS)]


def _names() -> list[str]:
    own = ["level", "untuned", "tune_budget", "database", "plan", "splitting_ops", "use_inductor_graph_partition"]
    return [*own, *_flag_names()]


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


def _bool(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadInput(f"option {key} must be True or False, not {value!r}")
    return value


def _operators(key: str, value: Any) -> tuple[str, ...]:
    names = [*value] if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, str) or any(not isinstance(name, str) or "::" not in name for name in names):
        raise BadInput(f"option {key} must be a list of operators such as vllm::unified_kv_cache_update, not {value!r}")
    return tuple(dict.fromkeys(names))


def _path(key: str, value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise BadInput(f"option {key} must be a path, not {value!r}")
    return Path(value).expanduser()
