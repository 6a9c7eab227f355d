"""What the database knows of a bucket before it is tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autofuse.cache_db import Trial, TunedDatabase, Winner
from autofuse.cache_db.store import Provenance
from autofuse.ops import Config, get_op
from autofuse.targets import Target
from autofuse.tuner.budgets import Effort
from autofuse.tuner.queue import Bucket

__all__ = ["DIED", "DIED_AGAIN", "Known", "imported", "known_of"]

_SOFTWARE = ("autofuse", "torch", "driver", "toolkit", "compiler")  # of provenance: what can make a config fail
DIED = "the process died while this config ran"
DIED_AGAIN = "the process died twice while this config ran"


@dataclass(frozen=True)
class Known:
    """What the database knows of a bucket, as the tuner takes it.

    Attributes:
        trials: config → trial, of those that need not be made again.
        winner: the present one, of whatever kernel source.
        fresh: whether it was measured with the present source.
    """

    trials: Mapping[Config, Trial]
    winner: Winner | None
    fresh: bool


def known_of(database: TunedDatabase, target: Target, bucket: Bucket, present: Provenance) -> Known:
    """Only what was measured here counts: what another machine found is proposed, and measured again.

    Args:
        present: the present provenance; what failed with another driver or other software is tried again.
    """
    sources = get_op(bucket.problem.op).source_hashes(target.kind)
    trials = database.trials(target, bucket.problem, bucket.tokens, *sources)
    winner = database.winner(target, bucket.problem, bucket.tokens)
    fresh = winner is not None and winner.source_hash in sources and winner.standing == "own"
    failures = {trial.provenance for trial in trials if trial.failed}
    alike = {id: bool(id) and _same_software(database.provenance(id), present) for id in failures}
    held = [trial for trial in trials if trial.standing == "own" and _holds(trial, alike)]
    return Known({trial.config: trial for trial in held}, winner, fresh)


def imported(database: TunedDatabase, target: Target, bucket: Bucket, effort: Effort) -> list[Config]:
    """What another machine found good for the bucket, the fastest first; not more than are tried before others."""
    sources = get_op(bucket.problem.op).source_hashes(target.kind)
    return database.priors(target, bucket.problem, bucket.tokens, *sources)[: effort.priors]


def _holds(trial: Trial, alike: Mapping[str, bool]) -> bool:
    """Whether a trial need not be made again: a failure may have been this driver's, or this compiler's, one death
    of the tuning process may have had any reason, and memory may have been short because others had it.

    Args:
        alike: provenance of failures → whether it is of the present software.
    """
    if not trial.failed:
        return True
    return alike[trial.provenance] and trial.message != DIED and trial.status != "out_of_memory"


def _same_software(one: Provenance, other: Provenance) -> bool:
    """Clocks and power limits vary from run to run, and make no config fail."""
    return all(one.get(name) == other.get(name) for name in _SOFTWARE)
