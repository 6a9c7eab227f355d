"""How a winner compares with the kernels of its op in other languages."""

from __future__ import annotations

from dataclasses import dataclass

from autofuse.cache_db.records import Trial, Winner
from autofuse.cache_db.store import TunedDatabase
from autofuse.kernels_src import source_hash
from autofuse.ops import OPS
from autofuse.ops.languages import language_of
from autofuse.ops.problem import Config

__all__ = ["Rival", "rival_of"]


@dataclass(frozen=True)
class Rival:
    """The best of a bucket's trials in another language than the winner's.

    Attributes:
        language: ``c++`` or ``triton``.
        config, time_us: of that trial.
        ratio: its time ÷ that of the winner's own trial, both as the search measured them.
    """

    language: str
    config: Config
    time_us: float
    ratio: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f}× the best in {self.language}"


def rival_of(database: TunedDatabase, winner: Winner) -> Rival | None:
    """The best right trial in another language, with the present sources; None where the op has one language for the
    target, nothing was measured in another, or the winner is stale. Raises DatabaseError.
    """
    op, kind = OPS.get(winner.problem.op), winner.target.kind
    if op is None or kind not in op.kernels or kind not in op.triton_kernels:
        return None
    # Whether Triton is here or not: what was measured is worth showing.
    sources = [source_hash(kernel.file) for kernel in (op.kernels[kind], op.triton_kernels[kind])]
    if winner.source_hash not in sources:
        return None
    trials = database.trials(winner.target, winner.problem, winner.tokens, *sources)
    timed = [trial for trial in trials if not trial.failed and trial.time_us is not None]
    mine = next((_time_us(trial) for trial in timed if trial.config == winner.config), winner.time_us)
    others = [trial for trial in timed if language_of(trial.config) != language_of(winner.config)]
    best = min(others, key=_time_us, default=None)
    if best is None:
        return None
    return Rival(language_of(best.config), best.config, _time_us(best), _time_us(best) / mine)


def _time_us(trial: Trial) -> float:
    assert trial.time_us is not None
    return trial.time_us
