"""What the database knows of a bucket before it is tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autofuse.cache_db import Trial, TunedDatabase, Winner, timed_alike
from autofuse.cache_db.store import Provenance
from autofuse.ops import Config, get_op
from autofuse.targets import Target
from autofuse.tuner.budgets import Effort
from autofuse.tuner.queue import Bucket

__all__ = ["DIED", "DIED_AGAIN", "Known", "imported", "known_of", "searched", "still_searched"]

_SOFTWARE = ("autofuse", "torch", "driver", "toolkit", "compiler")  # of provenance: what can make a config fail
_TRIALS, _WHOLE, _SOURCES = "searched_trials", "searched_whole_up_to", "searched_sources"  # of a winner's provenance
DIED = "the process died while this config ran"
DIED_AGAIN = "the process died twice while this config ran"


@dataclass(frozen=True)
class Known:
    """What the database knows of a bucket, as the tuner takes it.

    Attributes:
        trials: config → trial, of those that need not be made again.
        winner: the present one, of whatever kernel source.
        fresh: whether it was measured with the present source, and as is done now.
        searched: its provenance, with what ``searched`` says of the search that it came of if that came to its end;
            empty if a trial is to be made again.
        outdated: trials whose times were taken in another way. None is told from those that are taken now, so what is
            ranked with them, or learnt from both, would be wrong.
    """

    trials: Mapping[Config, Trial]
    winner: Winner | None
    fresh: bool
    searched: Provenance
    outdated: tuple[Trial, ...] = ()

    def is_done(self, effort: Effort, sources: Sequence[str], wanted: Sequence[Config]) -> bool:
        """Whether a search of that effort has nothing to do: one of as much came to its end, in the same languages.

        How many configs it measured does not say so: it ends where none is expected to be faster.

        Args: wanted: configs that are to be measured in any case.
        """
        trials, whole = (int(self.searched.get(name) or 0) for name in (_TRIALS, _WHOLE))
        enough = trials >= effort.trials and whole >= effort.exhaustive_up_to
        alike = self.searched.get(_SOURCES) == "+".join(sources)
        return self.fresh and enough and alike and all(config in self.trials for config in wanted)


def searched(effort: Effort, sources: Sequence[str]) -> Provenance:
    """What the provenance of a winner says of the search that it came of.

    Args: sources: hashes of the kernel's sources, one for each language.
    """
    return {_TRIALS: effort.trials, _WHOLE: effort.exhaustive_up_to, _SOURCES: "+".join(sources)}


def still_searched(database: TunedDatabase, winner: Winner) -> Provenance:
    """The same, of a winner that is measured again and stays one. Empty for one that comes from elsewhere."""
    if winner.standing != "own" or not winner.provenance:
        return {}
    fields = database.provenance(winner.provenance)
    return {name: fields[name] for name in (_TRIALS, _WHOLE, _SOURCES) if name in fields}


def known_of(database: TunedDatabase, target: Target, bucket: Bucket, present: Provenance) -> Known:
    """Only what was measured here counts: what another machine found is proposed, and measured again.

    Args:
        present: the present provenance; what failed with another driver or other software is tried again, and what was
            timed in another way is timed again.
    """
    sources = get_op(bucket.problem.op).source_hashes(target.kind)
    trials = database.trials(target, bucket.problem, bucket.tokens, *sources)
    own = [trial for trial in trials if trial.standing == "own"]
    names = {trial.provenance for trial in own}
    then = {name: database.provenance(name) if name else {} for name in names}
    outdated = [trial for trial in own if not trial.failed and not timed_alike(then[trial.provenance], present)]
    held = [trial for trial in own if trial not in outdated and _holds(trial, then[trial.provenance], present)]
    winner = database.winner(target, bucket.problem, bucket.tokens)
    fields = database.provenance(winner.provenance) if winner is not None and winner.provenance else {}
    fresh = winner is not None and winner.source_hash in sources and winner.standing == "own"
    fresh = fresh and timed_alike(fields, present)
    ended = fields if fresh and len(held) == len(own) else {}
    return Known({trial.config: trial for trial in held}, winner, fresh, ended, tuple(outdated))


def imported(database: TunedDatabase, target: Target, bucket: Bucket, effort: Effort) -> list[Config]:
    """What another machine found good for the bucket, the fastest first; not more than are tried before others."""
    sources = get_op(bucket.problem.op).source_hashes(target.kind)
    return database.priors(target, bucket.problem, bucket.tokens, *sources)[: effort.priors]


def _holds(trial: Trial, then: Provenance, present: Provenance) -> bool:
    """Whether a trial need not be made again: a failure may have been this driver's, or this compiler's, one death of
    the tuning process may have had any reason, and memory may have been short because others had it.

    Args: then: its provenance.
    """
    if not trial.failed:
        return True
    again = trial.message == DIED or trial.status == "out_of_memory"
    return bool(trial.provenance) and _same_software(then, present) and not again


def _same_software(one: Provenance, other: Provenance) -> bool:
    """Clocks and power limits vary from run to run, and make no config fail."""
    return all(one.get(name) == other.get(name) for name in _SOFTWARE)
