"""How far two tunings agree: on the winners' times, on the choice of configs, on what is fused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autofuse.cache_db.lines import Content
from autofuse.cache_db.records import Trial, Winner
from autofuse.cache_db.rows import key_of
from autofuse.cache_db.software import timed_alike
from autofuse.cache_db.store import Provenance

__all__ = ["CLOSE", "Agreement", "Pair", "agreement", "pairs"]

CLOSE = 0.02
"""Times within this share of each other count as equally good."""


@dataclass(frozen=True)
class Pair:
    """The winners of one bucket in two files, A and B.

    Two files are of two sessions, perhaps of two machines, between which clocks and other work shift all times. What
    depends on the choice of the config alone is what one file says of both configs: the time of B's config ÷ that of
    A's, both as the trials of one search measured them.

    Attributes:
        in_a, in_b: that ratio by A's trials and by B's; None where a file did not time both.
        failed: what speaks against a winner in the other file: the status of its trial there, if that failed.
        timed_alike: whether both were timed in one way; else their times say nothing of each other.
    """

    a: Winner
    b: Winner
    in_a: float | None = None
    in_b: float | None = None
    failed: tuple[str, ...] = ()
    timed_alike: bool = True

    @property
    def ratio(self) -> float:
        """B's time ÷ A's, as each file says."""
        return self.b.time_us / self.a.time_us

    @property
    def same_config(self) -> bool:
        """Whether both are of one config of one version of the kernel."""
        return (self.a.config, self.a.source_hash) == (self.b.config, self.b.source_hash)

    @property
    def config_ratio(self) -> float | None:
        """The time of B's config ÷ that of A's within a file, the geometric mean if both say so; 1 for one config."""
        if self.same_config:
            return 1.0
        known = [ratio for ratio in (self.in_a, self.in_b) if ratio is not None]
        return math.prod(known) ** (1 / len(known)) if known else None

    @property
    def within_noise(self) -> bool:
        """Whether the times are equal as far as both rows can tell: a row's gain is a ratio of paired rounds, whose
        95 % interval stands here, as a share, for that of its time.
        """
        (a_low, a_high), (b_low, b_high) = _time_interval(self.a), _time_interval(self.b)
        return a_low <= b_high and b_low <= a_high

    @property
    def same_choice(self) -> bool:
        """Whether both fuse, or both leave the unfused code."""
        return self.a.beats_baseline == self.b.beats_baseline

    @property
    def contradicts(self) -> bool:
        """Whether one is faster than the unfused code and the other slower, both beyond their intervals."""
        low, high = sorted((self.a, self.b), key=lambda winner: winner.gain)
        return low.gain_high < 1.0 < high.gain_low


@dataclass(frozen=True)
class Agreement:
    """What pairs come to. Ratios are those of the slower to the faster, at least 1.

    Attributes:
        buckets: how many there are.
        timed_alike: of how many the times can be compared.
        close_times: of how many of these the times are within ``CLOSE`` of each other.
        worst_time: the one of these whose times differ most; None of none.
        same_configs: of how many both have one config.
        compared: how many others have been compared within a file.
        close_configs: of how many of these the configs are within ``CLOSE`` of each other.
        worst_config: the one of these whose configs differ most.
        disagree: where one fuses and the other does not.
        failed: where a winner failed in the other file.
    """

    buckets: int
    timed_alike: int
    close_times: int
    worst_time: Pair | None
    same_configs: int
    compared: int
    close_configs: int
    worst_config: Pair | None
    disagree: tuple[Pair, ...]
    failed: tuple[Pair, ...]


def pairs(here: Content, there: Content) -> list[Pair]:
    """The buckets for which both files have a winner, by target, problem and tokens."""
    ours, theirs = _Rows(here), _Rows(there)
    both = sorted(ours.winners.keys() & theirs.winners.keys())
    return [_pair(ours.winners[key], theirs.winners[key], ours, theirs) for key in both]


def agreement(found: Sequence[Pair]) -> Agreement:
    """Sums pairs up."""
    comparable = [pair for pair in found if pair.timed_alike]
    compared = [pair for pair in found if not pair.same_config and pair.config_ratio is not None]
    return Agreement(
        buckets=len(found),
        timed_alike=len(comparable),
        close_times=sum(_apart(pair.ratio) <= 1 + CLOSE for pair in comparable),
        worst_time=max(comparable, key=lambda pair: _apart(pair.ratio), default=None),
        same_configs=sum(pair.same_config for pair in found),
        compared=len(compared),
        close_configs=sum(_apart(pair.config_ratio) <= 1 + CLOSE for pair in compared),
        worst_config=max(compared, key=lambda pair: _apart(pair.config_ratio), default=None),
        disagree=tuple(pair for pair in found if not pair.same_choice),
        failed=tuple(pair for pair in found if pair.failed),
    )


class _Rows:
    def __init__(self, content: Content) -> None:
        winners = (record for record in content.records if isinstance(record, Winner))
        self.winners = {(str(w.target), str(w.problem), w.tokens): w for w in winners}
        trials = (record for record in content.records if isinstance(record, Trial))
        self._trials = {tuple(key_of(trial).values()): trial for trial in trials}
        self._provenance = content.provenance

    def provenance_of(self, winner: Winner) -> Provenance:
        return self._provenance.get(winner.provenance or "", {})

    def trial_of(self, winner: Winner) -> Trial | None:
        """Of the same bucket, config and kernel source."""
        bucket = (str(winner.target), str(winner.problem), winner.tokens)
        return self._trials.get((*bucket, str(winner.config), winner.source_hash))


def _pair(a: Winner, b: Winner, ours: _Rows, theirs: _Rows) -> Pair:
    in_ours, in_theirs = (ours.trial_of(a), ours.trial_of(b)), (theirs.trial_of(a), theirs.trial_of(b))
    # What one file has from the other is no measurement of its own.
    if in_ours == in_theirs:
        in_theirs = (None, None)
    else:
        if in_ours[1] == in_theirs[1]:
            in_ours = (in_ours[0], None)
        if in_theirs[0] == in_ours[0]:
            in_theirs = (None, in_theirs[1])
    foreign = {"A": in_ours[1], "B": in_theirs[0]}
    failed = tuple(f"{trial.status} in {name}" for name, trial in foreign.items() if trial and trial.failed)
    alike = timed_alike(ours.provenance_of(a), theirs.provenance_of(b))
    return Pair(a, b, _ratio(*in_ours), _ratio(*in_theirs), failed, alike)


def _ratio(of_a: Trial | None, of_b: Trial | None) -> float | None:
    """Of timed trials, pruned ones among them: that one was dropped for being slow is what a choice may cost."""
    if of_a is None or of_b is None or of_a.time_us is None or of_b.time_us is None or of_a.failed or of_b.failed:
        return None
    return of_b.time_us / of_a.time_us


def _time_interval(winner: Winner) -> tuple[float, float]:
    return winner.time_us * winner.gain / winner.gain_high, winner.time_us * winner.gain / winner.gain_low


def _apart(ratio: float | None) -> float:
    assert ratio is not None
    return max(ratio, 1 / ratio)
